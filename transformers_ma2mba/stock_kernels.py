"""Kernels in Transformers' Mamba-2 for devices that have them: where mamba-ssm or causal-conv1d is installed,
Transformers calls it on a CPU too, which it does not know."""

import functools
from collections.abc import Callable

import torch
from transformers.models.mamba2 import modeling_mamba2

_FUNCTIONS = (
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba2_chunk_scan",
    "mamba2_selective_state_update",
    "mamba2_split_conv1d_scan_combined",
)


def keep_kernels_off_the_cpu() -> None:
    """Has Transformers' Mamba-2 compute in plain PyTorch what is on a CPU. Doing it again has no effect."""
    for name in _FUNCTIONS:
        chosen = getattr(modeling_mamba2, name)
        plain = getattr(chosen, "__wrapped__", None)  # Transformers' own form, around which it puts the choice
        if plain is not None and not getattr(chosen, "keeps_off_the_cpu", False):
            setattr(modeling_mamba2, name, _plain_on_a_cpu(chosen, plain))


def _plain_on_a_cpu(chosen: Callable, plain: Callable) -> Callable:
    @functools.wraps(chosen)
    def function(*args, **kwargs):
        tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        # The plain forms cannot keep packed sequences apart; Transformers' choice says so.
        packed = kwargs.get("seq_idx") is not None or kwargs.get("cu_seqlens") is not None
        return (plain if tensor.device.type == "cpu" and not packed else chosen)(*args, **kwargs)

    function.keeps_off_the_cpu = True
    return function
