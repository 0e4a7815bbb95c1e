"""The tensors that a checkpointed forward pass uses beside its inputs, and their state until its backward pass."""

import copy
import threading
from functools import partial

import comparison
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny import WIDTH, random_embeddings, random_pixels, tiny_config, tiny_mamba2, tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from transformers_ma2mba import enable_multi_axis_checkpointing
from transformers_ma2mba.gradient_checkpointing.captured_tensors import CapturedTensors, unknown_leaves, without_hooks

ORDERS = ["layer-major", "sequence-major"]
pytestmark = pytest.mark.usefixtures("in_double")
trunk = partial(tiny_mamba2, num_hidden_layers=4)
assert_same = partial(comparison.assert_same, nonzero=True)


def checkpointed(model, order="layer-major"):
    return enable_multi_axis_checkpointing(model, 2, 4, order=order)


def loss_of(model, inputs=None, call=None):
    rows = (call or model)(inputs_embeds=random_embeddings() if inputs is None else inputs).last_hidden_state
    return (rows * torch.arange(rows.numel(), dtype=rows.dtype).view_as(rows).cos()).sum()


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors)


def gradients_of_layers(model):
    return gradients(loss_of(model), list(model.layers.parameters()))


def assert_plain_gradients(run, order="layer-major"):
    """Assert that a function of a model gives the same gradients with and without checkpointing."""
    assert_same(run(checkpointed(trunk(), order)), run(trunk()))


def other_weights(model):
    """Tensors that `functional_call` can use in place of the model's parameters."""
    torch.manual_seed(2)
    return {
        name: (p.detach() + 0.05 * torch.randn_like(p)).requires_grad_(p.requires_grad)
        for name, p in model.named_parameters()
    }


# Hooks

HOOKS = {
    "before a layer": lambda model, hook: model.layers[2].register_forward_pre_hook(lambda _, args: (hook(args[0]),)),
    "after a mixer": lambda model, hook: model.layers[1].mixer.register_forward_hook(lambda *args: hook(args[2])),
    "before the final norm": lambda model, hook: model.norm_f.register_forward_pre_hook(lambda _, a: (hook(a[0]),)),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("where", HOOKS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_vector_in_a_hook_gets_its_gradient(where, order, frozen):
    """`frozen`: only the vector requires a gradient."""

    def run(model):
        model.requires_grad_(not frozen)
        vector = torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64).requires_grad_()
        HOOKS[where](model, lambda rows: rows * vector)
        wanted = [vector, *(parameter for parameter in model.layers.parameters() if parameter.requires_grad)]
        return gradients(loss_of(model), wanted)

    assert_plain_gradients(run, order)


def test_vectors_in_hooks_of_all_layers_get_their_gradients():
    def run(model):
        shared = torch.ones(WIDTH, dtype=torch.float64, requires_grad=True)
        own = [torch.full((WIDTH,), 1.0 + place, dtype=torch.float64, requires_grad=True) for place in range(4)]
        for layer, vector in zip(model.layers, own, strict=True):
            layer.register_forward_hook(lambda *args, vector=vector: args[2] * vector + shared)
        return gradients(loss_of(model), [shared, *own])

    assert_plain_gradients(run)


def test_parameter_used_in_another_cell_gets_its_gradient():
    """A hook on the last layer uses a weight of the first one."""

    def run(model):
        weight = model.layers[0].norm.weight
        model.layers[3].register_forward_hook(lambda _, args, rows: rows * weight)
        return gradients(loss_of(model), [weight])

    assert_plain_gradients(run)


@pytest.mark.parametrize("order", ORDERS)
def test_vector_computed_outside_is_refused(order):
    model = checkpointed(trunk(), order)
    scale = (torch.ones(WIDTH, dtype=torch.float64, requires_grad=True) * 2).exp()
    model.layers[2].register_forward_hook(lambda _, args, rows: rows * scale)
    with pytest.raises(RuntimeError, match=r"layers\.2 to layers\.3|layers\.0 to layers\.3.*computed outside \(Exp"):
        loss_of(model)


def test_vector_that_the_first_segment_does_not_use_is_refused():
    model = checkpointed(trunk())
    vector = torch.ones(WIDTH, dtype=torch.float64, requires_grad=True)
    calls = []

    def hook(module, args, rows):
        calls.append(None)
        return rows * vector if len(calls) > 2 else rows

    model.layers[2].register_forward_hook(hook)
    with pytest.raises(RuntimeError, match="did not use on the first segment"):
        loss_of(model).backward()
    assert vector.grad is None


def test_find_others_keeps_no_graph_of_the_first_segment():
    model, recorded = trunk(), []

    def run():
        recorded.append(model.layers[0](random_embeddings()))
        return recorded

    (rows,) = CapturedTensors({"layers.0": model.layers[0]}).find_others(run, "layers.0")
    assert torch.equal(rows, recorded[0]) and not rows.requires_grad
    with pytest.raises(RuntimeError, match="hook took out of a checkpointed layer"):
        recorded[0].sum().backward()


def test_unknown_leaves_stops_at_known_tensors():
    deep = (torch.ones(3, requires_grad=True) * 2).exp()
    leaf = torch.ones(3, requires_grad=True)
    output = (deep * leaf).sum()
    assert unknown_leaves([output, None], [deep, leaf], "it") == []
    assert unknown_leaves([output], [deep], "it") == [leaf]
    assert len(unknown_leaves([output], [leaf], "it")) == 1


# Other tensors during the forward pass


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("leaves", [True, False], ids=["leaves", "fast weights"])
def test_functional_call_passes_gradients_to_the_given_tensors(order, leaves):
    def run(model):
        slow = other_weights(model)
        own = dict(model.named_parameters())
        used = slow if leaves else {name: tensor * 1.5 for name, tensor in slow.items()}
        wanted = list(slow.values())[1:]  # the forward pass does not use the embeddings
        found = gradients(
            loss_of(model, call=lambda **inputs: torch.func.functional_call(model, used, kwargs=inputs)), wanted
        )
        assert all(parameter.grad is None for parameter in own.values())
        assert all(parameter is own[name] for name, parameter in model.named_parameters())
        return found

    assert_plain_gradients(run, order)


def test_functional_call_accepts_token_ids():
    ids = torch.randint(0, 50, (2, 19), generator=torch.Generator().manual_seed(0))

    def run(model):
        used = other_weights(model)
        rows = torch.func.functional_call(model, used, (ids,)).last_hidden_state
        return gradients((rows * rows.detach().cos()).sum(), list(used.values()))

    assert_plain_gradients(run)


def test_functional_call_reaches_the_vision_tower():
    config = tiny_config(text=dict(num_hidden_layers=3))
    tokens = torch.full((1, 5 * config.tokens_per_frame), config.video_token_id)
    input_ids = torch.cat([torch.randint(2, 300, (1, 9)), tokens, torch.randint(2, 300, (1, 9))], 1)
    labels = input_ids.clone()
    labels[:, :-4] = -100
    batch = dict(input_ids=input_ids, labels=labels, pixel_values_videos=random_pixels(5))
    results = []
    for enabled in (False, True):
        model = tiny_model(config, dtype=torch.float64).train()
        if enabled:
            model.gradient_checkpointing_enable({"layer_interval": 2, "sequence_interval": 8})
        used = other_weights(model)
        loss = torch.func.functional_call(model, used, kwargs=batch).loss
        wanted = {name: tensor for name, tensor in used.items() if tensor.requires_grad}
        results.append(dict(zip(wanted, gradients(loss, list(wanted.values())), strict=True)))
    # The gradients of the biases of attention keys are zero up to rounding.
    assert_same(*reversed(results), tolerance=1e-9, smallest_norm=1e-4, nonzero=False)


# Tensors modified in place


def edit_a_weight(model):
    with torch.no_grad():
        model.layers[1].mixer.in_proj.weight.mul_(2)


def edit_a_frozen_weight(model):
    with torch.no_grad():
        model.layers[3].mixer.conv1d.weight.add_(1)


def step_an_optimizer(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("edit", "name"),
    [
        (edit_a_weight, r"layers\.1\.mixer\.in_proj\.weight"),
        (edit_a_frozen_weight, r"layers\.3\.mixer\.conv1d\.weight"),
        (step_an_optimizer, r"layers\.\d\.norm\.weight"),
    ],
)
def test_weights_modified_before_backward_are_refused(order, edit, name):
    plain = trunk()
    plain.layers[3].requires_grad_(False)
    grid = checkpointed(copy.deepcopy(plain), order)
    for model, message in [(plain, "modified by an inplace"), (grid, name)]:
        loss = loss_of(model)
        edit(model)
        with pytest.raises(RuntimeError, match=message):
            loss.backward()


def test_vision_weights_modified_before_backward_are_refused():
    config = tiny_config()
    model = tiny_model(config, dtype=torch.float64).train()
    model.gradient_checkpointing_enable()
    input_ids = torch.full((1, 5 * config.tokens_per_frame), config.video_token_id)
    input_ids[:, -1] = 7
    input_ids = torch.cat([torch.full((1, 1), config.video_token_id), input_ids], 1)
    loss = model(input_ids=input_ids, labels=input_ids, pixel_values_videos=random_pixels(5)).loss
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"multi_modal_projector\.linear_1\.weight.*was modified in place"):
        loss.backward()


def test_masks_and_inputs_modified_before_backward_are_refused():
    for edited in ("mask", "inputs"):
        model = checkpointed(trunk())
        inputs, mask = random_embeddings(), torch.ones(2, 19, dtype=torch.long)
        mask[1, :5] = 0
        loss = model(inputs_embeds=inputs, attention_mask=mask).last_hidden_state.sum()
        dict(mask=mask, inputs=inputs)[edited].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            loss.backward()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["closure", "buffer"])
def test_constants_modified_before_backward_are_refused(order, kind):
    for model, message in [(trunk(), "modified by an inplace"), (checkpointed(trunk(), order), "hook or closure")]:
        scale = torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64)
        if kind == "buffer":
            model.layers[2].register_buffer("scale", scale)
        model.layers[2].register_forward_hook(lambda _, args, rows, scale=scale: rows * scale)
        loss_of(model).backward()
        loss = loss_of(model)
        scale.mul_(2)
        with pytest.raises(RuntimeError, match=message):
            loss.backward()


def test_error_names_the_versions_and_the_remedy():
    model = checkpointed(trunk())
    loss = loss_of(model)
    edit_a_weight(model)
    with pytest.raises(RuntimeError, match=r"modified in place between.*version \d+, now \d+.*before the optimizer"):
        loss.backward()


def test_weights_may_change_between_accumulated_steps():
    model = checkpointed(trunk())
    for _ in range(2):
        loss_of(model).backward()
        loss_of(model).backward()
        step_an_optimizer(model)


def test_buffers_may_change():
    """A module may update statistics of its inputs in its forward pass."""
    model = trunk()
    for layer in model.layers:
        layer.register_buffer("calls", torch.zeros(()))
        layer.register_forward_hook(lambda layer, *args: layer.calls.add_(1) and None)
    loss_of(checkpointed(model)).backward()


def test_backward_uses_a_parameter_replaced_since_forward():
    def run(model):
        loss = loss_of(model)
        weight = model.layers[0].mixer.in_proj.weight
        model.layers[0].mixer.in_proj.weight = nn.Parameter(torch.zeros_like(weight))
        return gradients(loss, [weight])

    assert_plain_gradients(run)


# Modules that change between forward and backward


def assert_backward_ignores(change, prepare=lambda model: model):
    """Compare gradients of the plain run and the grid if `change` comes between forward and backward.

    The grid is a single cell, so that dropout draws the same masks in both.
    """
    results = []
    for enabled in (False, True):
        model = prepare(trunk())
        if enabled:
            enable_multi_axis_checkpointing(model)
        wanted = [parameter for parameter in model.layers.parameters() if parameter.requires_grad]
        torch.manual_seed(3)
        loss = loss_of(model)
        change(model)
        loss.backward()
        results.append({index: parameter.grad for index, parameter in enumerate(wanted) if parameter.grad is not None})
    assert_same(*reversed(results))


def with_dropout(model):
    config = LoraConfig(r=3, lora_dropout=0.4, target_modules=["in_proj"], init_lora_weights=False)
    return inject_adapter_in_model(config, model).double()


def test_backward_repeats_dropout_switched_off_since_forward():
    assert_backward_ignores(lambda model: model.eval(), with_dropout)


def test_backward_runs_a_hook_removed_since_forward():
    handles = []

    def hook(model):
        vector = torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64)
        handles.append(model.layers[1].mixer.register_forward_hook(lambda _, args, rows: rows * vector))
        return model

    assert_backward_ignores(lambda model: handles.pop().remove(), hook)
    assert not handles


@pytest.mark.parametrize("change", ["frozen", "freed"])
def test_backward_ignores_requires_grad_changed_since_forward(change):
    def prepare(model):
        model.layers[1].requires_grad_(change == "frozen")
        return model

    assert_backward_ignores(lambda model: model.layers[1].requires_grad_(change == "freed"), prepare)


def test_adapters_merged_before_backward_are_refused():
    model = checkpointed(with_dropout(trunk()))
    loss = loss_of(model)
    for module in model.modules():
        if hasattr(module, "merge"):
            module.merge()
    with pytest.raises(RuntimeError, match=r"adapters of layers\.\d\.mixer\.in_proj were merged, switched or"):
        loss.backward()


def test_backward_leaves_modules_unchanged():
    model = checkpointed(with_dropout(trunk()))
    loss = loss_of(model)
    model.eval()
    handle = model.layers[2].register_forward_hook(lambda *args: None)
    model.layers[0].requires_grad_(False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    loss.backward()
    assert not any(module.training for module in model.modules())
    assert list(model.layers[2]._forward_hooks) == [handle.id]
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen


# Tensors that hooks store


@pytest.mark.parametrize("order", ORDERS)
def test_loss_of_a_tensor_stored_by_a_hook_is_refused(order):
    taken = {}
    model = checkpointed(trunk(), order)
    for place, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda _, args, rows, place=place: taken.__setitem__(place, rows))
    loss = loss_of(model)
    with pytest.raises(RuntimeError, match="hook took out of a checkpointed layer"):
        (loss + taken[1].square().mean()).backward()
    assert_same(gradients_of_layers(model), gradients_of_layers(trunk()))  # storing alone does no harm


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("budget", [None, "minimal"])
def test_tensor_hooks_get_gradients_by_segment(order, budget):
    """Every token's gradient arrives once, in any plan."""
    model, tokens = trunk(), []

    def hook(module, args, rows):
        rows.register_hook(lambda gradient: tokens.append(gradient.shape[1]) and None)

    model.layers[1].register_forward_hook(hook)
    enable_multi_axis_checkpointing(model, "auto" if budget else 1, "auto" if budget else 4, budget, order=order)
    loss_of(model, random_embeddings(600 if budget else 19)).backward()
    assert sum(tokens) == (600 if budget else 19)


def test_flop_counter_sees_the_recomputation():
    flops = {}
    for order in ORDERS:
        model = checkpointed(trunk(), order)
        with FlopCounterMode(display=False) as counter:
            loss_of(model).backward()
        flops[order] = counter.get_total_flops()
    # Four units of work against almost five: in sequence-major, the highest cell runs once less than the others.
    assert 1 < flops["sequence-major"] / flops["layer-major"] < 5 / 4


def test_skip_connection_between_cells_is_refused():
    taken = {}
    model = checkpointed(trunk())
    model.layers[0].register_forward_hook(lambda _, args, rows: taken.update(rows=rows))
    model.layers[3].register_forward_hook(lambda _, args, rows: rows + taken["rows"])
    with pytest.raises(RuntimeError, match=r"layers\.2 to layers\.3 depend on a tensor .* computed outside"):
        loss_of(model, random_embeddings(20))


def test_skip_connection_within_a_cell_gets_its_gradient():
    results = []
    for enabled in (False, True):
        model, taken = trunk(), {}
        model.layers[2].register_forward_hook(lambda _, args, rows, taken=taken: taken.update(rows=rows))
        model.layers[3].register_forward_hook(lambda _, args, rows, taken=taken: rows + taken["rows"])
        if enabled:
            checkpointed(model)
        results.append(gradients_of_layers(model))
    assert_same(*reversed(results))


# Threads


@pytest.mark.parametrize("order", ORDERS)
def test_threads_get_the_gradients_of_a_single_run(order):
    model, results = checkpointed(trunk(), order), []
    threads = [threading.Thread(target=lambda: results.append(gradients_of_layers(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = gradients_of_layers(trunk())
    assert len(results) == 4
    for found in results:
        assert_same(found, expected)


def test_gradient_accumulators_outlive_the_graphs_that_need_them():
    """PyTorch deadlocks if a thread makes one while another thread passes the leaf to a Function."""
    weight, outside = nn.Linear(3, 3).weight, nn.Parameter(torch.ones(3))

    def accumulator(leaf):
        return leaf.view_as(leaf).grad_fn.next_functions[0][0]

    captured = CapturedTensors({"layer": nn.ParameterList([weight])})
    with torch.no_grad():
        captured.add(outside, "a tensor of a hook")
    for leaf in (weight, outside):
        accumulator(leaf).metadata["made before"] = True
        assert accumulator(leaf).metadata == {"made before": True}  # a new one would have none


def test_only_one_thread_may_disable_parameter_hooks():
    weight = nn.Parameter(torch.ones(3))
    weight.register_hook(lambda gradient: 2 * gradient)
    with without_hooks([weight]):
        with pytest.raises(RuntimeError, match="cannot be trained by several threads"), without_hooks([weight]):
            pass
        with without_hooks([nn.Parameter(torch.ones(3))]):
            (weight * 3).sum().backward()
    assert weight.grad.tolist() == [3, 3, 3]
    (weight * 3).sum().backward()
    assert weight.grad.tolist() == [9, 9, 9]
