"""The next-token cross-entropy of a language model, a piece of positions at a time.

The logits of a long sequence would be the largest tensor of its training step: 2^19 positions and 50,280 tokens in
the vocabulary make 105 GB in float32, and their gradient as much again. Here the head runs on a few hundred positions,
their loss is taken, and their logits are forgotten. Backward computes them again, piece by piece.

That is one product of the head more than in the plain run, four in place of three: with MA-GC and every position
supervised about 1 % of a step of the 2.7B, whose head is a twentieth of the model. The closed form of the gradient,
softmax minus one-hot, could be had in forward for three. But its factor, one over the number of targets times the
scale of the loss, is known in backward only. Applied late, it comes after rounding to the precision of the head, where
float16 has lost what is small; and the gradient of the head's weight would stand from forward to backward.

From forward to backward wait the hidden states, as in the plain run, and 20 bytes for each supervised position. The
gradient of the head's weight is summed over the pieces: beside the sum there is one share of it at a time.

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

# Logits of a piece and their gradient, both in float32, take this much at most. It is little beside the model, and for
# a vocabulary of 50,280 still 667 positions: enough for matrix products at full speed.
_BYTES_OF_A_PIECE = 2**28
_BYTES_OF_A_LOGIT = 4 + 4

_UNDERSTOOD = {"num_items_in_batch", "ignore_index", "shift_labels"}
_WITHOUT_EFFECT = {"return_dict", "output_attentions"}  # PEFT hands them to every model; no loss heeds them
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Head:
    """A head at one forward pass: how it is called, and the very tensors that it computes with.

    Backward computes with the same ones, wherever `torch.func.functional_call` or FSDP2 have put others since.
    """

    def __init__(self, module: nn.Module, forward: Callable):
        self.forward = forward
        self.dtype = module.weight.dtype
        self.captured = CapturedTensors({"lm_head": module})
        self.tensors = list(self.captured.names)

    def __call__(self, hidden_states_PD: torch.Tensor) -> torch.Tensor:
        return self.forward(hidden_states_PD.to(self.dtype))


def _forward_in_pieces(head: Callable, hidden_states_KD, targets_S, rows_S, positions_per_piece):
    """Returns the sum of the losses, and the logarithm of each supervised position's sum of exponentials, `(S,)`."""
    losses, log_sums = [], []
    # If there are no positions, there is still one piece, an empty one: its loss has the right type and device.
    for rows_P, targets_P in zip(rows_S.split(positions_per_piece), targets_S.split(positions_per_piece), strict=True):
        logits_PV = head(hidden_states_KD[rows_P]).float()
        log_sums_P = logits_PV.logsumexp(-1)
        chosen_P = logits_PV.gather(1, targets_P.to(logits_PV.device)[:, None]).squeeze(1)
        losses.append((log_sums_P - chosen_P).sum())
        log_sums.append(log_sums_P)
        del logits_PV  # before the next ones
    return torch.stack(losses).sum(), torch.cat(log_sums)


class _LossInPieces(torch.autograd.Function):
    """The sum of the losses. Gradients of the head's parameters leave from its backward, summed over the pieces, so
    that hooks on them (DDP, ZeRO, FSDP2) see each exactly once."""

    @staticmethod
    def forward(ctx, head: _Head, positions_per_piece: int, hidden_states_KD, targets_S, rows_S, *tensors):
        kind = hidden_states_KD.device.type
        ctx.head, ctx.positions_per_piece = head, positions_per_piece
        # Without autocast's cache: a weight that was cast while no gradient was wanted must not come back when it is.
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
                    # By a view, as PyTorch's counter of FLOPs cannot follow a leaf through this call of `grad`.
                    logits_PV = head(hidden_states_PD.view_as(hidden_states_PD))
                if not logits_PV.requires_grad:  # what wants gradients has no part in the logits
                    continue
                inputs = [*([hidden_states_PD] if wants_rows else []), *parameters]
                grad_logits_PV = _gradient_of_logits(logits_PV.detach(), targets_P, log_sums_P, grad_loss)
                with torch.autocast(kind, enabled=False):  # as around backward
                    gradients = [*torch.autograd.grad(logits_PV, inputs, grad_logits_PV, allow_unused=True)]
                del logits_PV, grad_logits_PV
                # Each is gone before the next piece makes another.
                for parameter in reversed(parameters):
                    sums.add(parameter, gradients.pop())
                if wants_rows and (grad_PD := gradients.pop()) is not None:
                    grad_hidden_states_KD[rows_P] = grad_PD
            totals = iter(sums.totals())
        grad_tensors = (next(totals) if tensor in sums.sums else None for tensor in head.tensors)
        return None, None, grad_hidden_states_KD, None, None, *grad_tensors


def _gradient_of_logits(logits_PV, targets_P, log_sums_P, grad_loss):
    """Softmax minus one-hot, computed in float32 as the loss is, in the precision of the logits."""
    # Half precision becomes float32 in the subtraction, without a copy; float64 is to be rounded as for the loss.
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
    """Cross-entropy of a head's predictions, of which there are never more than a piece's in memory.

    Value and gradients are those of Transformers' `ForCausalLMLoss` on `head(hidden_states).float()`, with one
    difference: without any target the loss is zero, and so are the gradients. Hooks of the head see each piece, in
    backward once more; those of a sharded head are called once, around all pieces.

    Args:
        head: makes `(P, vocab_size)` logits of `(P, hidden_size)` rows, each row by itself. Rows are cast to the type
            of its `weight`, `(vocab_size, hidden_size)`, as stock models do.
        hidden_states_KD: `(num_positions, hidden_size)`.
        targets_K: `(num_positions,)`, the token that each position is to predict, or `ignore_index`.
        num_items_in_batch: what the sum of the losses is divided by; None for the number of targets.
        ignore_index: stands where nothing is to be learned.
        positions_per_piece: how many positions' logits there are at a time. None: as many as take 256 MiB with their
            gradient, or one.

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
            "The parts of this head are sharded one by one, and processes with different numbers of pieces would wait "
            "for each other at its calls: take the loss of whole logits, or leave the head out of the adapter."
        )
    targets_K = targets_K.to(hidden_states_KD.device)
    rows_S = (targets_K != ignore_index).nonzero().squeeze(1)
    forward = plain_forward(head)  # bound now: while the hooks of a sharded head run, its `forward` is `run`

    def run(hidden_states_KD, targets_S, rows_S):
        # Built inside the hooks: only now does a sharded head have its whole parameters.
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
        kwargs: without effect, as there.

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
    """Whether [`causal_lm_loss`] does for a model what its `loss_function` would do with these keyword arguments.

    It does not if the loss is another than Transformers' for causal language models, or an argument is unknown; if
    hooks of the head are to see all logits; or if the head's parameters are not its own when it is called, as where
    the parts of an adapter are sharded one by one.
    """
    given = {name for name, value in kwargs.items() if value is not None}
    if model.loss_function is not ForCausalLMLoss or not given <= _UNDERSTOOD | _WITHOUT_EFFECT:
        return False
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or not any(weight is parameter for parameter in head.parameters()):
        return False
    # Each row by itself, as no other class can promise. Accelerate's hooks move rows, and weights that are elsewhere.
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
