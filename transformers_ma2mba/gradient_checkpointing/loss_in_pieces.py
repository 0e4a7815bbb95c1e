"""The next-token cross-entropy of a language model, a piece of positions at a time.

The logits of a long sequence would be the largest tensor of its training step: 2^19 positions and 50,288 tokens in
the vocabulary make 105 GB in float32, and their gradient as much again. Here the head runs on a few hundred positions
at a time: their loss is taken, and their logits are dropped. Backward computes them again, piece by piece.

The head computes four products in place of three. With MA-GC and every position supervised, that is about 1% of a step
of the 2.7B, whose head is a twentieth of the model. Three products would do if forward computed the gradient, softmax
minus one-hot. But only backward knows its factor, the scale of the loss over the number of targets. Applied late, the
factor would follow the rounding to the head's precision, in which float16 loses small values. And the gradient of the
head's weight would stay in memory from forward to backward.

Backward needs the hidden states, as in the plain run, and 20 bytes for each supervised position. It sums the gradient
of the head's weight over the pieces, with one share of it in memory at a time.

Shape suffixes: B batch, T tokens, K positions, S supervised positions, P positions of a piece, D width, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from .captured_tensors import CapturedTensors, without_hooks
from .gradient_sums import GradientSums
from .sharded_modules import call_through_hooks, is_sharded, plain_forward

# The limit for the logits of a piece and their gradient, both in float32: small beside the model, and large enough for
# matrix products at full speed, 667 positions with a vocabulary of 50,288.
_BYTES_OF_A_PIECE = 2**28
_BYTES_OF_A_LOGIT = 4 + 4

_UNDERSTOOD = {"num_items_in_batch", "ignore_index", "shift_labels"}
_WITHOUT_EFFECT = {"return_dict", "output_attentions"}  # PEFT passes them to every model; no loss uses them
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Head:
    """A head and the tensors that it uses in one forward pass.

    Backward uses the same tensors, even if `torch.func.functional_call` or FSDP2 have exchanged them since.
    """

    def __init__(self, module: nn.Module, forward: Callable):
        self.forward = forward
        self.dtype = module.weight.dtype
        self.captured = CapturedTensors({"lm_head": module})
        self.tensors = list(self.captured.names)

    def __call__(self, hidden_states_PD: torch.Tensor) -> torch.Tensor:
        return self.forward(hidden_states_PD.to(self.dtype))


def _forward_in_pieces(head: Callable, hidden_states_KD, targets_S, rows_S, positions_per_piece):
    """Compute the sum of the losses, and the log-sum-exp of each supervised position's logits, `(S,)`."""
    losses, log_sums = [], []
    # Without positions there is one empty piece, whose loss has the right type and device.
    for rows_P, targets_P in zip(rows_S.split(positions_per_piece), targets_S.split(positions_per_piece), strict=True):
        logits_PV = head(hidden_states_KD[rows_P]).float()
        log_sums_P = logits_PV.logsumexp(-1)
        chosen_P = logits_PV.gather(1, targets_P.to(logits_PV.device)[:, None]).squeeze(1)
        losses.append((log_sums_P - chosen_P).sum())
        log_sums.append(log_sums_P)
        del logits_PV  # before the next ones
    return torch.stack(losses).sum(), torch.cat(log_sums)


class _LossInPieces(torch.autograd.Function):
    """The sum of the losses.

    Its backward returns the gradients of the head's parameters, summed over the pieces, so that hooks on parameters
    (DDP, ZeRO, FSDP2) see each gradient exactly once.
    """

    @staticmethod
    def forward(ctx, head: _Head, positions_per_piece: int, hidden_states_KD, targets_S, rows_S, *tensors):
        kind = hidden_states_KD.device.type
        ctx.head, ctx.positions_per_piece = head, positions_per_piece
        # Without autocast's cache: a weight that was cast without a gradient must not serve with one.
        ctx.autocast = dict(
            device_type=kind,
            enabled=torch.is_autocast_enabled(kind),
            dtype=torch.get_autocast_dtype(kind),
            cache_enabled=False,
        )
        # An adapter of the head may have dropout.
        ctx.random_state = torch.get_rng_state(), *get_device_states(hidden_states_KD, *tensors[:1])
        with torch.autocast(**ctx.autocast):
            loss, log_sums_S = _forward_in_pieces(head, hidden_states_KD, targets_S, rows_S, positions_per_piece)
        ctx.save_for_backward(hidden_states_KD, targets_S, rows_S, log_sums_S)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The loss in pieces has first derivatives only: call backward() without create_graph=True, or disable "
                "gradient checkpointing."
            )
        head, size = ctx.head, ctx.positions_per_piece
        hidden_states_KD, targets_S, rows_S, log_sums_S = ctx.saved_tensors
        wants_rows = ctx.needs_input_grad[2]
        grad_hidden_states_KD = torch.zeros_like(hidden_states_KD) if wants_rows else None
        cpu_state, devices, device_states = ctx.random_state
        kind, parameters = ctx.autocast["device_type"], head.captured.trainable
        with (
            torch.random.fork_rng(devices, device_type=kind),
            torch.autocast(**ctx.autocast),
            head.captured,
            without_hooks(parameters),
        ):
            torch.set_rng_state(cpu_state)
            set_device_states(devices, device_states, device_type=kind)
            sums = GradientSums(parameters)
            pieces = zip(rows_S.split(size), targets_S.split(size), log_sums_S.split(size), strict=True)
            for rows_P, targets_P, log_sums_P in pieces:
                hidden_states_PD = hidden_states_KD[rows_P].requires_grad_(wants_rows)
                with torch.enable_grad():
                    # By a view, as PyTorch's FLOP counter cannot follow a leaf through a call of `grad`.
                    logits_PV = head(hidden_states_PD.view_as(hidden_states_PD))
                if not logits_PV.requires_grad:  # the logits depend on nothing that requires a gradient
                    continue
                inputs = [*([hidden_states_PD] if wants_rows else []), *parameters]
                grad_logits_PV = _gradient_of_logits(logits_PV.detach(), targets_P, log_sums_P, grad_loss)
                with torch.autocast(kind, enabled=False):  # as around backward
                    gradients = [*torch.autograd.grad(logits_PV, inputs, grad_logits_PV, allow_unused=True)]
                del logits_PV, grad_logits_PV
                # Free each gradient before the next piece computes another.
                for parameter in reversed(parameters):
                    sums.add(parameter, gradients.pop())
                if wants_rows and (grad_PD := gradients.pop()) is not None:
                    grad_hidden_states_KD[rows_P] = grad_PD
            totals = iter(sums.totals())
        grad_tensors = (next(totals) if tensor in sums.sums else None for tensor in head.tensors)
        return None, None, grad_hidden_states_KD, None, None, *grad_tensors


def _gradient_of_logits(logits_PV, targets_P, log_sums_P, grad_loss):
    """Softmax minus one-hot, computed in float32 like the loss, in the precision of the logits."""
    # The subtraction promotes half precision to float32 without a copy. Float64 is rounded, as for the loss.
    wide_PV = logits_PV if logits_PV.dtype.itemsize < 4 else logits_PV.float()
    grad_PV = (wide_PV - log_sums_P[:, None]).exp_()
    targets_P1 = targets_P.to(grad_PV.device)[:, None]
    grad_PV.scatter_add_(1, targets_P1, -torch.ones_like(targets_P1, dtype=grad_PV.dtype))
    return grad_PV.mul_(grad_loss).to(logits_PV.dtype)


@torch.compiler.disable
def loss_in_pieces(
    head: nn.Module,
    hidden_states_KD: torch.Tensor,
    targets_K: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    positions_per_piece: int | None = None,
) -> torch.Tensor:
    """Cross-entropy of a head's predictions, with the logits of one piece in memory at a time.

    Value and gradients equal those of Transformers' `ForCausalLMLoss` on `head(hidden_states).float()`, with one
    difference: without any target, the loss and its gradients are zero. Hooks of the head see each piece, and see it
    again in backward; the hooks of a sharded head run once, around all pieces.

    Args:
        head: maps `(P, hidden_size)` rows to `(P, vocab_size)` logits, each row by itself. Rows are cast to the type
            of its `weight`, `(vocab_size, hidden_size)`, as in stock models.
        hidden_states_KD: `(num_positions, hidden_size)`.
        targets_K: `(num_positions,)`, the token that each position is to predict, or `ignore_index`.
        num_items_in_batch: divides the sum of the losses; None for the number of targets.
        ignore_index: the target of positions without one.
        positions_per_piece: the positions of a piece. By default those whose logits and gradients take 256 MiB, and
            at least one.

    Returns:
        The loss, a scalar: float32.

    Raises:
        ValueError: if shapes do not match, or `positions_per_piece` is not a positive number.
        RuntimeError: if DeepSpeed's ZeRO-3 has sharded the parts of the head one by one, as those of an adapter. In
            backward, if a parameter of the head has changed, or for second derivatives.
    """
    if hidden_states_KD.ndim != 2 or targets_K.shape != hidden_states_KD.shape[:1]:
        raise ValueError(
            f"targets must name one token for each row of the hidden states, (positions, hidden_size); got shapes "
            f"{tuple(targets_K.shape)} and {tuple(hidden_states_KD.shape)}."
        )
    if positions_per_piece is not None and (not isinstance(positions_per_piece, int) or positions_per_piece < 1):
        raise ValueError(f"positions_per_piece must be a positive integer or None, got {positions_per_piece!r}.")
    if _has_sharded_parts(head):
        raise RuntimeError(
            "The parts of this head are sharded one by one: processes with different numbers of pieces would wait for "
            "each other. Take the loss of whole logits, or leave the head out of the adapter."
        )
    targets_K = targets_K.to(hidden_states_KD.device)
    rows_S = (targets_K != ignore_index).nonzero().squeeze(1)
    forward = plain_forward(head)  # bound now, as `run` replaces the `forward` of a sharded head inside its hooks

    def run(hidden_states_KD, targets_S, rows_S):
        # Inside the hooks, where a sharded head has its whole parameters.
        called = _Head(head, forward)
        size = positions_per_piece or max(1, _BYTES_OF_A_PIECE // (_BYTES_OF_A_LOGIT * head.weight.shape[0]))
        inputs = hidden_states_KD, targets_S, rows_S
        tensors = [hidden_states_KD, *called.tensors]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return _LossInPieces.apply(called, size, *inputs, *called.tensors)
        return _forward_in_pieces(called, *inputs, size)[0]

    loss = call_through_hooks([head], run, hidden_states_KD, targets_K[rows_S], rows_S)
    if len(rows_S) == 0:
        return loss  # nothing to learn, and no NaN to spread
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / (len(rows_S) if num_items_in_batch is None else num_items_in_batch)


def causal_lm_loss(
    head: nn.Module,
    hidden_states: torch.Tensor,
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """Transformers' `ForCausalLMLoss` with hidden states and a head in place of logits; see [`loss_in_pieces`].

    Args:
        hidden_states: `(..., sequence_length, hidden_size)`.
        labels: `(..., sequence_length)`, token ids, of which each position predicts the next one's.
        shift_labels: in place of `labels`, `(..., sequence_length)`, what each position is to predict.
        kwargs: without effect, as in `ForCausalLMLoss`.

    Returns:
        The loss, a scalar: float32.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return loss_in_pieces(
        head,
        hidden_states.flatten(end_dim=-2),
        shift_labels.flatten(),
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
    )


def can_be_in_pieces(model: PreTrainedModel, kwargs: dict) -> bool:
    """Whether [`causal_lm_loss`] equals a model's `loss_function` with these keyword arguments.

    It does not if the model has another loss than Transformers' for causal language models, if an argument is unknown,
    if the head has hooks, which expect all logits, or if the parts of the head are sharded one by one.
    """
    given = {name for name, value in kwargs.items() if value is not None}
    if model.loss_function is not ForCausalLMLoss or not given <= _UNDERSTOOD | _WITHOUT_EFFECT:
        return False
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or not any(weight is parameter for parameter in head.parameters()):
        return False
    # A linear layer computes each row by itself. Accelerate's hooks only move rows and offloaded weights.
    wrapped = "forward" in vars(head) and not (hasattr(head, "_hf_hook") and not weight.is_meta)
    if wrapped or not (type(head).forward is nn.Linear.forward or _is_adapted_linear(head)):
        return False
    hooked = any(getattr(module, hooks) for module in head.modules() for hooks in _HOOKS if not is_sharded(module))
    return weight.is_floating_point() and not hooked and not _has_sharded_parts(head)


def _is_adapted_linear(head: nn.Module) -> bool:
    base = getattr(head, "base_layer", None) or getattr(head, "original_module", None)
    linear = isinstance(base, nn.Linear) and type(base).forward is nn.Linear.forward
    return type(head).__module__.startswith("peft.") and linear


def _has_sharded_parts(head: nn.Module) -> bool:
    return any(is_sharded(module) for module in head.modules() if module is not head)
