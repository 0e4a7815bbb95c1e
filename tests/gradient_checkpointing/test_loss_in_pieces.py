"""The loss in pieces against Transformers' own loss, which takes the logits of all positions at once."""

import copy
import weakref

import pytest
import torch
import torch.distributed as dist
from comparison import LargestTensor
from peft import LoraConfig, inject_adapter_in_model
from tiny import tiny_text_config
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import Mamba2ForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from transformers_ma2mba.gradient_checkpointing import loss_in_pieces as module
from transformers_ma2mba.gradient_checkpointing.loss_in_pieces import can_be_in_pieces, causal_lm_loss, loss_in_pieces

POSITIONS, WIDTH, VOCABULARY = 23, 6, 50
IGNORED = [0, 7, 8, 22]
EXACT = dict(rtol=1e-12, atol=1e-12)


def make_head(bias=True, dtype=torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCABULARY, bias=bias).to(dtype)


def make_inputs(dtype=torch.float64, positions=POSITIONS, width=WIDTH, vocabulary=VOCABULARY):
    """Hidden states that require a gradient, and targets, of which some are ignored."""
    torch.manual_seed(1)
    hidden_states = torch.randn(positions, width).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (positions,))
    targets[IGNORED] = -100
    return hidden_states, targets


def plain(head, hidden_states, targets, **kwargs):
    """The loss as a stock model computes it."""
    logits = head(hidden_states.to(head.weight.dtype)).float()
    return ForCausalLMLoss(logits, None, logits.shape[-1], shift_labels=targets, **kwargs)


def gradients(loss_function, head, hidden_states, targets, scale=1.0, **kwargs) -> dict:
    """The loss, and the gradients of `scale` times the loss for all tensors that require one."""
    tensors = {"hidden_states": hidden_states, **dict(head.named_parameters())}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    loss = loss_function(head, hidden_states, targets, **kwargs)
    found = torch.autograd.grad(loss * scale, list(tensors.values()), allow_unused=True)
    return {"loss": loss.detach(), **dict(zip(tensors, found, strict=True))}


def assert_plain_loss(head, hidden_states, targets, positions_per_piece=5, tolerance=EXACT, **kwargs):
    """Assert that the pieces give the plain loss and gradients. A factor stands for operations after the loss."""
    actual = gradients(loss_in_pieces, head, hidden_states, targets, 3.0, **kwargs, **pieces_of(positions_per_piece))
    expected = gradients(plain, head, hidden_states, targets, 3.0, **kwargs)
    assert_close(actual, expected, **tolerance)
    return actual


def pieces_of(positions):
    return {"positions_per_piece": positions}


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("positions_per_piece", [1, 7, 19, 1000, None])
def test_loss_and_gradients_equal_the_plain_ones(in_double, positions_per_piece, bias):
    actual = assert_plain_loss(make_head(bias), *make_inputs(), positions_per_piece)
    assert actual["loss"] > 1 and not actual["hidden_states"][IGNORED].any()


@pytest.mark.parametrize("items", [9, torch.tensor(9), torch.tensor([9])], ids=repr)
def test_num_items_in_batch_divides_the_loss(in_double, items):
    assert_plain_loss(make_head(), *make_inputs(), num_items_in_batch=items)


def test_ignore_index_can_be_changed(in_double):
    hidden_states, targets = make_inputs()
    targets[IGNORED] = 3
    assert_plain_loss(make_head(), hidden_states, targets, ignore_index=3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_loss_is_float32(dtype):
    """Transformers' loss is float32 at any precision of the head."""
    actual = assert_plain_loss(make_head(dtype=dtype), *make_inputs(dtype), tolerance=dict(rtol=1e-5, atol=1e-6))
    assert actual["loss"].dtype == torch.float32


def test_hidden_states_are_cast_to_the_dtype_of_the_head(in_double):
    actual = assert_plain_loss(make_head(), *make_inputs(torch.float32), tolerance=dict(rtol=1e-6, atol=1e-7))
    assert actual["hidden_states"].dtype == torch.float32 and actual["weight"].dtype == torch.float64


def test_expanded_hidden_states_equal_the_plain_run(in_double):
    hidden_states, targets = make_inputs()
    expanded = hidden_states[:1].detach().expand(POSITIONS, WIDTH).requires_grad_()
    assert_plain_loss(make_head(), expanded, targets)


@pytest.mark.parametrize("items", [None, 5, 0])
@pytest.mark.parametrize("positions", [0, POSITIONS])
def test_loss_without_supervised_positions_is_zero(positions, items):
    hidden_states, targets = make_inputs()
    hidden_states, targets = hidden_states[:positions], torch.full_like(targets, -100)[:positions]
    found = gradients(loss_in_pieces, make_head(), hidden_states, targets, num_items_in_batch=items)
    assert found.keys() == {"loss", "hidden_states", "weight", "bias"}
    assert found["loss"].dtype == torch.float32
    for name, tensor in found.items():
        assert not tensor.any(), name  # NaN counts as true


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def test_bfloat16_gradients_keep_their_precision_over_many_pieces():
    """The gradient of the hidden states equals the plain one.

    The gradient of the weight is rounded once more: the matrix product rounds each of 400 shares, and their sum is
    rounded again.
    """
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY).bfloat16()
    hidden_states, targets = make_inputs(torch.bfloat16, positions=2000)
    truth = gradients(plain, copy.deepcopy(head).double(), hidden_states.detach().double().requires_grad_(), targets)
    whole = gradients(plain, head, hidden_states, targets)
    pieces = gradients(loss_in_pieces, head, hidden_states, targets, **pieces_of(5))
    supervised = (targets != -100).nonzero().squeeze(1)
    naive = torch.zeros_like(head.weight)
    for rows in supervised.split(5):
        loss = plain(head, hidden_states[rows], targets[rows], num_items_in_batch=len(supervised))
        naive += torch.autograd.grad(loss, head.weight)[0]
    assert torch.equal(pieces["hidden_states"], whole["hidden_states"])
    for name, expected in truth.items():
        limit = 1.5 if name in ("weight", "bias") else 1.02  # the square root of two for two independent roundings
        assert relative_error(pieces[name], expected) < limit * relative_error(whole[name], expected), name
    assert relative_error(naive, truth["weight"]) > 4 * relative_error(whole["weight"], truth["weight"])


def test_loss_scaler_prevents_underflow_in_pieces():
    """Without the scale of the loss, these gradients are too small for float16."""
    head = make_head(dtype=torch.float16)
    hidden_states, targets = make_inputs(torch.float16)
    scale, items = 2.0**16, 2**26
    whole = gradients(plain, head, hidden_states, targets, scale, num_items_in_batch=items)
    pieces = gradients(loss_in_pieces, head, hidden_states, targets, scale, num_items_in_batch=items, **pieces_of(5))
    unscaled = gradients(plain, head, hidden_states, targets, num_items_in_batch=items)
    assert torch.equal(pieces["hidden_states"], whole["hidden_states"])
    assert_close(pieces["weight"], whole["weight"], rtol=0.02, atol=1e-6)
    assert whole["hidden_states"].any() and not unscaled["hidden_states"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_is_larger_than_the_logits_of_a_piece(dtype):
    head = make_head(dtype=dtype)
    inputs = make_inputs(dtype, positions=200)
    sizes = {}
    for loss_function, options in [(plain, {}), (loss_in_pieces, pieces_of(10))]:
        with LargestTensor() as largest:
            gradients(loss_function, head, *inputs, **options)
        sizes[loss_function] = largest.numel
    assert sizes[plain] == 200 * VOCABULARY
    assert sizes[loss_in_pieces] == max(10 * VOCABULARY, 200 * WIDTH)


class Shares(TorchDispatchMode):
    """The number of gradients of a weight in memory after each matrix product that makes one."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.references, self.alive = weight, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self.weight.numel():
            self.references.append(weakref.ref(result))
            if function is torch.ops.aten.mm.default:
                alive = {tensor.data_ptr() for reference in self.references if (tensor := reference()) is not None}
                self.alive.append(len(alive - {self.weight.data_ptr()}))
        return result


def test_backward_holds_the_weight_gradient_and_one_share():
    head, (hidden_states, targets) = make_head(bias=False, dtype=torch.float32), make_inputs(torch.float32)
    loss = loss_in_pieces(head, hidden_states, targets, **pieces_of(4))
    with Shares(head.weight) as shares:
        loss.backward()
    assert shares.alive == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("frozen, products", [(False, 3), (True, 2)], ids=["trained", "frozen"])
def test_pieces_cost_one_more_product_of_the_head(frozen, products):
    head, inputs = make_head(bias=False).requires_grad_(not frozen), make_inputs()
    supervised = POSITIONS - len(IGNORED)
    for loss_function, rows, number in [(plain, POSITIONS, products), (loss_in_pieces, supervised, products + 1)]:
        with FlopCounterMode(display=False) as counter:
            loss_function(head, *inputs).backward()
        assert counter.get_total_flops() == number * 2 * rows * WIDTH * VOCABULARY


def rows_of_calls(head) -> list[int]:
    """A list that gets the number of rows of each later call of the head."""
    rows = []
    head.register_forward_pre_hook(lambda head, args: rows.append(len(args[0])))
    return rows


def test_piece_size_follows_the_memory_limit(monkeypatch):
    assert module._BYTES_OF_A_PIECE // (8 * 50288) == 667  # float32 logits and their gradient
    head, (hidden_states, targets) = make_head(), make_inputs()
    rows = rows_of_calls(head)
    for limit, expected in [(8 * VOCABULARY * 8 - 1, [7, 7, 5]), (1, [1] * 19)]:
        monkeypatch.setattr(module, "_BYTES_OF_A_PIECE", limit)
        loss = loss_in_pieces(head, hidden_states, targets)
        assert rows == expected  # 19 of 23 positions have a target
        loss.backward()
        assert rows == 2 * expected
        rows.clear()


def test_tensor_hooks_get_one_gradient():
    head, (hidden_states, targets) = make_head(), make_inputs()
    arrivals = []
    for name, tensor in [("hidden_states", hidden_states), *head.named_parameters()]:
        tensor.register_hook(lambda gradient, name=name: arrivals.append(name))
        tensor.register_post_accumulate_grad_hook(lambda tensor, name=name: arrivals.append(f"{name}.grad"))
    loss_in_pieces(head, hidden_states, targets, **pieces_of(2)).backward()
    assert sorted(arrivals) == ["bias", "bias.grad", "hidden_states", "hidden_states.grad", "weight", "weight.grad"]


def test_tied_embeddings_get_the_gradients_of_both_uses(in_double):
    """The weight receives their sum as one gradient."""
    head, (_, targets) = make_head(), make_inputs()
    arrivals = []
    head.weight.register_hook(lambda gradient: arrivals.append(1))
    tokens = torch.arange(POSITIONS)
    found = []
    for loss_function, options in [(plain, {}), (loss_in_pieces, pieces_of(4))]:
        head.zero_grad()
        loss_function(head, nn.functional.embedding(tokens, head.weight).tanh(), targets, **options).backward()
        found.append(head.weight.grad)
    assert_close(*found, **EXACT)
    assert len(arrivals) == 2


def test_parameter_in_three_places_gets_the_whole_gradient(in_double):
    """Two linear layers share a weight, which is also a parameter of the head itself."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH).double()
            self.outer = make_head()
            self.outer_again = nn.Linear(WIDTH, VOCABULARY).double()
            self.outer_again.weight = self.outer.weight
            self.weight = self.outer.weight

        def forward(self, rows):
            return self.outer(self.inner(rows)) + self.outer_again(rows)

    assert_plain_loss(Head(), *make_inputs())


@pytest.mark.parametrize("frozen", ["weight", "bias", "hidden_states", "head"])
def test_frozen_tensors_get_no_gradient(in_double, frozen):
    head, (hidden_states, targets) = make_head(), make_inputs()
    tensors = {"hidden_states": [hidden_states], "head": head.parameters()}
    for tensor in tensors.get(frozen) or [head.get_parameter(frozen)]:
        tensor.requires_grad_(False)
    found = assert_plain_loss(head, hidden_states, targets)
    assert frozen not in found and len(found) == (2 if frozen == "head" else 3)


@pytest.mark.parametrize("how", ["all is frozen", "no_grad", "inference_mode"])
def test_loss_needs_no_gradient_when_nothing_else_does(in_double, how):
    head, (hidden_states, targets) = make_head(), make_inputs()
    if how == "all is frozen":
        head.requires_grad_(False)
        loss = loss_in_pieces(head, hidden_states.detach(), targets, **pieces_of(4))
    else:
        with getattr(torch, how)():
            loss = loss_in_pieces(head, hidden_states, targets, **pieces_of(4))
    assert not loss.requires_grad
    assert_close(loss, plain(head, hidden_states, targets).detach(), **EXACT)


def test_unused_parameter_gets_no_gradient(in_double):
    head, (hidden_states, targets) = make_head(), make_inputs()
    head.unused = nn.Parameter(torch.ones(3))
    assert assert_plain_loss(head, hidden_states, targets)["unused"] is None


def lora_head(dropout=0.0, **options) -> nn.Module:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(WIDTH, WIDTH)
            self.lm_head = make_head(bias=False)

    model = inject_adapter_in_model(LoraConfig(r=2, lora_dropout=dropout, **options), Model())
    head = model.lm_head.double().train()
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "lora_B" in name:
                parameter.normal_()  # PEFT initialises it to zero
    return head


@pytest.mark.parametrize("kind", ["low rank", "trained whole"])
def test_head_with_an_adapter_equals_the_plain_run(in_double, kind):
    if kind == "low rank":
        head = lora_head(target_modules=["lm_head"])
        expected = {"lora_A.default.weight", "lora_B.default.weight"}
    else:
        head = lora_head(target_modules=["other"], modules_to_save=["lm_head"])
        expected = {"modules_to_save.default.weight"}
    assert assert_plain_loss(head, *make_inputs()).keys() == {"loss", "hidden_states"} | expected


def test_backward_repeats_the_dropout_masks(in_double):
    head, (hidden_states, targets) = lora_head(0.5, target_modules=["lm_head"]), make_inputs()
    supervised = (targets != -100).nonzero().squeeze(1)

    def piece_by_piece(head, hidden_states, targets, positions_per_piece):
        torch.manual_seed(3)
        losses = [
            plain(head, hidden_states[rows], targets[rows], num_items_in_batch=len(supervised))
            for rows in supervised.split(positions_per_piece)
        ]
        return sum(losses)

    def in_pieces(*args, **kwargs):
        torch.manual_seed(3)
        loss = loss_in_pieces(*args, **kwargs)
        in_pieces.random_state = torch.get_rng_state()
        return loss

    expected = gradients(piece_by_piece, head, hidden_states, targets, **pieces_of(5))
    without = gradients(plain, head.eval(), hidden_states, targets)
    head.train()
    assert_close(gradients(in_pieces, head, hidden_states, targets, **pieces_of(5)), expected, **EXACT)
    assert torch.equal(torch.get_rng_state(), in_pieces.random_state)  # backward does not change it
    assert not torch.allclose(without["loss"], expected["loss"])


def test_head_hooks_may_change_each_row(in_double):
    """They may change inputs and outputs."""
    head = make_head()
    head.register_forward_pre_hook(lambda head, args: (args[0].tanh(),))
    head.register_forward_hook(lambda head, args, logits: 2 * logits.tanh())
    assert_plain_loss(head, *make_inputs())


def test_autocast_equals_the_plain_run_up_to_rounding():
    head, (hidden_states, targets) = make_head(dtype=torch.float32), make_inputs(torch.float32, positions=200)
    truth = gradients(plain, head, hidden_states, targets)

    def under_autocast(loss_function, **options):
        def run(*args):
            with torch.autocast("cpu", torch.bfloat16):
                return loss_function(*args, **options)

        return gradients(run, head, hidden_states, targets)

    whole, pieces = under_autocast(plain), under_autocast(loss_in_pieces, **pieces_of(7))
    assert pieces["loss"].dtype == torch.float32
    assert torch.equal(pieces["hidden_states"], whole["hidden_states"])  # each row by itself, with the same rounding
    for name, expected in truth.items():
        error = relative_error(pieces[name], expected)
        assert 1e-8 < error < 1.5 * relative_error(whole[name], expected), name


def test_autocast_caches_no_weights_cast_without_gradient():
    head, (hidden_states, targets) = make_head(dtype=torch.float32), make_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_in_pieces(head, hidden_states, targets)
        again = plain(head, hidden_states, targets)
    assert all(gradient is not None for gradient in torch.autograd.grad(again, list(head.parameters())))
    loss.backward()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_error_names_a_modified_parameter(name):
    head = make_head()
    loss = loss_in_pieces(head, *make_inputs())
    with torch.no_grad():
        head.get_parameter(name).add_(1)
    with pytest.raises(RuntimeError, match=rf"lm_head\.{name}, .* was modified in place"):
        loss.backward()


def test_error_names_a_modified_adapter_weight():
    head = lora_head(target_modules=["lm_head"])
    loss = loss_in_pieces(head, *make_inputs())
    with torch.no_grad():
        head.lora_A.default.weight.zero_()
    with pytest.raises(RuntimeError, match=r"lm_head\.lora_A\.default\.weight, .* was modified in place"):
        loss.backward()


def test_modified_hidden_states_raise_the_error_of_autograd():
    hidden_states, targets = make_inputs()
    rows = hidden_states * 2
    loss = loss_in_pieces(make_head(), rows, targets)
    rows.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_functional_call_passes_gradients_to_the_given_tensors(in_double, frozen):
    """Backward uses the tensors that replaced the parameters in forward. The parameters get no gradient."""
    head, (hidden_states, targets) = make_head(), make_inputs()

    class Loss(nn.Module):
        def __init__(self, function, **options):
            super().__init__()
            self.head, self.function, self.options = head, function, options

        def forward(self):
            return self.function(self.head, hidden_states, targets, **self.options)

    seeds = torch.randn(VOCABULARY, WIDTH + 1, dtype=torch.float64, requires_grad=not frozen)
    swapped = {"head.weight": 2 * seeds[:, :WIDTH], "head.bias": seeds[:, WIDTH].tanh()}
    inputs = [hidden_states, *([] if frozen else [seeds])]
    found = []
    for model in (Loss(plain), Loss(loss_in_pieces, **pieces_of(4))):
        loss = torch.func.functional_call(model, swapped)
        found.append((loss, *torch.autograd.grad(loss, inputs, retain_graph=True)))
    assert_close(*found, **EXACT)
    own = dict(head.named_parameters())
    assert all(isinstance(tensor, nn.Parameter) and tensor.grad is None for tensor in own.values())


def test_backward_repeats_with_retain_graph(in_double):
    head, (hidden_states, targets) = make_head(), make_inputs()
    loss = loss_in_pieces(head, hidden_states, targets, **pieces_of(4))
    first = torch.autograd.grad(loss, [hidden_states, *head.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden_states, *head.parameters()])
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_second_derivatives_are_refused():
    hidden_states, targets = make_inputs()
    loss = loss_in_pieces(make_head(), hidden_states, targets)
    with pytest.raises(RuntimeError, match="first derivatives only: call backward.* without create_graph=True"):
        torch.autograd.grad(loss, hidden_states, create_graph=True)


def test_head_keeps_its_parameters_after_an_error():
    head, (hidden_states, targets) = make_head(), make_inputs()
    own = list(head.parameters())
    targets[3] = VOCABULARY
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        loss_in_pieces(head, hidden_states, targets)
    assert all(map(lambda tensor, other: tensor is other, head.parameters(), own))


def test_loss_works_inside_pytorch_checkpoints_and_save_on_cpu(in_double):
    """Both unpack each tensor that autograd keeps only once."""
    head, (hidden_states, targets) = make_head(), make_inputs()

    def checkpointed(*args, **kwargs):
        return checkpoint(loss_in_pieces, *args, **kwargs, use_reentrant=False)

    def offloaded(*args, **kwargs):
        with torch.autograd.graph.save_on_cpu():
            return loss_in_pieces(*args, **kwargs)

    expected = gradients(plain, head, hidden_states, targets)
    for loss_function in (checkpointed, offloaded):
        assert_close(gradients(loss_function, head, hidden_states, targets, **pieces_of(4)), expected, **EXACT)


@pytest.mark.parametrize("positions", [0, POSITIONS])
def test_hooks_of_a_sharded_head_run_once_for_all_pieces(in_double, positions):
    head, (hidden_states, targets) = make_head(), make_inputs()
    hidden_states = hidden_states.detach()[:positions]  # hooks in backward must work without its gradient
    targets = targets[:positions]
    expected = gradients(plain, head, hidden_states, targets) if positions else None
    head.ds_id = 0  # ZeRO-3 marks its modules like this
    calls = []
    head.register_forward_pre_hook(lambda head, args: calls.append(("in", args[0].requires_grad)))
    head.register_forward_hook(lambda head, args, output: calls.append(("out", output.requires_grad)))
    found = gradients(loss_in_pieces, head, hidden_states, targets, **pieces_of(2))
    assert calls == [("in", True), ("out", True)]
    if positions:
        assert_close(found, expected, **EXACT)


def test_head_with_sharded_sub_modules_is_refused():
    head = lora_head(target_modules=["lm_head"])
    head.lora_A.default.ds_id = 7
    with pytest.raises(RuntimeError, match="sharded one by one"):
        loss_in_pieces(head, *make_inputs())


@pytest.fixture
def process_group(tmp_path):
    """A process group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_head_sharded_by_fsdp2_equals_the_plain_run(in_double, process_group):
    """In forward, FSDP2 replaces the parameters by other tensors, whose storage it frees until backward."""
    head, (hidden_states, targets) = make_head(), make_inputs()
    expected = gradients(plain, head, hidden_states, targets)
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(head, mesh=mesh, reshard_after_forward=True)
    gathered = []
    head.register_forward_pre_hook(lambda head, args: gathered.append(type(head.weight)))
    loss = loss_in_pieces(head, hidden_states, targets, **pieces_of(4))
    assert gathered == [nn.Parameter]  # one call for all pieces, with the whole weight instead of a DTensor
    loss.backward()
    assert_close(loss, expected["loss"], **EXACT)
    assert_close(hidden_states.grad, expected["hidden_states"], **EXACT)
    for name, parameter in head.named_parameters():
        assert_close(parameter.grad.full_tensor(), expected[name], **EXACT)


def test_compiled_function_equals_the_plain_run(in_double):
    """The loss in pieces stays outside the compiled graph."""
    head, (hidden_states, targets) = make_head(), make_inputs()

    @torch.compile(backend="eager")
    def compiled(head, hidden_states, targets, **kwargs):
        return 2 * loss_in_pieces(head, hidden_states / 2, targets, **kwargs)

    def eager(head, hidden_states, targets):
        return 2 * plain(head, hidden_states / 2, targets)

    actual = gradients(compiled, head, hidden_states, targets, **pieces_of(4))
    assert_close(actual, gradients(eager, head, hidden_states, targets), **EXACT)


@pytest.mark.parametrize("positions_per_piece", [0, -1, 2.0, "all"])
def test_invalid_piece_sizes_are_refused(positions_per_piece):
    with pytest.raises(ValueError, match=f"positive integer or None, got {positions_per_piece!r}"):
        loss_in_pieces(make_head(), *make_inputs(), positions_per_piece=positions_per_piece)


def test_mismatched_shapes_are_refused():
    hidden_states, targets = make_inputs()
    with pytest.raises(ValueError, match=r"one token for each row .* \(22,\) and \(23, 6\)"):
        loss_in_pieces(make_head(), hidden_states, targets[1:])
    with pytest.raises(ValueError, match=r"\(23,\) and \(1, 23, 6\)"):
        loss_in_pieces(make_head(), hidden_states[None], targets)


@pytest.mark.parametrize("kind", ["labels", "shift_labels", "another ignore_index"])
def test_causal_lm_loss_equals_the_loss_of_whole_logits(in_double, kind, monkeypatch):
    monkeypatch.setattr(module, "_BYTES_OF_A_PIECE", 5 * 8 * VOCABULARY)
    head, (hidden_states, targets) = make_head(), make_inputs(positions=24)
    labels = targets.view(2, 12)
    kwargs = dict(labels=labels, num_items_in_batch=31, return_dict=True)
    if kind == "shift_labels":
        kwargs |= dict(labels=None, shift_labels=labels)
    elif kind == "another ignore_index":
        kwargs |= dict(labels=labels.where(labels != -100, 3), ignore_index=3)

    def whole(head, hidden_states, targets):
        return ForCausalLMLoss(head(hidden_states.view(2, 12, WIDTH)), vocab_size=VOCABULARY, **kwargs)

    def pieces(head, hidden_states, targets):
        return causal_lm_loss(head, hidden_states.view(2, 12, WIDTH), **kwargs)

    expected = gradients(whole, head, hidden_states, targets)
    assert_close(gradients(pieces, head, hidden_states, targets), expected, **EXACT)
    assert expected["hidden_states"][:11].any() and expected["hidden_states"][12:23].any()


@pytest.fixture
def causal_lm():
    return Mamba2ForCausalLM(tiny_text_config(num_hidden_layers=1, tie_word_embeddings=False))


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({}, True),
        ({"num_items_in_batch": 3, "ignore_index": 2}, True),
        ({"shift_labels": torch.zeros(1, 2)}, True),
        ({"return_dict": True, "output_attentions": False}, True),
        ({"label_smoothing": None}, True),
        ({"label_smoothing": 0.1}, False),
    ],
    ids=str,
)
def test_only_known_keyword_arguments_allow_pieces(causal_lm, kwargs, expected):
    assert can_be_in_pieces(causal_lm, kwargs) is expected


def test_hooks_and_replaced_weights_of_the_head_forbid_pieces(causal_lm):
    assert can_be_in_pieces(causal_lm, {})
    hook = causal_lm.lm_head.register_forward_hook(lambda *args: None)
    assert not can_be_in_pieces(causal_lm, {})
    causal_lm.lm_head.ds_id = 0  # now the hook counts as DeepSpeed's
    assert can_be_in_pieces(causal_lm, {})
    hook.remove()
    del causal_lm.lm_head.ds_id

    adapted = inject_adapter_in_model(LoraConfig(target_modules=["lm_head"]), copy.deepcopy(causal_lm))
    assert can_be_in_pieces(adapted, {})
    adapted.lm_head.base_layer.ds_id = 1
    assert not can_be_in_pieces(adapted, {})

    weight = causal_lm.lm_head.weight.detach()
    del causal_lm.lm_head.weight
    causal_lm.lm_head.weight = weight  # replicas of DataParallel have such tensors
    assert not can_be_in_pieces(causal_lm, {})


def test_custom_loss_function_forbids_pieces(causal_lm):
    causal_lm.loss_function = lambda **kwargs: None
    assert not can_be_in_pieces(causal_lm, {})
