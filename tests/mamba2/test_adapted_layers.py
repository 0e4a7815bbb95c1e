"""Adapters that a stock layer would bypass, and output projections that a kernel must not read."""

import pytest
from peft import LoraConfig, inject_adapter_in_model
from tiny import tiny_mamba2
from torch import nn

from transformers_ma2mba.mamba2 import has_special_projection, refuse_bypassed_adapters


def adapted_layers(target, **options):
    model = tiny_mamba2()
    config = LoraConfig(target_modules=[target], exclude_modules=["0.mixer." + target], **options)
    return inject_adapter_in_model(config, model.layers)  # for the whole model, PEFT refuses such targets


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_active_adapters_of_a_convolution_are_refused():
    layers = adapted_layers("conv1d", r=96)
    with pytest.raises(ValueError, match=r"layers\.1\.mixer\.conv1d has an adapter, which would have no effect"):
        refuse_bypassed_adapters(layers)
    adapter = layers[1].mixer.conv1d
    adapter.enable_adapters(False)
    refuse_bypassed_adapters(layers)
    adapter.enable_adapters(True)
    adapter.merged_adapters.append("default")
    refuse_bypassed_adapters(layers)


def test_adapters_of_projections_are_used():
    for target in ("in_proj", "out_proj"):
        refuse_bypassed_adapters(adapted_layers(target))
    refuse_bypassed_adapters([nn.Identity()])


def test_special_output_projections():
    assert not has_special_projection(tiny_mamba2().layers)
    assert not has_special_projection(adapted_layers("in_proj"))
    assert not has_special_projection([nn.Identity()])
    assert has_special_projection(adapted_layers("out_proj"))
