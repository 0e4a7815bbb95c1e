"""Adapters and quantized weights in stock layers, whose mixers and kernels read some weights without calling a module.

A mixer never calls its `conv1d`, and mamba-ssm's kernel for a training layer does not call `out_proj` either. Both
would bypass an adapter, and the kernel cannot read integer weights.
"""

from collections.abc import Iterable

from torch import nn


def refuse_bypassed_adapters(layers: Iterable[nn.Module]):
    """Refuse active adapters on the convolution of a stock layer, as PEFT does for stock Mamba-2 models.

    Raises:
        ValueError: if a layer has one.
    """
    for index, layer in enumerate(layers):
        conv1d = getattr(getattr(layer, "mixer", None), "conv1d", None)
        adapted = hasattr(conv1d, "base_layer") and hasattr(conv1d, "merged_adapters")
        if adapted and conv1d.active_adapters and not (conv1d.merged or conv1d.disable_adapters):
            raise ValueError(
                f"layers.{index}.mixer.conv1d has an adapter, which would have no effect: a Mamba-2 layer reads the "
                f"weight of its convolution without calling the module. Take conv1d out of target_modules."
            )


def has_special_projection(layers: Iterable[nn.Module]) -> bool:
    """Tell whether a layer's output projection is another module than a plain one: adapted or quantized."""
    mixers = (getattr(layer, "mixer", None) for layer in layers)
    return any(type(getattr(mixer, "out_proj", None)) not in (nn.Linear, type(None)) for mixer in mixers)
