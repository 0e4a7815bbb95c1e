"""The grid against the plain run in float64: losses, states, gradients, kept memory and recomputation."""

import copy
import dataclasses
import weakref
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from comparison import assert_same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import WIDTH, lora, random_embeddings, tiny_mamba2
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, Mamba2ForCausalLM

from transformers_ma2mba.gradient_checkpointing import grid as checkpoint_grid
from transformers_ma2mba.gradient_checkpointing.cell import Border, Cell, RestoredBlock, UpperEnd
from transformers_ma2mba.gradient_checkpointing.multi_axis import enable_multi_axis_checkpointing
from transformers_ma2mba.gradient_checkpointing.plan import plan_checkpoints
from transformers_ma2mba.mamba2.recurrent_state import LayerState, carried_cache, read_state, write_state

ORDERS = ["layer-major", "sequence-major"]
LAYERS = 5
pytestmark = pytest.mark.usefixtures("in_double")
trunk = partial(tiny_mamba2, num_hidden_layers=LAYERS)


def checkpointed(model, layer_interval, sequence_interval, order="layer-major", state_interval=1, **options):
    """A copy of the model with MA-GC."""
    grid = enable_multi_axis_checkpointing(
        copy.deepcopy(model), layer_interval, sequence_interval, order=order, **options
    )
    return keeping_states(grid, state_interval)


def keeping_states(grid, state_interval):
    """Set the interval, in segments, between borders whose states are kept.

    Otherwise only the planner chooses this interval, for a memory budget.
    """
    settings = grid._multi_axis_checkpointing
    plan = settings.plan
    settings.plan = lambda *args, **kwargs: dataclasses.replace(plan(*args, **kwargs), state_interval=state_interval)
    return grid


def random_states(model, batch_size, dtype=torch.float64, requires_grad=True) -> Cache:
    """A cache with random states, in place of the states after a prefix."""
    config = model.config
    conv_dim = config.expand * config.hidden_size + 2 * config.n_groups * config.state_size
    cache = carried_cache(config.num_hidden_layers)
    for layer in cache.layers:
        conv = torch.randn(batch_size, conv_dim, config.conv_kernel, dtype=dtype)
        recurrent = torch.randn(batch_size, config.num_heads, config.head_dim, config.state_size, dtype=dtype)
        write_state(layer, LayerState(conv.requires_grad_(requires_grad), recurrent.requires_grad_(requires_grad)))
    return cache


def step(model, inputs, mask=None, with_state=False, input_gradient=True, seed=0):
    """Loss, outputs and gradients of a step whose loss gives each element of outputs and final states its own weight.

    Args:
        inputs: embeddings or token ids.
    """
    model.zero_grad()
    if inputs.is_floating_point():
        inputs = inputs.clone().requires_grad_(input_gradient)
    torch.manual_seed(seed)
    cache = random_states(model, len(inputs), next(model.parameters()).dtype) if with_state else None
    layers = cache.layers if with_state else []
    initial = [tensor for layer in layers for tensor in read_state(layer)]
    name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
    outputs = model(**{name: inputs}, attention_mask=mask, cache_params=cache)
    output = outputs.last_hidden_state
    final = [tensor for layer in layers for tensor in read_state(layer)]
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (tensor * torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)).sum()
        for tensor in [output, *final]
    )
    if loss.requires_grad:
        loss.backward()
    results = {"loss": loss.detach(), "output": output.detach(), "inputs": inputs.grad}
    results |= {f"initial state {index}": tensor.grad for index, tensor in enumerate(initial)}
    results |= {f"final state {index}": tensor.detach() for index, tensor in enumerate(final)}
    return results | {name: parameter.grad for name, parameter in model.named_parameters()}


def left_padding(lengths, total):
    """The attention mask of samples that are padded on the left."""
    return torch.stack([(torch.arange(total) >= total - length).long() for length in lengths])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layer_interval", [1, 2, 5, 9])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 17, 31])
def test_gradients_equal_the_plain_run(length, layer_interval, order):
    model = trunk()
    embeds = random_embeddings(length)
    expected = step(model, embeds)
    for sequence_interval in (1, 3, 8, 100):
        assert_same(step(checkpointed(model, layer_interval, sequence_interval, order), embeds), expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("length", [2, 7, 8, 9, 31])
def test_gradients_pass_through_initial_and_final_states(length, order):
    model = trunk()
    embeds = random_embeddings(length)
    expected = step(model, embeds, with_state=True)
    for layer_interval, sequence_interval in [(1, 4), (2, 3), (5, 8), (9, 100)]:
        actual = step(checkpointed(model, layer_interval, sequence_interval, order), embeds, with_state=True)
        assert_same(actual, expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("state_interval", [2, 3, 7, 100])
@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "continued"])
def test_discarded_states_are_recomputed(with_state, state_interval, order):
    model = trunk()
    for length in (7, 9, 31):
        embeds = random_embeddings(length)
        expected = step(model, embeds, with_state=with_state)
        for layer_interval, sequence_interval in [(1, 2), (2, 4), (9, 3)]:
            grid = checkpointed(model, layer_interval, sequence_interval, order, state_interval)
            assert_same(step(grid, embeds, with_state=with_state), expected)


@pytest.mark.parametrize("state_interval", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_recomputed_hooks_accept_differentiable_initial_states(order, state_interval):
    model = trunk()
    embeds = random_embeddings(9)
    expected = step(model, embeds, with_state=True)
    grid = checkpointed(model, 2, 4, order, state_interval)
    grid.layers[0].register_forward_hook(lambda *_: None)
    assert_same(step(grid, embeds, with_state=True), expected)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("order", ORDERS)
def test_grid_looks_up_embeddings_by_segment(order, trained):
    model = trunk()
    model.embeddings.weight.requires_grad_(trained)
    token_ids = torch.randint(0, 50, (2, 23))  # some tokens occur more than once, in different segments
    mask = left_padding([23, 17], 23)
    expected = step(model, token_ids, mask)
    for state_interval in (1, 2):
        grid = checkpointed(model, 2, 4, order, state_interval)
        lengths = []
        forward = nn.functional.embedding

        def look_up(ids, *args, forward=forward, lengths=lengths, **kwargs):
            lengths.append(ids.shape[1])
            return forward(ids, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.functional, "embedding", look_up)
            assert_same(step(grid, token_ids, mask), expected)
        assert max(lengths) == 4


@pytest.mark.parametrize("order", ORDERS)
def test_grid_keeps_token_ids_instead_of_their_embeddings(order):
    model = checkpointed(trunk(residual_in_fp32=False), LAYERS, 8, order)
    kept = list(saved_by(model(input_ids=torch.randint(0, 50, (1, 40))).last_hidden_state))
    assert [tuple(tensor.shape) for tensor in kept if tensor.shape[:2] == (1, 40)] == [(1, 40)]


def test_hooks_on_embeddings_get_the_whole_sequence():
    """PEFT uses such a hook to require gradients of the inputs, and adapters add to its output."""
    model = trunk()
    model.embeddings.register_forward_hook(lambda module, inputs, output: output * 2)
    token_ids = torch.randint(0, 50, (2, 23))
    expected = step(model, token_ids)
    for order in ORDERS:
        grid = checkpointed(model, 2, 4, order)
        shapes = []
        grid.embeddings.register_forward_hook(lambda *args, shapes=shapes: shapes.append(args[2].shape[1]))
        assert_same(step(grid, token_ids), expected)
        assert shapes == [23]


@pytest.mark.parametrize("order", ORDERS)
def test_tied_embeddings_get_the_gradients_of_both_uses(order):
    model = tiny_mamba2(Mamba2ForCausalLM, num_hidden_layers=3)
    token_ids = torch.randint(0, 50, (2, 19))
    gradients = []
    for grid in (model, checkpointed(model.backbone, 2, 4, order)):
        if grid is not model:
            model.backbone = grid
            model.lm_head.weight = grid.embeddings.weight
        model.zero_grad()
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    expected, actual = gradients
    assert_same(actual, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_left_padded_batch_equals_the_plain_run(order):
    model = trunk()
    embeds = random_embeddings(23, batch_size=4)
    mask = left_padding([23, 20, 11, 1], 23)
    expected = step(model, embeds, mask)
    assert_same(step(checkpointed(model, 2, 4, order), embeds, mask), expected)


FROZEN = {
    "everything": "",
    "the lowest layers": ("layers.0", "layers.1", "layers.2"),
    "the highest layers": ("layers.3", "layers.4", "norm_f"),
    "a middle layer": ("layers.2",),
    "all but the norms": ("embeddings", *(f"layers.{index}.mixer" for index in range(LAYERS))),
}


@pytest.mark.parametrize("input_gradient", [True, False], ids=["inputs trained", "inputs fixed"])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("order", ORDERS)
def test_frozen_parameters_get_no_gradient_and_others_equal_the_plain_run(order, frozen, input_gradient):
    model = trunk()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN[frozen]))
    embeds = random_embeddings(11)
    expected = step(model, embeds, input_gradient=input_gradient)
    assert_same(step(checkpointed(model, 2, 4, order), embeds, input_gradient=input_gradient), expected)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_random_cases_equal_the_plain_run(data):
    draw = data.draw
    layers = draw(st.integers(1, 4), "layers")
    length = draw(st.integers(1, 40), "length")
    batch_size = draw(st.integers(1, 3), "batch size")
    with_state = length > 1 and draw(st.booleans(), "state")
    groups = draw(st.sampled_from([1, 2]), "groups")
    model = trunk(num_hidden_layers=layers, n_groups=groups, chunk_size=draw(st.sampled_from([4, 8])))
    for parameter in model.parameters():
        parameter.requires_grad_(draw(st.integers(0, 3)) > 0)
    mask = None
    if not with_state and draw(st.booleans(), "padding"):
        mask = left_padding([draw(st.integers(1, length)) for _ in range(batch_size)], length)
    embeds = random_embeddings(length, batch_size=batch_size)
    options = dict(with_state=with_state, input_gradient=draw(st.booleans(), "input gradient"))
    grid = checkpointed(
        model,
        draw(st.integers(1, layers + 1), "layer interval"),
        draw(st.integers(1, length + 2), "sequence interval"),
        draw(st.sampled_from(ORDERS), "order"),
        draw(st.integers(1, 5), "state interval"),
        offload=draw(st.booleans(), "offload"),
    )
    inputs = torch.randint(0, 50, (batch_size, length)) if draw(st.booleans(), "token ids") else embeds
    assert_same(step(grid, inputs, mask, **options), step(model, inputs, mask, **options))


class KeptWhole:
    """A replacement of the checkpointing Function: the same forward pass under plain autograd."""

    @staticmethod
    def apply(walk, hidden_states, *tensors):
        states = walk.initial_states(())
        walk.random.restore(walk.first_segment.random_state)
        with walk.as_in_forward():
            reader = checkpoint_grid.SegmentReader(hidden_states, walk.segments, walk.offloader)
            after = walk.pass_segment(0, Border(reader.take(0), states))
            walk.first_segment = walk.first_segment._replace(reader=reader, after=after)
            output, final = walk.run(hidden_states.shape[:2], states)
        return output, *(tensor for state in final for tensor in state if walk.returns_states)


def with_dropout():
    return lora(trunk(), lora_dropout=0.4)


@pytest.mark.parametrize("state_interval", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_backward_repeats_the_dropout_masks_of_adapters(order, state_interval, monkeypatch):
    embeds = random_embeddings()
    grid = enable_multi_axis_checkpointing(with_dropout(), 2, 4, order=order)
    keeping_states(grid.base_model.model, state_interval)
    actual = step(grid, embeds)
    monkeypatch.setattr(checkpoint_grid, "_MultiAxisCheckpoint", KeptWhole)
    assert_same(actual, step(grid, embeds))


def test_dropout_in_a_single_cell_equals_the_plain_run():
    embeds = random_embeddings()
    plain = with_dropout()
    assert_same(step(checkpointed(plain, LAYERS, 19), embeds), step(plain, embeds))


@pytest.mark.parametrize("order", ORDERS)
def test_backward_does_not_change_the_random_state(order):
    grid = enable_multi_axis_checkpointing(with_dropout(), 2, 4, order=order)
    output = grid(inputs_embeds=random_embeddings(batch_size=1)).last_hidden_state
    before = torch.get_rng_state()
    output.sum().backward()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("order", ORDERS)
def test_backward_recomputes_under_autocast(order, monkeypatch):
    monkeypatch.undo()  # of `in_double`: this test needs float32
    model = trunk(dtype=torch.float32)
    embeds = random_embeddings(dtype=torch.float32)
    grid = checkpointed(model, 2, 4, order)

    def autocast_step(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return step(model, embeds)

    exact, plain, actual = step(model, embeds), autocast_step(model), autocast_step(grid)
    assert actual["output"].dtype == plain["output"].dtype

    def mean_error(results):
        errors = [
            (results[name] - tensor).norm() / tensor.norm() for name, tensor in exact.items() if tensor is not None
        ]
        return sum(errors) / len(errors)

    assert 0 < mean_error(actual) < 1.3 * mean_error(plain)  # also bfloat16, with different rounding
    monkeypatch.setattr(checkpoint_grid, "_MultiAxisCheckpoint", KeptWhole)
    assert_same(actual, autocast_step(grid), tolerance=1e-5)  # the same rounding


def test_autocast_caches_no_weights_cast_without_gradient():
    model = trunk(dtype=torch.float32)
    embeds = random_embeddings(8, batch_size=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        checkpointed_model = enable_multi_axis_checkpointing(model, 2, 4)
        checkpointed_model(inputs_embeds=embeds)
        type(model).forward(model, inputs_embeds=embeds).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None for parameter in model.layers.parameters())


@pytest.mark.parametrize("order", ORDERS)
def test_parameter_hooks_get_one_gradient(order):
    grid = checkpointed(trunk(), 2, 4, order)
    seen = {name: [] for name, _ in grid.layers.named_parameters()}
    for name, parameter in grid.layers.named_parameters():
        parameter.register_hook(lambda gradient, name=name: seen[name].append("gradient"))
        parameter.register_post_accumulate_grad_hook(lambda parameter, name=name: seen[name].append("accumulated"))
    grid(inputs_embeds=random_embeddings(batch_size=1)).last_hidden_state.sum().backward()
    assert all(events == ["gradient", "accumulated"] for events in seen.values())


def test_parameter_shared_by_layers_gets_the_whole_gradient():
    model = trunk()
    model.layers[3].mixer.in_proj = model.layers[0].mixer.in_proj
    embeds = random_embeddings()
    expected = step(model, embeds)
    for order in ORDERS:
        assert_same(step(checkpointed(model, 2, 4, order), embeds), expected)


def test_second_derivatives_are_refused():
    grid = checkpointed(trunk(), 2, 4)
    embeds = random_embeddings(9, batch_size=1).requires_grad_()
    output = grid(inputs_embeds=embeds).last_hidden_state
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(output.sum(), embeds, create_graph=True)


def test_backward_repeats_with_retain_graph():
    grid = checkpointed(trunk(), 2, 4)
    loss = grid(inputs_embeds=random_embeddings(9, batch_size=1)).last_hidden_state.sum()
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in grid.layers.parameters()]
    loss.backward()
    for parameter, gradient in zip(grid.layers.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


def test_single_token_with_a_state_is_refused():
    grid = checkpointed(trunk(), 2, 4)
    with pytest.raises(ValueError, match="single token"):
        step(grid, random_embeddings(1, batch_size=1), with_state=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kept", ["some", "first", "none"])
def test_positions_to_keep_selects_rows_and_their_gradients(order, kept):
    model = trunk()
    embeds = random_embeddings(batch_size=3)
    generator = torch.Generator().manual_seed(0)
    mask = {
        "some": torch.rand(3, 19, generator=generator) < 0.3,
        "first": torch.arange(19).expand(3, -1) < 2,
        "none": torch.zeros(3, 19, dtype=torch.bool),
    }[kept]
    results = []
    for grid in (model, checkpointed(model, 2, 4, order)):
        grid.zero_grad()
        inputs = embeds.clone().requires_grad_()
        if grid is model:
            rows = grid(inputs_embeds=inputs).last_hidden_state[mask]
        else:
            rows = grid(inputs_embeds=inputs, positions_to_keep=mask).last_hidden_state
        (rows * torch.arange(1, rows.numel() + 1).view_as(rows)).sum().backward()
        results.append({"rows": rows.detach(), "inputs": inputs.grad})
        results[-1] |= {name: parameter.grad for name, parameter in grid.named_parameters()}
    expected, actual = results
    assert_same(actual, expected)


def saved_by(output):
    """The tensors that the graph of `output` keeps."""
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield from getattr(node, "saved_tensors", ())
        nodes.extend(function for function, _ in node.next_functions)


@pytest.mark.parametrize("order", ORDERS)
def test_kept_tensors_own_their_storage(order):
    model = checkpointed(trunk(residual_in_fp32=False), 2, 8, order)
    config, length = model.config, 40
    embeds = random_embeddings(length).requires_grad_()
    kept = list(saved_by(model(inputs_embeds=embeds).last_hidden_state))
    for tensor in kept:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    conv_dim = config.expand * WIDTH + 2 * config.n_groups * config.state_size
    state = conv_dim * config.conv_kernel + config.num_heads * config.head_dim * config.state_size
    rows = 3 if order == "layer-major" else 1
    assert sum(tensor.numel() for tensor in kept) == 2 * (rows * length * WIDTH + 4 * LAYERS * state)
    keeping_states(model, 3)
    kept = list(saved_by(model(inputs_embeds=embeds).last_hidden_state))
    assert sum(tensor.numel() for tensor in kept) == 2 * (rows * length * WIDTH + 1 * LAYERS * state)


# Forward passes of each layer per segment, in forward and backward together, for intervals of 1, 2 and all 5 layers.
RUNS = {"layer-major": [[2] * 5] * 3, "sequence-major": [[3, 3, 3, 3, 2], [3, 3, 3, 3, 2], [2] * 5]}


@pytest.mark.parametrize("case", range(3), ids=["cells of 1 layer", "cells of 2 layers", "whole columns"])
@pytest.mark.parametrize("order", ORDERS)
def test_each_layer_runs_as_often_as_the_order_requires(order, case):
    model = checkpointed(trunk(), [1, 2, 5][case], 8, order)
    runs = [0] * LAYERS
    for index, layer in enumerate(model.layers):

        def count(*_, index=index):
            runs[index] += 1

        layer.mixer.register_forward_pre_hook(count)
    embeds = random_embeddings(40, batch_size=1)
    model(inputs_embeds=embeds).last_hidden_state.sum().backward()
    assert runs == [5 * times for times in RUNS[order][case]]
    keeping_states(model, 3)  # runs 3 of 5 segments once more: all but the last of segments 0 to 2 and 3 to 4
    model(inputs_embeds=embeds).last_hidden_state.sum().backward()
    assert runs == [2 * 5 * times + 3 for times in RUNS[order][case]]


class Held:
    """A tensor that autograd keeps. The class counts the elements of all tensors kept now, and their peak."""

    now = peak = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Held.now += tensor.numel()
        Held.peak = max(Held.peak, Held.now)

    def __del__(self):
        Held.now -= self.tensor.numel()


@pytest.mark.parametrize("order", ORDERS)
def test_backward_memory_does_not_grow_with_the_length(order):
    peaks = []
    for length in (16, 32, 160):
        model = checkpointed(trunk(), 2, 8, order)
        loss = model(inputs_embeds=random_embeddings(length, batch_size=1)).last_hidden_state.sum()
        Held.now = Held.peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            loss.backward()
        peaks.append(Held.peak)
    assert 0 < peaks[0] == peaks[1] == peaks[2]


def test_hidden_states_of_a_segment_are_dropped_before_the_next(monkeypatch):
    outputs, gradients, borders = [], [], []

    def run(self, segment, border, original=Cell.run):
        assert not any(reference() is not None for reference in outputs + gradients)
        return original(self, segment, border)

    def run_end(self, segment, border, original=UpperEnd.run):
        after = original(self, segment, border)
        outputs.append(weakref.ref(after.hidden_states))
        return after

    def backward(self, gradient, sums, original=RestoredBlock.backward):
        assert not any(reference() is not None for reference in borders)
        before = original(self, gradient, sums)
        kept, tensor = (borders, self.before) if isinstance(self.block, UpperEnd) else (gradients, before)
        kept.append(weakref.ref(tensor.hidden_states))
        return before

    monkeypatch.setattr(Cell, "run", run)
    monkeypatch.setattr(UpperEnd, "run", run_end)
    monkeypatch.setattr(RestoredBlock, "backward", backward)
    step(checkpointed(trunk(), LAYERS, 4), random_embeddings(16))
    assert len(borders) == len(gradients) == 4


def test_stock_checkpointing_does_not_restore_layers_twice():
    model = checkpointed(trunk(), 2, 8)
    plain = trunk()
    embeds = random_embeddings(20, batch_size=1)
    expected = step(plain, embeds)
    model.activation_checkpointing_enable()  # the stock method, which sets a flag on each layer
    assert model.is_activation_checkpointing
    calls = []
    model.layers[0].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_same(step(model, embeds), expected)
    assert len(calls) == 2 * 3


def test_bfloat16_gradients_keep_their_precision_over_many_cells(monkeypatch):
    monkeypatch.undo()  # of `in_double`: this test needs float32
    model = trunk(num_hidden_layers=1, dtype=torch.float32)
    embeds = random_embeddings(600, batch_size=1, dtype=torch.float32)
    expected = step(model, embeds)
    half = step(checkpointed(model.to(torch.bfloat16), 1, 2), embeds.bfloat16())
    plain = step(model, embeds.bfloat16())
    name = "layers.0.mixer.in_proj.weight"

    def error(results):
        return ((results[name].float() - expected[name]).norm() / expected[name].norm()).item()

    assert error(half) < 1.5 * error(plain)


def test_engine_runs_layers_without_their_model():
    model = trunk()
    layers = nn.ModuleList(model.layers)
    embeds = random_embeddings(12, batch_size=1)
    plan = plan_checkpoints(model.config, 12, layer_interval=2, sequence_interval=4)
    output = checkpoint_grid.run_checkpointed(list(layers), embeds, plan, final_norm=model.norm_f)
    torch.testing.assert_close(output, model(inputs_embeds=embeds).last_hidden_state, rtol=1e-12, atol=1e-12)


def test_fsdp1_is_refused():
    model = checkpointed(trunk(), 2, 4)
    model.layers[1]._is_fsdp_managed_module = True  # FSDP1 sets this on modules inside
    model.layers[1].parameters = lambda: iter(())  # FSDP1 replaces parameters by views of one flat tensor
    with pytest.raises(RuntimeError, match="fsdp_version: 2"):
        model(inputs_embeds=random_embeddings(8, batch_size=1))


def pruned(model):
    model.layers = model.layers[1::2]
    return model


def reversed_layers(model):
    model.layers = nn.ModuleList(reversed(model.layers))
    return model


def doubled(model):
    """Two copied layers follow their originals, with the same `layer_idx`."""
    model.layers = nn.ModuleList([*model.layers[:3], *copy.deepcopy(model.layers[1:3]), *model.layers[3:]])
    return model


def repeated(model):
    """One layer stands in two places."""
    model.layers.append(model.layers[0])
    return model


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("change", [pruned, reversed_layers, doubled, repeated])
def test_changed_layer_lists_equal_the_plain_run(change, order):
    model = change(trunk())
    embeds = random_embeddings()
    expected = step(model, embeds)
    for layer_interval in (1, 2, 9):
        assert_same(step(checkpointed(model, layer_interval, 4, order), embeds), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_states_of_a_pruned_model_stand_under_layer_idx(order):
    """The cache has as many layers as the model had before it was pruned."""
    model = pruned(trunk())
    embeds = random_embeddings()
    expected = step(model, embeds, with_state=True)
    assert any(tensor is not None for name, tensor in expected.items() if name.startswith("initial state"))
    assert_same(step(checkpointed(model, 1, 4, order), embeds, with_state=True), expected)


def test_states_without_a_cache_layer_of_their_own_are_refused():
    embeds = random_embeddings()
    with pytest.raises(ValueError, match=r"layers\.1 and layers\.3 both keep their state under layer_idx 1 .* own"):
        step(checkpointed(doubled(trunk()), 2, 4), embeds, with_state=True)
    model = checkpointed(pruned(trunk()), 2, 4)
    model.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match=r"layers\.1 keeps its state under layer_idx 3 .* ends at 1"):
        step(model, embeds, with_state=True)


@contextmanager
def each_tensor_once():
    """Allow each tensor that autograd keeps to be unpacked only once."""
    given = []

    def unpack(packed):
        assert packed, "unpacked twice"
        given.append(None)
        return packed.pop()

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: [tensor], unpack):
        yield given


@pytest.mark.parametrize("order", ORDERS)
def test_backward_unpacks_kept_tensors_once(order):
    model = checkpointed(trunk(), 2, 4, order)
    embeds = random_embeddings()
    expected = step(model, embeds, left_padding([19, 9], 19), with_state=True)
    with each_tensor_once() as given:
        assert_same(step(model, embeds, left_padding([19, 9], 19), with_state=True), expected, tolerance=0)
    assert given


@pytest.mark.parametrize("order", ORDERS)
def test_grid_works_inside_pytorch_checkpoints_and_save_on_cpu(order):
    model = trunk()
    embeds = random_embeddings()
    expected = step(model, embeds)
    grid = checkpointed(model, 2, 4, order)
    forward = grid.forward
    with torch.autograd.graph.save_on_cpu():
        assert_same(step(grid, embeds), expected)
    grid.forward = lambda **inputs: checkpoint(forward, use_reentrant=False, **inputs)
    assert_same(step(grid, embeds), expected)
