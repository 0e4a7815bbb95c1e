"""The kernels of mamba-ssm and causal-conv1d, and the one place that changes Transformers' Mamba-2.

Transformers looks up the functions for a layer's convolution and scan in its module at each call. While a model holds
them, dispatchers replace these functions:

- `ssd_scan=True`, a keyword that `Mamba2Model` passes on to the scan, chooses [`ssd_scan`], unless mamba-ssm's kernel,
  which is faster still, can run.
- `whole_layers=False`, a keyword of the same kind, keeps mamba-ssm's kernel for a whole training layer from running:
  it reads the weight of `out_proj`, and would bypass an adapter there.
- Where mamba-ssm or causal-conv1d is installed, Transformers calls it for CPU tensors too, and it fails. Dispatchers
  compute on a CPU in plain PyTorch.

Transformers has its own functions again when no model holds the dispatchers.
"""

import functools
import importlib.util
import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers.models.mamba2 import modeling_mamba2

from .ssd_scan import ssd_scan

_PACKAGES = {
    "causal_conv1d_fn": "causal_conv1d",
    "causal_conv1d_update": "causal_conv1d",
    "mamba2_chunk_scan": "mamba_ssm",
    "mamba2_selective_state_update": "mamba_ssm",
    "mamba2_split_conv1d_scan_combined": "mamba_ssm",
}
_TRANSFORMERS_OWN = {name: getattr(modeling_mamba2, name) for name in _PACKAGES}


class Kernels(NamedTuple):
    """The functions of mamba-ssm; None for each that cannot be used."""

    chunk_scan: Callable | None = None
    split_conv1d_scan: Callable | None = None
    rms_norm: Callable | None = None
    missing: str | None = None  # the reason why there is no `split_conv1d_scan`


@functools.cache
def mamba_ssm_kernels() -> Kernels:
    """Import mamba-ssm's kernels, at the first call only, because the import takes seconds."""
    try:
        from mamba_ssm.ops.triton import ssd_combined

        chunk_scan = ssd_combined.mamba_chunk_scan_combined
        split_conv1d_scan = ssd_combined.mamba_split_conv1d_scan_combined
    except Exception as error:  # a broken installation fails in many ways
        return Kernels(missing=f"mamba-ssm cannot be imported ({type(error).__name__}: {error})")
    if getattr(ssd_combined, "causal_conv1d_fwd_function", None) is None:
        return Kernels(chunk_scan, missing="causal-conv1d, or a release that this mamba-ssm supports, is missing")
    try:
        from mamba_ssm.ops.triton.layer_norm import rms_norm_fn
    except Exception:
        rms_norm_fn = None
    return Kernels(chunk_scan, split_conv1d_scan, rms_norm_fn)


def runs_kernels(device: torch.device) -> bool:
    """Whether Triton's and CUDA's kernels run on a device."""
    return device.type == "cuda"


@dataclass
class _Replacement:
    """A dispatcher and the function that it replaces.

    `installed` says whether the dispatcher is in Transformers' module, perhaps wrapped by somebody else's function.
    """

    replaced: Callable
    dispatcher: Callable
    installed: bool = False


_replacements: dict[str, _Replacement] = {}
_claims: dict[int, weakref.finalize] = {}  # by the owner's id, because a module may define equality with others
_held = False  # whether there are claims: one value for torch.compile to guard, however many models there are
# Reentrant, because the garbage collector may end a claim at any time, even in the thread that has the lock.
_lock = threading.RLock()


def hold(owner: nn.Module) -> None:
    """Keep the dispatchers in Transformers' Mamba-2 until `release(owner)`, or until the owner is garbage-collected.

    Models call this in each forward pass: further calls cost next to nothing, and a copy of an owner, which holds
    nothing yet, starts to hold. While torch.compile traces, the call does nothing, because a graph cannot change
    Transformers.
    """
    if torch.compiler.is_compiling() or id(owner) in _claims:
        return
    with _lock:
        if id(owner) not in _claims:  # another thread may have added it
            claim = _claims[id(owner)] = weakref.finalize(owner, _end_claim, id(owner))
            claim.atexit = False
            _install()


def release(owner: nn.Module) -> None:
    """End the claim of `hold(owner)`; the end of the last claim restores Transformers' functions.

    Where somebody else's function wraps a dispatcher, both stay, and the dispatcher calls the function that it
    replaced.
    """
    with _lock:
        claim = _claims.get(id(owner))
        if claim is not None:
            claim.detach()
        _end_claim(id(owner))


def _end_claim(key: int) -> None:
    with _lock:
        _claims.pop(key, None)
        if not _claims:
            _restore()


def _install() -> None:
    global _held
    _held = True
    for name, transformers_own in _TRANSFORMERS_OWN.items():
        current, known = getattr(modeling_mamba2, name), _replacements.get(name)
        undone = known is not None and current in (known.replaced, transformers_own)
        if known is not None and known.installed and not undone:
            continue
        if known is None or known.replaced is not current:
            # Otherwise the old dispatcher comes back, because graphs of torch.compile are valid for that one only.
            known = _replacements[name] = _Replacement(current, _dispatcher(name, current))
        setattr(modeling_mamba2, name, known.dispatcher)
        known.installed = True


def _restore() -> None:
    global _held
    _held = False
    for name, replacement in _replacements.items():
        if getattr(modeling_mamba2, name) is replacement.dispatcher:
            setattr(modeling_mamba2, name, replacement.replaced)
            replacement.installed = False


def _dispatcher(name: str, chosen: Callable) -> Callable:
    """Wrap the function by which Transformers chooses between a kernel and its plain form."""
    is_scan = name == "mamba2_chunk_scan"
    kernel_installed = _is_installed(_PACKAGES[name])
    has_scan_kernel = is_scan and mamba_ssm_kernels().chunk_scan is not None
    # Transformers' function wraps its plain form.
    plain = inspect.unwrap(chosen)
    if plain is chosen:
        plain = None

    @functools.wraps(chosen)
    def dispatcher(*args, **kwargs):
        if not _held:
            return chosen(*args, **kwargs)
        tensor = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)][0]
        own_scan = kwargs.get("ssd_scan", False)
        whole_layers = kwargs.pop("whole_layers", True)
        if name == "mamba2_split_conv1d_scan_combined" and not whole_layers:
            return None  # the layer then calls the other functions, and its own `out_proj`
        if is_scan:
            kwargs.pop("ssd_scan", None)
            if own_scan and not (has_scan_kernel and runs_kernels(tensor.device)):
                return ssd_scan(*args, **kwargs)
        # The plain forms cannot separate packed sequences; Transformers' function raises the error.
        packed = kwargs.get("seq_idx") is not None or kwargs.get("cu_seqlens") is not None
        # Without kernels, Transformers' function would advise an owner, which passes `ssd_scan`, to install them.
        if plain is not None and tensor.device.type == "cpu" and (kernel_installed or own_scan) and not packed:
            return plain(*args, **kwargs)
        return chosen(*args, **kwargs)

    return dispatcher


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # the package is a stand-in without an import specification
        return True
