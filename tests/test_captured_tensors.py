"""What a checkpointed pass depends on beside its inputs: found wherever it comes from, held until backward."""

import copy
import threading
from functools import partial

import comparison
import pytest
import torch
from double_precision import compute_in_double
from peft import LoraConfig, inject_adapter_in_model
from tiny import random_pixels, tiny_config, tiny_model, tiny_text_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Mamba2Model

from transformers_ma2mba import enable_multi_axis_checkpointing
from transformers_ma2mba.captured_tensors import CapturedTensors, unknown_leaves, without_hooks

ORDERS = ["layer-major", "sequence-major"]
WIDTH = 32
assert_same = partial(comparison.assert_same, nonzero=True)


@pytest.fixture(autouse=True)
def double(monkeypatch):
    compute_in_double(monkeypatch)


def trunk(num_hidden_layers=4) -> Mamba2Model:
    torch.manual_seed(0)
    return Mamba2Model(tiny_text_config(num_hidden_layers=num_hidden_layers)).double().train()


def checkpointed(model, order="layer-major"):
    return enable_multi_axis_checkpointing(model, 2, 4, order=order)


def embeddings(length=19):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, WIDTH, dtype=torch.float64, generator=generator)


def loss_of(model, inputs=None, call=None):
    rows = (call or model)(inputs_embeds=embeddings() if inputs is None else inputs).last_hidden_state
    return (rows * torch.arange(rows.numel(), dtype=rows.dtype).view_as(rows).cos()).sum()


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors)


# Hooks

HOOKS = {
    "before a layer": lambda model, hook: model.layers[2].register_forward_pre_hook(lambda _, args: (hook(args[0]),)),
    "after a mixer": lambda model, hook: model.layers[1].mixer.register_forward_hook(lambda *args: hook(args[2])),
    "before the final norm": lambda model, hook: model.norm_f.register_forward_pre_hook(lambda _, a: (hook(a[0]),)),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("where", HOOKS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_a_trainable_vector_that_a_hook_multiplies_by(where, order, frozen):
    """`frozen`: nothing but the vector wants a gradient."""
    results = []
    for model in (trunk(), checkpointed(trunk(), order)):
        model.requires_grad_(not frozen)
        vector = torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64).requires_grad_()
        HOOKS[where](model, lambda rows, vector=vector: rows * vector)
        wanted = [vector, *(parameter for parameter in model.layers.parameters() if parameter.requires_grad)]
        results.append(gradients(loss_of(model), wanted))
    assert_same(*reversed(results))


def test_a_vector_for_every_layer_and_one_that_stands_in_all():
    results = []
    for model in (trunk(), checkpointed(trunk())):
        shared = torch.ones(WIDTH, dtype=torch.float64, requires_grad=True)
        own = [torch.full((WIDTH,), 1.0 + place, dtype=torch.float64, requires_grad=True) for place in range(4)]
        for layer, vector in zip(model.layers, own, strict=True):
            layer.register_forward_hook(lambda *args, vector=vector, shared=shared: args[2] * vector + shared)
        results.append(gradients(loss_of(model), [shared, *own]))
    assert_same(*reversed(results))


def test_a_parameter_of_another_cell():
    """A hook on the last layer uses a weight of the first one."""
    results = []
    for model in (trunk(), checkpointed(trunk())):
        weight = model.layers[0].norm.weight
        model.layers[3].register_forward_hook(lambda _, args, rows, weight=weight: rows * weight)
        results.append(gradients(loss_of(model), [weight]))
    assert_same(*reversed(results))


@pytest.mark.parametrize("order", ORDERS)
def test_a_vector_that_was_computed_outside_is_refused(order):
    model = checkpointed(trunk(), order)
    scale = (torch.ones(WIDTH, dtype=torch.float64, requires_grad=True) * 2).exp()
    model.layers[2].register_forward_hook(lambda _, args, rows: rows * scale)
    with pytest.raises(RuntimeError, match=r"layers\.2 to layers\.3|layers\.0 to layers\.3.*computed outside \(Exp"):
        loss_of(model)


def test_a_vector_that_only_later_segments_use_is_refused():
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


def test_looking_at_the_first_segment_keeps_nothing_of_it():
    model, recorded = trunk(), []

    def run():
        recorded.append(model.layers[0](embeddings()))
        return recorded

    (rows,) = CapturedTensors({"layers.0": model.layers[0]}).find_others(run, "layers.0")
    assert torch.equal(rows, recorded[0]) and not rows.requires_grad
    with pytest.raises(RuntimeError, match="hook took out of a checkpointed layer"):
        recorded[0].sum().backward()


def test_the_graph_is_not_followed_beyond_what_is_known():
    deep = (torch.ones(3, requires_grad=True) * 2).exp()
    leaf = torch.ones(3, requires_grad=True)
    output = (deep * leaf).sum()
    assert unknown_leaves([output, None], [deep, leaf], "it") == []
    assert unknown_leaves([output], [deep], "it") == [leaf]
    assert len(unknown_leaves([output], [leaf], "it")) == 1


# Other tensors for the time of the forward pass


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("leaves", [True, False], ids=["leaves", "fast weights"])
def test_functional_call(order, leaves):
    results = []
    for model in (trunk(), checkpointed(trunk(), order)):
        torch.manual_seed(2)
        slow = {name: torch.randn_like(p).mul_(0.1).requires_grad_() for name, p in model.named_parameters()}
        own = dict(model.named_parameters())
        used = {name: own[name].detach() + (tensor if leaves else tensor * 1.5) for name, tensor in slow.items()}
        if leaves:
            used = {name: tensor.detach().requires_grad_() for name, tensor in used.items()}
        wanted = list((used if leaves else slow).values())[1:]  # without the embeddings, which are not used
        loss = loss_of(
            model, call=lambda model=model, used=used, **inputs: torch.func.functional_call(model, used, kwargs=inputs)
        )
        results.append(gradients(loss, wanted))
        assert all(parameter.grad is None for parameter in own.values())
        assert all(parameter is own[name] for name, parameter in model.named_parameters())
    assert_same(*reversed(results))


def test_functional_call_of_token_ids():
    results = []
    for model in (trunk(), checkpointed(trunk())):
        torch.manual_seed(2)
        used = {name: torch.randn_like(p).mul_(0.1).requires_grad_() for name, p in model.named_parameters()}
        ids = torch.randint(0, 50, (2, 19), generator=torch.Generator().manual_seed(0))
        rows = torch.func.functional_call(model, used, (ids,)).last_hidden_state
        results.append(gradients((rows * rows.detach().cos()).sum(), list(used.values())))
    assert_same(*reversed(results))


def test_functional_call_of_the_whole_model_with_its_vision_tower():
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
        torch.manual_seed(2)
        used = {
            name: (p.detach() + 0.05 * torch.randn_like(p)).requires_grad_(p.requires_grad)
            for name, p in model.named_parameters()
        }
        loss = torch.func.functional_call(model, used, kwargs=batch).loss
        wanted = {name: tensor for name, tensor in used.items() if tensor.requires_grad}
        results.append(dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True)))
    expected, actual = results
    for name, gradient in expected.items():
        # The bias of an attention's keys has a gradient of zero but for rounding.
        assert (actual[name] - gradient).norm() <= 1e-9 * gradient.norm().clamp(min=1e-4), name


# What was written into


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
def test_weights_that_were_edited_before_backward_are_refused(order, edit, name):
    plain = trunk()
    plain.layers[3].requires_grad_(False)
    grid = checkpointed(copy.deepcopy(plain), order)
    for model, message in [(plain, "modified by an inplace"), (grid, name)]:
        loss = loss_of(model)
        edit(model)
        with pytest.raises(RuntimeError, match=message):
            loss.backward()


def test_vision_weights_that_were_edited_before_backward_are_refused():
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


def test_a_mask_and_inputs_that_were_edited_before_backward_are_refused():
    for edited in ("mask", "inputs"):
        model = checkpointed(trunk())
        inputs, mask = embeddings(), torch.ones(2, 19, dtype=torch.long)
        mask[1, :5] = 0
        loss = model(inputs_embeds=inputs, attention_mask=mask).last_hidden_state.sum()
        dict(mask=mask, inputs=inputs)[edited].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            loss.backward()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["closure", "buffer"])
def test_constants_that_were_edited_before_backward_are_refused(order, kind):
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


def test_the_error_says_what_to_do():
    model = checkpointed(trunk())
    loss = loss_of(model)
    edit_a_weight(model)
    with pytest.raises(RuntimeError, match=r"modified in place between.*version \d+, now \d+.*before the optimizer"):
        loss.backward()


def test_gradients_may_be_accumulated_and_weights_edited_between_steps():
    model = checkpointed(trunk())
    for _ in range(2):
        loss_of(model).backward()
        loss_of(model).backward()
        step_an_optimizer(model)


def test_buffers_may_change():
    """Statistics that a module keeps of its inputs are no weights."""
    model = trunk()
    for layer in model.layers:
        layer.register_buffer("calls", torch.zeros(()))
        layer.register_forward_hook(lambda layer, *args: layer.calls.add_(1) and None)
    loss_of(checkpointed(model)).backward()


def test_a_module_that_was_replaced_between_is_put_back():
    results = []
    for model in (trunk(), checkpointed(trunk())):
        loss = loss_of(model)
        weight = model.layers[0].mixer.in_proj.weight
        model.layers[0].mixer.in_proj.weight = nn.Parameter(torch.zeros_like(weight))
        results.append(gradients(loss, [weight]))
    assert_same(*reversed(results))


# Modules that change


def changed_before_backward(change, prepare=lambda model: model):
    """Compares gradients of the plain run and in a grid, if `change` comes between forward and backward.

    With a single cell, so that dropout draws the same masks in both.
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
    expected, actual = results
    assert actual.keys() == expected.keys()
    assert_same(actual.values(), expected.values())


def with_dropout(model):
    config = LoraConfig(r=3, lora_dropout=0.4, target_modules=["in_proj"], init_lora_weights=False)
    return inject_adapter_in_model(config, model).double()


def test_dropout_that_is_switched_off_before_backward():
    changed_before_backward(lambda model: model.eval(), with_dropout)


def test_a_hook_that_is_gone_before_backward():
    handles = []

    def hook(model):
        vector = torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64)
        handles.append(model.layers[1].mixer.register_forward_hook(lambda _, args, rows: rows * vector))
        return model

    changed_before_backward(lambda model: handles.pop().remove(), hook)
    assert not handles


@pytest.mark.parametrize("change", ["frozen", "freed"])
def test_weights_that_are_frozen_or_freed_before_backward(change):
    def prepare(model):
        model.layers[1].requires_grad_(change == "frozen")
        return model

    changed_before_backward(lambda model: model.layers[1].requires_grad_(change == "freed"), prepare)


def test_adapters_that_are_merged_before_backward_are_refused():
    model = checkpointed(with_dropout(trunk()))
    loss = loss_of(model)
    for module in model.modules():
        if hasattr(module, "merge"):
            module.merge()
    with pytest.raises(RuntimeError, match=r"adapters of layers\.\d\.mixer\.in_proj were merged, switched or"):
        loss.backward()


def test_everything_is_as_it_was_after_backward():
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


# What hooks take out


@pytest.mark.parametrize("order", ORDERS)
def test_a_loss_of_what_hooks_take_out_is_refused(order):
    taken = {}
    model = checkpointed(trunk(), order)
    for place, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda _, args, rows, place=place: taken.__setitem__(place, rows))
    loss = loss_of(model)
    with pytest.raises(RuntimeError, match="hook took out of a checkpointed layer"):
        (loss + taken[1].square().mean()).backward()
    plain = trunk()  # and if it is only taken out, it does no harm
    expected = gradients(loss_of(plain), list(plain.layers.parameters()))
    assert_same(gradients(loss_of(model), list(model.layers.parameters())), expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("budget", [None, "minimal"])
def test_hooks_may_ask_for_gradients_of_what_they_see(order, budget):
    """Which come a segment at a time, in whatever plan."""
    model, tokens = trunk(), []

    def hook(module, args, rows):
        rows.register_hook(lambda gradient: tokens.append(gradient.shape[1]) and None)

    model.layers[1].register_forward_hook(hook)
    enable_multi_axis_checkpointing(model, "auto" if budget else 1, "auto" if budget else 4, budget, order=order)
    loss_of(model, embeddings(600 if budget else 19)).backward()
    assert sum(tokens) == (600 if budget else 19)


def test_flops_may_be_counted():
    flops = {}
    for order in ORDERS:
        model = checkpointed(trunk(), order)
        with FlopCounterMode(display=False) as counter:
            loss_of(model).backward()
        flops[order] = counter.get_total_flops()
    # Four units of work, and five, or nearly so: the highest cell is not computed once more for its rows.
    assert 1 < flops["sequence-major"] / flops["layer-major"] < 5 / 4


def test_a_skip_connection_from_one_cell_to_another_is_refused():
    taken = {}
    model = checkpointed(trunk())
    model.layers[0].register_forward_hook(lambda _, args, rows: taken.update(rows=rows))
    model.layers[3].register_forward_hook(lambda _, args, rows: rows + taken["rows"])
    with pytest.raises(RuntimeError, match=r"layers\.2 to layers\.3 depend on a tensor .* computed outside"):
        loss_of(model, embeddings(20))


def test_a_skip_connection_within_a_cell():
    results = []
    for enabled in (False, True):
        model, taken = trunk(), {}
        model.layers[2].register_forward_hook(lambda _, args, rows, taken=taken: taken.update(rows=rows))
        model.layers[3].register_forward_hook(lambda _, args, rows, taken=taken: rows + taken["rows"])
        if enabled:
            checkpointed(model)
        results.append(gradients(loss_of(model), list(model.layers.parameters())))
    assert_same(*reversed(results))


# Several threads


@pytest.mark.parametrize("order", ORDERS)
def test_one_model_in_several_threads(order):
    model, plain = checkpointed(trunk(), order), trunk()
    wanted = list(model.layers.parameters())
    results = {}

    def run(name):
        results[name] = gradients(loss_of(model), wanted)

    threads = [threading.Thread(target=run, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = gradients(loss_of(plain), list(plain.layers.parameters()))
    assert len(results) == 4
    for found in results.values():
        assert_same(found, expected)


def test_hooks_of_parameters_are_held_back_by_one_thread_at_a_time():
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
