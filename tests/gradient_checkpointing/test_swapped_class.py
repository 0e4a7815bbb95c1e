"""The class of a checkpointed model, under copies, pickles, replicas, wrappers and subclasses."""

import copy
import pickle
import subprocess
import sys
from functools import partial
from types import MethodType

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from comparison import assert_same
from tiny import ROOT, tiny_config, tiny_mamba2, tiny_model
from torch import nn
from transformers import Mamba2ForCausalLM, Mamba2Model

from transformers_ma2mba import enable_multi_axis_checkpointing
from transformers_ma2mba.gradient_checkpointing import mamba2_in_grid as multi_axis_mamba2
from transformers_ma2mba.gradient_checkpointing.multi_axis import (
    disable_multi_axis_checkpointing,
    is_multi_axis_checkpointed,
)

pytestmark = pytest.mark.usefixtures("in_double")
trunk = partial(tiny_mamba2, num_hidden_layers=3)


def enable(model):
    return enable_multi_axis_checkpointing(model, 2, 4)


IDS = torch.arange(38).view(2, 19)


def gradients(model, **inputs) -> dict:
    rows = model(IDS, **inputs).last_hidden_state
    (rows * rows.detach().cos()).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.fixture
def walks(monkeypatch):
    """A list that gets an element whenever a model runs in the grid."""
    walked, run = [], multi_axis_mamba2.run_checkpointed

    def count(*args, **options):
        walked.append(1)
        return run(*args, **options)

    monkeypatch.setattr(multi_axis_mamba2, "run_checkpointed", count)
    return walked


def assert_switchable(model, expected, walks):
    """Compare gradients while the model is checkpointed, after disabling it, and after enabling it again."""
    assert_same(gradients(model), expected)
    assert walks == [1]
    disable_multi_axis_checkpointing(model)
    assert_same(gradients(model), expected)
    assert walks == [1]
    enable(model)
    assert_same(gradients(model), expected)
    assert walks == [1, 1]


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_whole(model, tmp_path):
    torch.save(model, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", weights_only=False)


@pytest.mark.parametrize("how", ["copied", "pickled", "saved"])
def test_copies_are_checkpointed_like_the_model(how, walks, tmp_path):
    model = enable(trunk())
    model._multi_axis_checkpointing.plan(model, IDS)
    other = {"copied": copy.deepcopy, "pickled": pickled, "saved": lambda m: saved_whole(m, tmp_path)}[how](model)
    assert type(other) is type(model) and other._multi_axis_checkpointing is not model._multi_axis_checkpointing
    with torch.no_grad():
        other.layers[0].mixer.in_proj.weight.mul_(0.5)  # so that the gradients tell the copy from the model
        expected = copy.deepcopy(trunk())
        expected.layers[0].mixer.in_proj.weight.mul_(0.5)
    assert_same(gradients(other), gradients(expected))
    assert walks == [1]
    disable_multi_axis_checkpointing(other)
    assert type(other) is Mamba2Model and is_multi_axis_checkpointed(model)


def test_pickled_model_is_still_checkpointed(tmp_path):
    model = tiny_model(tiny_config()).train()
    model.gradient_checkpointing_enable()
    loaded = saved_whole(model, tmp_path)
    assert loaded.is_gradient_checkpointing
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_another_process_can_unpickle_the_model(tmp_path):
    torch.save(enable(trunk()).float(), tmp_path / "model.pt")
    script = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False);"
        "model(torch.arange(19)[None]).last_hidden_state.sum().backward();"
        "print(model._multi_axis_checkpointing.passes)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "model.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1"], done.stderr


def test_swapped_class_looks_like_the_original():
    model = enable(trunk())
    assert isinstance(model, Mamba2Model)
    assert type(model).__name__ == "Mamba2Model" and repr(model) == repr(trunk())
    before = type(model)
    enable(model)
    assert type(model) is before
    assert type(disable_multi_axis_checkpointing(model)) is Mamba2Model
    assert type(disable_multi_axis_checkpointing(model)) is Mamba2Model


def test_saved_configuration_names_the_original_class(tmp_path):
    enable(trunk()).save_pretrained(tmp_path)
    assert Mamba2Model.from_pretrained(tmp_path).config.architectures == ["Mamba2Model"]


def replica_of(module):
    """A replica as DataParallel makes it: its tensors are not leaves, and it has no parameters."""
    replicas = {}
    for inner in module.modules():
        replicas[inner] = inner._replicate_for_data_parallel()
        replicas[inner]._former_parameters = {}
    for inner, replica in replicas.items():
        for name, child in inner._modules.items():
            setattr(replica, name, replicas[child])
        for name, parameter in inner._parameters.items():
            replica._parameters[name] = None
            if parameter is not None:
                del replica._parameters[name]
                copied = parameter * 1.0
                setattr(replica, name, copied)
                replica._former_parameters[name] = copied
    return replicas[module]


def test_data_parallel_replicas_pass_gradients_to_the_model(walks):
    expected = gradients(trunk())
    model = enable(trunk())
    replica = replica_of(model)
    assert not list(replica.parameters())
    rows = replica(IDS).last_hidden_state
    (rows * rows.detach().cos()).sum().backward()
    assert_same({name: parameter.grad for name, parameter in model.named_parameters()}, expected)
    assert walks == [1]


class Counting(ModelHook):
    """A hook that counts the forward passes."""

    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("first", ["hooked", "enabled"])
@pytest.mark.parametrize("removed", [False, True])
def test_accelerate_hooks_survive_switching(first, removed, walks):
    expected, model, hook = gradients(trunk()), trunk(), Counting()
    if first == "enabled":
        enable(model)
    add_hook_to_module(model, hook)
    if first == "hooked":
        enable(model)
    if removed:
        remove_hook_from_module(model)
    assert_switchable(model, expected, walks)
    assert hook.calls == (0 if removed else 3)


def test_forward_replaced_on_the_instance_is_refused():
    model = trunk()
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ValueError, match="forward of this Mamba2Model has been replaced on the instance"):
        enable(model)
    assert type(model) is Mamba2Model and not is_multi_axis_checkpointed(model)


@pytest.mark.parametrize("cls", ["trunk", "causal model", "subclass"])
def test_wrapper_of_the_forward_survives_disabling(cls):
    """Mixed precision in accelerate wraps the forward like this."""
    model = trunk({"trunk": Mamba2Model, "causal model": Mamba2ForCausalLM, "subclass": Doubling}[cls])
    with torch.no_grad():
        expected = model(IDS)[0]
    enable(model)
    forward = model.forward
    model.forward = MethodType(lambda self, *args, **options: forward(*args, **options), model)
    disable_multi_axis_checkpointing(model)
    torch.testing.assert_close(model(IDS)[0], expected)


class Doubling(Mamba2Model):
    """Its forward calls the stock forward."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = 2 * self.embeddings(input_ids)
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)


class Looping(Mamba2Model):
    """Its forward replaces the stock forward."""

    def forward(self, input_ids=None, **kwargs):
        rows = self.embeddings(input_ids)
        for layer in self.layers:
            rows = layer(rows)
        return multi_axis_mamba2.Mamba2Output(last_hidden_state=self.norm_f(rows))


def test_subclass_keeps_its_own_forward(walks):
    expected = gradients(trunk(Doubling))
    for model in (enable(trunk(Doubling)), pickled(enable(trunk(Doubling))), copy.deepcopy(enable(trunk(Doubling)))):
        assert isinstance(model, Doubling)
        assert_same(gradients(model), expected)
    assert walks == [1, 1, 1]
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).last_hidden_state, trunk(Doubling).eval()(IDS).last_hidden_state)
    assert type(disable_multi_axis_checkpointing(model)) is Doubling


def test_subclass_that_does_not_call_the_stock_forward_is_refused():
    model = enable(trunk(Looping))
    with pytest.raises(RuntimeError, match=r"Looping has a forward of its own.*super\(\).forward"):
        model(IDS)
    with torch.no_grad():
        assert torch.equal(model(IDS).last_hidden_state, trunk(Looping)(IDS).last_hidden_state)
    disable_multi_axis_checkpointing(model)
    model(IDS).last_hidden_state.sum().backward()


def test_class_derived_from_the_swapped_class_can_be_disabled(walks):
    """`fully_shard` derives such a class. Disabling then keeps the class, and removes the settings only."""
    expected, model = gradients(trunk()), enable(trunk())
    model.__class__ = type("Wrapped", (nn.Module, type(model))[1:], {})
    assert_switchable(model, expected, walks)


def test_disabling_removes_the_marks_for_zero_3():
    model = trunk()
    model.layers[1]._z3_leaf = True  # set by the user
    enable(enable(model))
    assert all(layer._z3_leaf for layer in model.layers)
    disable_multi_axis_checkpointing(model)
    assert [hasattr(layer, "_z3_leaf") for layer in model.layers] == [False, True, False]
    enable(model)
    for layer in model.layers:
        layer.ds_id = 0  # DeepSpeed has added its hooks in the meantime, so the marks must stay
    disable_multi_axis_checkpointing(model)
    assert all(layer._z3_leaf for layer in model.layers)


def test_pickled_causal_model_has_a_checkpointed_backbone():
    model = enable(trunk(Mamba2ForCausalLM, num_hidden_layers=2))
    assert isinstance(pickled(model).backbone, multi_axis_mamba2.MultiAxisMamba2Model)
