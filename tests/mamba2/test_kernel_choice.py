"""The choice between forms of Transformers' functions, and its duration.

Functions that fail on a CPU, like those of mamba-ssm, stand in for kernels.
"""

import copy
import functools
import gc
import inspect
import io
import pickle
import subprocess
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_text_config
from torch import nn
from transformers import Mamba2ForCausalLM
from transformers.models.mamba2 import modeling_mamba2

from transformers_ma2mba import disable_multi_axis_checkpointing, enable_multi_axis_checkpointing
from transformers_ma2mba.mamba2 import kernel_choice
from transformers_ma2mba.mamba2.kernel_choice import hold, release

NAMES = list(kernel_choice._PACKAGES)


def functions():
    return {name: getattr(modeling_mamba2, name) for name in NAMES}


@pytest.fixture
def own(monkeypatch):
    """Transformers' own functions, in a state without claims of this package's models."""
    gc.collect()  # claims of other tests' models end here, instead of during this test
    monkeypatch.setattr(kernel_choice, "_claims", {})
    monkeypatch.setattr(kernel_choice, "_replacements", {})
    monkeypatch.setattr(kernel_choice, "_held", False)
    for name, function in kernel_choice._TRANSFORMERS_OWN.items():
        monkeypatch.setattr(modeling_mamba2, name, function)
    return functions()


@pytest.fixture
def installed(own, monkeypatch):
    """Pretend that kernels are installed; the fixture lists the names of those called."""
    called = []
    for name in NAMES:

        def kernel(tensor, *args, name=name, **kwargs):
            called.append(name)
            if tensor.device.type == "cpu":
                raise RuntimeError("Expected x.is_cuda() to be true, but got false.")
            return tensor

        kernel = functools.wraps(inspect.unwrap(own[name]))(kernel)
        monkeypatch.setattr(modeling_mamba2, name, kernel)
    monkeypatch.setattr(kernel_choice, "_is_installed", lambda package: True)
    return called


@pytest.fixture
def owner():
    return nn.Identity()


@pytest.fixture
def stock_model():
    torch.manual_seed(0)
    return Mamba2ForCausalLM(tiny_text_config())


def outputs(model):
    token_ids = torch.arange(12).view(1, 12)
    trained = model.train()(input_ids=token_ids, labels=token_ids, use_cache=False).loss
    generated = model.eval().generate(token_ids, max_new_tokens=5, do_sample=False)
    return trained, generated


# The kernels of mamba-ssm


@pytest.fixture
def modules_of_mamba_ssm(monkeypatch):
    """Put modules with the given names and contents in the place of mamba-ssm's."""

    def put(**contents):
        for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        for name, values in contents.items():
            module = SimpleNamespace(**values) if values is not None else None
            monkeypatch.setitem(sys.modules, f"mamba_ssm.ops.triton.{name}", module)
            if module is not None:
                setattr(sys.modules["mamba_ssm.ops.triton"], name, module)
        return kernel_choice.mamba_ssm_kernels.__wrapped__()

    return put


SSD_COMBINED = {"mamba_chunk_scan_combined": "scan", "mamba_split_conv1d_scan_combined": "split"}


def test_kernels_of_a_whole_installation(modules_of_mamba_ssm):
    whole = SSD_COMBINED | {"causal_conv1d_fwd_function": print}
    found = modules_of_mamba_ssm(ssd_combined=whole, layer_norm={"rms_norm_fn": "norm"})
    assert found == kernel_choice.Kernels("scan", "split", "norm")
    assert modules_of_mamba_ssm(ssd_combined=whole, layer_norm=None) == kernel_choice.Kernels("scan", "split")


def test_kernels_of_a_missing_or_partial_installation(modules_of_mamba_ssm):
    missing = modules_of_mamba_ssm(ssd_combined=None)
    assert missing.chunk_scan is None and "mamba-ssm cannot be imported (" in missing.missing
    old = modules_of_mamba_ssm(ssd_combined={"mamba_chunk_scan_combined": "scan"})
    assert old.chunk_scan is None and "mamba-ssm cannot be imported (AttributeError" in old.missing
    alone = modules_of_mamba_ssm(ssd_combined=SSD_COMBINED | {"causal_conv1d_fwd_function": None})
    assert alone[:3] == ("scan", None, None) and "causal-conv1d" in alone.missing


# The dispatchers' choice


def test_model_on_a_cpu_calls_no_kernels(installed, owner, stock_model):
    with pytest.raises(RuntimeError, match="is_cuda"):
        outputs(stock_model)
    installed.clear()
    hold(owner)
    loss, generated = outputs(stock_model)
    assert loss.isfinite() and generated.shape == (1, 17)
    assert not installed


def test_a_caller_may_exclude_the_kernel_of_whole_layers(installed, owner):
    hold(owner)
    whole = "mamba2_split_conv1d_scan_combined"
    results = [getattr(modeling_mamba2, name)(torch.empty(1, device="meta"), whole_layers=False) for name in NAMES]
    assert installed == [name for name in NAMES if name != whole]
    assert results[NAMES.index(whole)] is None  # the layer then calls the other functions


def test_other_devices_keep_transformers_choice(installed, owner):
    hold(owner)
    for name in NAMES:
        getattr(modeling_mamba2, name)(torch.empty(1, device="meta"))
    assert installed == NAMES


def test_packed_sequences_are_left_to_transformers(installed, owner):
    hold(owner)
    with pytest.raises(RuntimeError, match="is_cuda"):
        modeling_mamba2.causal_conv1d_fn(torch.zeros(1, 1, 4), torch.zeros(1, 4), seq_idx=torch.zeros(1, 4))


def test_without_kernels_other_models_get_transformers_own(own, owner, monkeypatch):
    """Only calls of this package bypass Transformers' functions, with their warnings and errors."""
    called = []
    for name in NAMES:

        def function(*args, name=name, **kwargs):
            called.append((name, args, kwargs))

        monkeypatch.setattr(modeling_mamba2, name, functools.wraps(inspect.unwrap(own[name]))(function))
    monkeypatch.setattr(kernel_choice, "_is_installed", lambda package: False)
    hold(owner)
    tensor = torch.zeros(1)
    for name in NAMES:
        getattr(modeling_mamba2, name)(tensor, 1, anything=2)
    assert called == [(name, (tensor, 1), {"anything": 2}) for name in NAMES]
    called.clear()
    assert modeling_mamba2.causal_conv1d_fn(torch.zeros(1, 1, 4), torch.ones(1, 2), ssd_scan=True).shape == (1, 1, 4)
    assert not called


def test_ssd_scan_is_chosen_unless_the_kernel_runs(own, owner, monkeypatch):
    calls = []

    tensor = torch.zeros(1, device="meta")
    monkeypatch.setattr(kernel_choice, "runs_kernels", lambda device: device.type == "meta")
    monkeypatch.setattr(kernel_choice, "ssd_scan", lambda *args, **kwargs: calls.append(("own", args[1:], kwargs)))
    for importable in (True, False):
        scan = functools.wraps(own["mamba2_chunk_scan"])(lambda *args, **kwargs: calls.append((args[1:], kwargs)))
        monkeypatch.setattr(modeling_mamba2, "mamba2_chunk_scan", scan)
        kernels = kernel_choice.Kernels(chunk_scan=scan if importable else None)
        monkeypatch.setattr(kernel_choice, "mamba_ssm_kernels", lambda kernels=kernels: kernels)
        hold(owner)
        modeling_mamba2.mamba2_chunk_scan(tensor, 1, ssd_scan=True, chunk_size=2)
        modeling_mamba2.mamba2_chunk_scan(tensor, 1, ssd_scan=False, chunk_size=2)
        release(owner)
    stock = ((1,), {"chunk_size": 2})
    assert calls == [stock, stock, ("own", *stock), stock]


def test_dispatchers_have_the_signature_of_the_replaced_function(own, owner):
    hold(owner)
    for name, function in functions().items():
        assert function is not own[name]
        assert function.__name__ == name and inspect.signature(function) == inspect.signature(own[name])


# The duration


def test_last_release_restores_transformers(own, owner):
    other = nn.Identity()
    hold(owner)
    hold(owner)
    hold(other)
    dispatchers = functions()
    assert all(dispatchers[name] is not own[name] for name in NAMES)
    release(owner)
    assert functions() == dispatchers
    release(owner)  # has no claim any more
    assert functions() == dispatchers
    release(other)
    assert functions() == own


def test_dispatchers_are_reused(own, owner):
    """Graphs that torch.compile made with them stay valid for the next model."""
    hold(owner)
    dispatchers = functions()
    release(owner)
    hold(nn.Identity())  # collected at once
    hold(owner)
    assert functions() == dispatchers


def test_claim_ends_with_its_owner(own):
    owner = nn.Identity()
    owner.cycle = [owner]
    hold(owner)
    del owner
    gc.collect()
    assert functions() == own and not kernel_choice._claims


def test_equal_owners_have_separate_claims(own):
    class Equal(nn.Module):
        def __eq__(self, other):
            return True

        def __hash__(self):
            return 0

    first, second = Equal(), Equal()
    hold(first)
    hold(second)
    release(first)
    assert functions() != own
    release(second)
    assert functions() == own


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_a_file])
def test_copy_makes_its_own_claim(own, duplicate):
    model = tiny_model(tiny_config())
    duplicated = duplicate(model)
    del model
    gc.collect()
    assert all(function is not own[name] for name, function in functions().items())
    kernel_choice._end_claim(id(duplicated.model))
    assert functions() == own
    duplicated(input_ids=torch.arange(12).view(1, 12))
    assert all(function is not own[name] for name, function in functions().items())


def test_checkpointed_copy_makes_its_own_claim(own, stock_model):
    model = enable_multi_axis_checkpointing(stock_model).train()
    duplicated = copy.deepcopy(model)
    disable_multi_axis_checkpointing(model)
    assert functions() == own
    ids = torch.arange(12).view(1, 12)
    duplicated(input_ids=ids, labels=ids).loss.backward()
    assert all(function is not own[name] for name, function in functions().items())


def test_wrapper_around_a_dispatcher_stays(own, owner, monkeypatch):
    hold(owner)
    dispatcher = modeling_mamba2.mamba2_chunk_scan
    over = functools.wraps(dispatcher)(lambda *args, **kwargs: dispatcher(*args, **kwargs))
    monkeypatch.setattr(modeling_mamba2, "mamba2_chunk_scan", over)
    hold(nn.Identity())
    assert modeling_mamba2.mamba2_chunk_scan is over
    release(owner)
    assert functions() == own | {"mamba2_chunk_scan": over}

    # The dispatcher passes all arguments on to Transformers' own function.
    monkeypatch.setattr(kernel_choice, "ssd_scan", None)
    states = torch.randn(1, 5, 2, 3)
    arguments = (states, torch.rand(1, 5, 2), -torch.ones(2), torch.randn(1, 5, 1, 4), torch.randn(1, 5, 1, 4), 8)
    found = modeling_mamba2.mamba2_chunk_scan(*arguments, ssd_scan=True)
    assert torch.equal(found, own["mamba2_chunk_scan"](*arguments))

    # It chooses again for the next owner.
    monkeypatch.setattr(kernel_choice, "ssd_scan", lambda *args, **kwargs: "ssd_scan")
    hold(owner)
    assert modeling_mamba2.mamba2_chunk_scan is over
    assert modeling_mamba2.mamba2_chunk_scan(*arguments, ssd_scan=True) == "ssd_scan"
    monkeypatch.setattr(modeling_mamba2, "mamba2_chunk_scan", dispatcher)
    release(owner)
    assert functions() == own


def test_removed_dispatchers_return_with_the_next_owner(own, owner, monkeypatch):
    hold(owner)
    dispatchers = functions()
    for name, function in own.items():
        monkeypatch.setattr(modeling_mamba2, name, function)
    other = nn.Identity()
    hold(other)
    assert functions() == dispatchers
    release(owner)
    release(other)
    assert functions() == own


def test_earlier_replacement_is_restored(own, owner, monkeypatch):
    def function(tensor):
        return tensor

    monkeypatch.setattr(modeling_mamba2, "causal_conv1d_fn", function)
    hold(owner)
    assert modeling_mamba2.causal_conv1d_fn(torch.ones(1)) == 1  # the function has no plain form, so it is called
    release(owner)
    assert functions() == own | {"causal_conv1d_fn": function}


def test_nothing_changes_while_torch_compile_traces(own, owner):
    def function(tensor):
        hold(owner)
        return tensor + 1

    assert torch.compile(function, backend="eager", fullgraph=True)(torch.ones(1)) == 2
    assert functions() == own


def test_many_threads_restore_transformers(own):
    errors = []

    def work():
        try:
            for turn in range(100):
                owner = nn.Identity()
                hold(owner)
                assert modeling_mamba2.mamba2_chunk_scan is not own["mamba2_chunk_scan"]
                if turn % 2:  # the garbage collector ends the other claims
                    release(owner)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    gc.collect()
    assert functions() == own and not kernel_choice._claims


IN_A_PROCESS = """
import gc
import torch
from transformers import Mamba2ForCausalLM
from transformers.models.mamba2 import modeling_mamba2

def attributes():
    return {name: id(value) for name, value in vars(modeling_mamba2).items()}

before = attributes()
import transformers_ma2mba
from tiny import tiny_config, tiny_model, tiny_text_config
assert attributes() == before, "import"

ids = torch.arange(12).view(1, 12)
model = tiny_model(tiny_config())
assert attributes() != before
model.train()(input_ids=ids, labels=ids).loss.backward()
del model
gc.collect()
assert attributes() == before, "the last model"

model = Mamba2ForCausalLM(tiny_text_config()).train()
transformers_ma2mba.enable_multi_axis_checkpointing(model)
assert attributes() != before
model(input_ids=ids, labels=ids).loss.backward()
transformers_ma2mba.disable_multi_axis_checkpointing(model)
assert attributes() == before, "disable"
transformers_ma2mba.enable_multi_axis_checkpointing(model)
del model
gc.collect()
assert attributes() == before, "the last checkpointed model"
"""


def test_process_leaves_transformers_unchanged():
    path = [*sys.path]  # with the directories of `tiny` and of this package
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}\n{IN_A_PROCESS}"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
