"""The grid against the plain run in float64: losses, states and gradients; and that it keeps and computes no more than
it should."""

import copy
import dataclasses
import warnings
from contextlib import contextmanager

import pytest
import torch
from comparison import assert_same
from double_precision import compute_in_double
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import tiny_text_config
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, Mamba2ForCausalLM, Mamba2Model

from transformers_ma2mba import checkpoint_grid
from transformers_ma2mba.cell import Border
from transformers_ma2mba.checkpoint_plan import plan_checkpoints
from transformers_ma2mba.multi_axis_checkpointing import enable_multi_axis_checkpointing
from transformers_ma2mba.recurrent_state import LayerState, carried_cache, read_state, write_state

ORDERS = ["layer-major", "sequence-major"]
LAYERS = 5
WIDTH = 32


@pytest.fixture(autouse=True)
def double(monkeypatch):
    compute_in_double(monkeypatch)


def trunk(num_hidden_layers=LAYERS, dtype=torch.float64, seed=0, **options) -> Mamba2Model:
    torch.manual_seed(seed)
    config = tiny_text_config(num_hidden_layers=num_hidden_layers, **options)
    return Mamba2Model(config).to(dtype).train()


def checkpointed(model, layer_interval, sequence_interval, order="layer-major", state_interval=1, **options):
    grid = enable_multi_axis_checkpointing(
        copy.deepcopy(model), layer_interval, sequence_interval, order=order, **options
    )
    return keeping_states(grid, state_interval)


def keeping_states(grid, state_interval):
    """Has every how manieth border its states kept, which otherwise the planner alone decides, for a memory budget."""
    settings = grid._multi_axis_checkpointing
    plan = settings.plan
    settings.plan = lambda *args, **kwargs: dataclasses.replace(plan(*args, **kwargs), state_interval=state_interval)
    return grid


def random_states(model, batch_size, dtype=torch.float64, requires_grad=True) -> Cache:
    """A state to continue, as a prefix might have left it."""
    config = model.config
    conv_dim = config.expand * config.hidden_size + 2 * config.n_groups * config.state_size
    cache = carried_cache(config.num_hidden_layers)
    for layer in cache.layers:
        conv = torch.randn(batch_size, conv_dim, config.conv_kernel, dtype=dtype)
        recurrent = torch.randn(batch_size, config.num_heads, config.head_dim, config.state_size, dtype=dtype)
        write_state(layer, LayerState(conv.requires_grad_(requires_grad), recurrent.requires_grad_(requires_grad)))
    return cache


def step(model, inputs, mask=None, with_state=False, input_gradient=True, seed=0):
    """One training step whose loss weighs every output, and every number of the final state, in its own way.

    `inputs` are embeddings or token ids.
    """
    model.zero_grad()
    if inputs.is_floating_point():
        inputs = inputs.clone().requires_grad_(input_gradient)
    torch.manual_seed(seed)
    cache = random_states(model, len(inputs), next(model.parameters()).dtype) if with_state else None
    initial = [tensor for layer in cache.layers for tensor in read_state(layer)] if with_state else []
    name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
    outputs = model(**{name: inputs}, attention_mask=mask, cache_params=cache)
    output = outputs.last_hidden_state
    final = [tensor for layer in cache.layers for tensor in read_state(layer)] if with_state else []
    generator = torch.Generator().manual_seed(1)
    weighted = [
        (tensor * torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)).sum()
        for tensor in [output, *final]
    ]
    loss = sum(weighted)
    if loss.requires_grad:
        loss.backward()
    results = {"loss": loss.detach(), "output": output.detach(), "inputs": inputs.grad}
    results |= {f"initial state {index}": tensor.grad for index, tensor in enumerate(initial)}
    results |= {f"final state {index}": tensor.detach() for index, tensor in enumerate(final)}
    return results | {name: parameter.grad for name, parameter in model.named_parameters()}


def left_padding(lengths, total):
    return torch.stack([(torch.arange(total) >= total - length).long() for length in lengths])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layer_interval", [1, 2, 5, 9])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 17, 31])
def test_gradients_are_those_of_the_plain_run(length, layer_interval, order):
    model = trunk()
    embeds = torch.randn(2, length, WIDTH, dtype=torch.float64)
    expected = step(model, embeds)
    for sequence_interval in (1, 3, 8, 100):
        assert_same(step(checkpointed(model, layer_interval, sequence_interval, order), embeds), expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("length", [2, 7, 8, 9, 31])
def test_states_enter_and_leave_with_their_gradients(length, order):
    model = trunk()
    embeds = torch.randn(2, length, WIDTH, dtype=torch.float64)
    expected = step(model, embeds, with_state=True)
    for layer_interval, sequence_interval in [(1, 4), (2, 3), (5, 8), (9, 100)]:
        actual = step(checkpointed(model, layer_interval, sequence_interval, order), embeds, with_state=True)
        assert_same(actual, expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("state_interval", [2, 3, 7, 100])
@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "continued"])
def test_states_that_are_not_kept_are_made_again(with_state, state_interval, order):
    model = trunk()
    for length in (7, 9, 31):
        embeds = torch.randn(2, length, WIDTH, dtype=torch.float64)
        expected = step(model, embeds, with_state=with_state)
        for layer_interval, sequence_interval in [(1, 2), (2, 4), (9, 3)]:
            grid = checkpointed(model, layer_interval, sequence_interval, order, state_interval)
            assert_same(step(grid, embeds, with_state=with_state), expected)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("order", ORDERS)
def test_embeddings_are_looked_up_in_the_grid(order, trained):
    model = trunk()
    model.embeddings.weight.requires_grad_(trained)
    token_ids = torch.randint(0, 50, (2, 23))  # some come several times, in several segments
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
def test_of_token_ids_no_rows_are_kept(order):
    model = checkpointed(trunk(residual_in_fp32=False), LAYERS, 8, order)
    kept = list(saved_by(model(input_ids=torch.randint(0, 50, (1, 40))).last_hidden_state))
    assert [tuple(tensor.shape) for tensor in kept if tensor.shape[:2] == (1, 40)] == [(1, 40)]


def test_hooks_on_the_embeddings_see_them_whole():
    """PEFT makes inputs want gradients by such a hook, and adapters add to what comes out."""
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
def test_embeddings_that_are_the_head_too(order):
    torch.manual_seed(0)
    config = tiny_text_config(num_hidden_layers=3)
    model = Mamba2ForCausalLM(config).double().train()
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
def test_left_padding_in_a_batch(order):
    model = trunk()
    embeds = torch.randn(4, 23, WIDTH, dtype=torch.float64)
    mask = left_padding([23, 20, 11, 1], 23)
    expected = step(model, embeds, mask)
    assert_same(step(checkpointed(model, 2, 4, order), embeds, mask), expected)


FROZEN = {
    "everything": "",
    "the lowest layers": ("layers.0", "layers.1", "layers.2"),
    "the highest layers": ("layers.3", "layers.4", "norm_f"),
    "a layer between": ("layers.2",),
    "all but the norms": ("embeddings", *(f"layers.{index}.mixer" for index in range(LAYERS))),
}


@pytest.mark.parametrize("input_gradient", [True, False], ids=["inputs trained", "inputs fixed"])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("order", ORDERS)
def test_frozen_parameters(order, frozen, input_gradient):
    model = trunk()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN[frozen]))
    embeds = torch.randn(2, 11, WIDTH, dtype=torch.float64)
    expected = step(model, embeds, input_gradient=input_gradient)
    assert_same(step(checkpointed(model, 2, 4, order), embeds, input_gradient=input_gradient), expected)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_drawn_at_random(data):
    draw = data.draw
    layers = draw(st.integers(1, 4), "layers")
    length = draw(st.integers(1, 40), "length")
    batch_size = draw(st.integers(1, 3), "batch size")
    with_state = length > 1 and draw(st.booleans(), "state")
    model = trunk(layers, n_groups=draw(st.sampled_from([1, 2]), "groups"), chunk_size=draw(st.sampled_from([4, 8])))
    for parameter in model.parameters():
        parameter.requires_grad_(draw(st.integers(0, 3)) > 0)
    mask = None
    if not with_state and draw(st.booleans(), "padding"):
        mask = left_padding([draw(st.integers(1, length)) for _ in range(batch_size)], length)
    embeds = torch.randn(batch_size, length, WIDTH, dtype=torch.float64)
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
    """Stands in for the checkpointing Function: the same walk over the same segments, all of it left to autograd."""

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


def lora(model):
    torch.manual_seed(3)
    config = LoraConfig(r=3, lora_dropout=0.4, target_modules=["in_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks a stock model by a name that is about to go
        return get_peft_model(model, config).to(torch.float64)


@pytest.mark.parametrize("state_interval", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_dropout_of_adapters_draws_the_same_masks_again(order, state_interval, monkeypatch):
    embeds = torch.randn(2, 19, WIDTH, dtype=torch.float64)
    grid = enable_multi_axis_checkpointing(lora(trunk()), 2, 4, order=order)
    keeping_states(grid.base_model.model, state_interval)
    actual = step(grid, embeds)
    monkeypatch.setattr(checkpoint_grid, "_MultiAxisCheckpoint", KeptWhole)
    assert_same(actual, step(grid, embeds))


def test_with_a_single_cell_dropout_is_that_of_the_plain_run():
    embeds = torch.randn(2, 19, WIDTH, dtype=torch.float64)
    plain = lora(trunk())
    assert_same(step(checkpointed(plain, LAYERS, 19), embeds), step(plain, embeds))


@pytest.mark.parametrize("order", ORDERS)
def test_backward_leaves_the_random_state_alone(order):
    grid = enable_multi_axis_checkpointing(lora(trunk()), 2, 4, order=order)
    output = grid(inputs_embeds=torch.randn(1, 19, WIDTH, dtype=torch.float64)).last_hidden_state
    before = torch.get_rng_state()
    output.sum().backward()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("order", ORDERS)
def test_autocast_holds_in_backward_too(order, monkeypatch):
    monkeypatch.undo()  # float32 is meant here
    model = trunk(dtype=torch.float32)
    embeds = torch.randn(2, 19, WIDTH)
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

    assert 0 < mean_error(actual) < 1.3 * mean_error(plain)  # bf16 too, rounded in other places
    monkeypatch.setattr(checkpoint_grid, "_MultiAxisCheckpoint", KeptWhole)
    assert_same(actual, autocast_step(grid), tolerance=1e-5)  # rounded in the same places


def test_autocast_does_not_remember_weights_cast_without_gradient():
    model = trunk(dtype=torch.float32)
    embeds = torch.randn(1, 8, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        checkpointed_model = enable_multi_axis_checkpointing(model, 2, 4)
        checkpointed_model(inputs_embeds=embeds)
        type(model).forward(model, inputs_embeds=embeds).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None for parameter in model.layers.parameters())


@pytest.mark.parametrize("order", ORDERS)
def test_hooks_of_parameters_see_one_gradient(order):
    grid = checkpointed(trunk(), 2, 4, order)
    seen = {name: [] for name, _ in grid.layers.named_parameters()}
    for name, parameter in grid.layers.named_parameters():
        parameter.register_hook(lambda gradient, name=name: seen[name].append("gradient"))
        parameter.register_post_accumulate_grad_hook(lambda parameter, name=name: seen[name].append("accumulated"))
    grid(inputs_embeds=torch.randn(1, 19, WIDTH, dtype=torch.float64)).last_hidden_state.sum().backward()
    assert all(events == ["gradient", "accumulated"] for events in seen.values())


def test_a_parameter_of_several_layers():
    model = trunk()
    model.layers[3].mixer.in_proj = model.layers[0].mixer.in_proj
    embeds = torch.randn(2, 19, WIDTH, dtype=torch.float64)
    expected = step(model, embeds)
    for order in ORDERS:
        assert_same(step(checkpointed(model, 2, 4, order), embeds), expected)


def test_second_derivatives_are_refused():
    grid = checkpointed(trunk(), 2, 4)
    embeds = torch.randn(1, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    output = grid(inputs_embeds=embeds).last_hidden_state
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(output.sum(), embeds, create_graph=True)


def test_backward_may_be_repeated_with_retain_graph():
    grid = checkpointed(trunk(), 2, 4)
    loss = grid(inputs_embeds=torch.randn(1, 9, WIDTH, dtype=torch.float64)).last_hidden_state.sum()
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in grid.layers.parameters()]
    loss.backward()
    for parameter, gradient in zip(grid.layers.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


def test_one_token_that_continues_a_state_is_refused():
    grid = checkpointed(trunk(), 2, 4)
    with pytest.raises(ValueError, match="single token"):
        step(grid, torch.randn(1, 1, WIDTH, dtype=torch.float64), with_state=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kept", ["some", "first", "none"])
def test_positions_to_keep(order, kept):
    model = trunk()
    embeds = torch.randn(3, 19, WIDTH, dtype=torch.float64)
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
    """What the graph behind a tensor keeps, node by node."""
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield from getattr(node, "saved_tensors", ())
        nodes.extend(function for function, _ in node.next_functions)


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_kept_pins_no_more_than_itself(order):
    model = checkpointed(trunk(residual_in_fp32=False), 2, 8, order)
    config, length = model.config, 40
    embeds = torch.randn(2, length, WIDTH, dtype=torch.float64, requires_grad=True)
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


# How often a layer runs for each segment in forward and backward together, for intervals of 1, 2 and all 5 layers.
RUNS = {"layer-major": [[2] * 5] * 3, "sequence-major": [[3, 3, 3, 3, 2], [3, 3, 3, 3, 2], [2] * 5]}


@pytest.mark.parametrize("case", range(3), ids=["cells of 1 layer", "cells of 2 layers", "whole columns"])
@pytest.mark.parametrize("order", ORDERS)
def test_what_is_computed_again(order, case):
    model = checkpointed(trunk(), [1, 2, 5][case], 8, order)
    runs = [0] * LAYERS
    for index, layer in enumerate(model.layers):

        def count(*_, index=index):
            runs[index] += 1

        layer.mixer.register_forward_pre_hook(count)
    embeds = torch.randn(1, 40, WIDTH, dtype=torch.float64)
    model(inputs_embeds=embeds).last_hidden_state.sum().backward()
    assert runs == [5 * times for times in RUNS[order][case]]
    keeping_states(model, 3)  # of segments 0, 1, 2 and 3, 4 all but the last once more
    model(inputs_embeds=embeds).last_hidden_state.sum().backward()
    assert runs == [2 * 5 * times + 3 for times in RUNS[order][case]]


class Held:
    """A tensor that autograd keeps, counted for as long as it does."""

    now = peak = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Held.now += tensor.numel()
        Held.peak = max(Held.peak, Held.now)

    def __del__(self):
        Held.now -= self.tensor.numel()


@pytest.mark.parametrize("order", ORDERS)
def test_backward_holds_one_cell_whatever_the_length(order):
    peaks = []
    for length in (16, 32, 160):
        model = checkpointed(trunk(), 2, 8, order)
        loss = model(inputs_embeds=torch.randn(1, length, WIDTH, dtype=torch.float64)).last_hidden_state.sum()
        Held.now = Held.peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            loss.backward()
        peaks.append(Held.peak)
    assert 0 < peaks[0] == peaks[1] == peaks[2]


def test_a_layer_that_transformers_would_checkpoint_is_not_restored_twice():
    model = checkpointed(trunk(), 2, 8)
    plain = trunk()
    embeds = torch.randn(1, 20, WIDTH, dtype=torch.float64)
    expected = step(plain, embeds)
    model.activation_checkpointing_enable()  # of the stock model: a flag on each layer
    assert model.is_activation_checkpointing
    calls = []
    model.layers[0].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_same(step(model, embeds), expected)
    assert len(calls) == 2 * 3


def test_many_cells_do_not_round_half_precision_gradients_away(monkeypatch):
    monkeypatch.undo()
    torch.manual_seed(0)
    model = trunk(1, dtype=torch.float32)
    embeds = torch.randn(1, 600, WIDTH)
    expected = step(model, embeds)
    half = step(checkpointed(model.to(torch.bfloat16), 1, 2), embeds.bfloat16())
    plain = step(model, embeds.bfloat16())
    name = "layers.0.mixer.in_proj.weight"

    def error(results):
        return ((results[name].float() - expected[name]).norm() / expected[name].norm()).item()

    assert error(half) < 1.5 * error(plain)


def test_layers_that_are_no_sub_modules_of_a_model_work_too():
    """The engine asks nothing of the model around the layers."""
    model = trunk()
    layers = nn.ModuleList(model.layers)
    embeds = torch.randn(1, 12, WIDTH, dtype=torch.float64)
    plan = plan_checkpoints(model.config, 12, layer_interval=2, sequence_interval=4)
    output = checkpoint_grid.run_checkpointed(list(layers), embeds, plan, final_norm=model.norm_f)
    torch.testing.assert_close(output, model(inputs_embeds=embeds).last_hidden_state, rtol=1e-12, atol=1e-12)


def test_the_first_version_of_fsdp_is_refused():
    model = checkpointed(trunk(), 2, 4)
    model.layers[1]._is_fsdp_managed_module = True  # as its constructor says of what is inside
    model.layers[1].parameters = lambda: iter(())  # they are tensors then, parts of a flat one
    with pytest.raises(RuntimeError, match="fsdp_version: 2"):
        model(inputs_embeds=torch.randn(1, 8, WIDTH, dtype=torch.float64))


def pruned(model):
    model.layers = model.layers[1::2]
    return model


def reversed_layers(model):
    model.layers = nn.ModuleList(reversed(model.layers))
    return model


def doubled(model):
    """Copies of two layers behind them, with the numbers of the originals."""
    model.layers = nn.ModuleList([*model.layers[:3], *copy.deepcopy(model.layers[1:3]), *model.layers[3:]])
    return model


def repeated(model):
    """One layer in two places: the same weights."""
    model.layers.append(model.layers[0])
    return model


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("change", [pruned, reversed_layers, doubled, repeated])
def test_layers_whose_place_is_not_their_number(change, order):
    model = change(trunk())
    embeds = torch.randn(2, 19, WIDTH, dtype=torch.float64)
    expected = step(model, embeds)
    for layer_interval in (1, 2, 9):
        assert_same(step(checkpointed(model, layer_interval, 4, order), embeds), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_a_state_is_where_the_layer_looks_for_it(order):
    """In a cache as long as the model was before it was pruned."""
    model = pruned(trunk())
    embeds = torch.randn(2, 19, WIDTH, dtype=torch.float64)
    expected = step(model, embeds, with_state=True)
    assert any(tensor is not None for name, tensor in expected.items() if name.startswith("initial state"))
    assert_same(step(checkpointed(model, 1, 4, order), embeds, with_state=True), expected)


def test_a_state_without_a_place_of_its_own_is_refused():
    embeds = torch.randn(2, 19, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"layers\.1 and layers\.3 both keep their state under layer_idx 1 .* own"):
        step(checkpointed(doubled(trunk()), 2, 4), embeds, with_state=True)
    model = checkpointed(pruned(trunk()), 2, 4)
    model.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match=r"layers\.1 keeps its state under layer_idx 3 .* ends at 1"):
        step(model, embeds, with_state=True)


@contextmanager
def each_tensor_once():
    """Gives what autograd keeps back to whoever asks first, and to nobody else."""
    given = []

    def unpack(packed):
        assert packed, "asked for twice"
        given.append(None)
        return packed.pop()

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: [tensor], unpack):
        yield given


@pytest.mark.parametrize("order", ORDERS)
def test_kept_tensors_are_asked_for_once(order):
    model = checkpointed(trunk(), 2, 4, order)
    embeds = torch.randn(2, 19, WIDTH, dtype=torch.float64)
    expected = step(model, embeds, left_padding([19, 9], 19), with_state=True)
    with each_tensor_once() as given:
        assert_same(step(model, embeds, left_padding([19, 9], 19), with_state=True), expected, tolerance=0)
    assert given


@pytest.mark.parametrize("order", ORDERS)
def test_inside_checkpoints_of_pytorch_and_with_tensors_saved_on_the_cpu(order):
    model = trunk()
    embeds = torch.randn(2, 19, WIDTH, dtype=torch.float64)
    expected = step(model, embeds)
    grid = checkpointed(model, 2, 4, order)
    forward = grid.forward
    with torch.autograd.graph.save_on_cpu():
        assert_same(step(grid, embeds), expected)
    grid.forward = lambda **inputs: checkpoint(forward, use_reentrant=False, **inputs)
    assert_same(step(grid, embeds), expected)
