"""Which form of Transformers' functions is called, by the device: kernels are played by functions that fail on a CPU,
as those of mamba-ssm do."""

import functools

import pytest
import torch
from tiny import tiny_text_config
from transformers import Mamba2ForCausalLM
from transformers.models.mamba2 import modeling_mamba2

from transformers_ma2mba import stock_kernels
from transformers_ma2mba.stock_kernels import keep_kernels_off_the_cpu


def transformers_own(name):
    """The plain form of a function, under whatever has been put around it."""
    function = getattr(modeling_mamba2, name)
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


@pytest.fixture
def installed(monkeypatch):
    """As if kernels were installed, and this package not yet imported; returns the names of those called."""
    called = []
    for name in stock_kernels._FUNCTIONS:

        def kernel(tensor, *args, name=name, **kwargs):
            called.append(name)
            if tensor.device.type == "cpu":
                raise RuntimeError("Expected x.is_cuda() to be true, but got false.")
            return tensor

        monkeypatch.setattr(modeling_mamba2, name, functools.wraps(transformers_own(name))(kernel))
    return called


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Mamba2ForCausalLM(tiny_text_config())


def outputs(model):
    token_ids = torch.arange(12).view(1, 12)
    trained = model.train()(input_ids=token_ids, labels=token_ids, use_cache=False).loss
    generated = model.eval().generate(token_ids, max_new_tokens=5, do_sample=False)
    return trained, generated


def test_a_model_on_a_cpu_needs_no_kernels(installed, model):
    with pytest.raises(RuntimeError, match="is_cuda"):
        outputs(model)
    installed.clear()
    keep_kernels_off_the_cpu()
    loss, generated = outputs(model)
    assert loss.isfinite() and generated.shape == (1, 17)
    assert not installed


def test_other_devices_have_transformers_choice(installed):
    keep_kernels_off_the_cpu()
    for name in stock_kernels._FUNCTIONS:
        getattr(modeling_mamba2, name)(torch.empty(1, device="meta"))
    assert installed == list(stock_kernels._FUNCTIONS)


def test_packed_sequences_are_left_to_transformers(installed):
    keep_kernels_off_the_cpu()
    with pytest.raises(RuntimeError, match="is_cuda"):
        modeling_mamba2.causal_conv1d_fn(torch.zeros(1, 1, 4), torch.zeros(1, 4), seq_idx=torch.zeros(1, 4))


def test_twice_is_once(installed):
    keep_kernels_off_the_cpu()
    once = modeling_mamba2.causal_conv1d_fn
    keep_kernels_off_the_cpu()
    assert modeling_mamba2.causal_conv1d_fn is once


def test_a_function_without_a_plain_form_stays(monkeypatch):
    def function(tensor):
        return tensor

    monkeypatch.setattr(modeling_mamba2, "causal_conv1d_fn", function)
    keep_kernels_off_the_cpu()
    assert modeling_mamba2.causal_conv1d_fn is function


def test_importing_the_package_does_it():
    for name in stock_kernels._FUNCTIONS:
        function = getattr(modeling_mamba2, name)
        while not getattr(function, "keeps_off_the_cpu", False):
            function = function.__wrapped__
