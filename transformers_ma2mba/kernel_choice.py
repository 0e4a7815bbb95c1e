"""Which kernels there are for the scan, and the one place that changes Transformers' Mamba-2.

Transformers looks up the functions for a layer's convolution and scan in its module at each call. While some model
holds them, dispatchers stand in their place:

- `ssd_scan=True`, a keyword that `Mamba2Model` hands down to the scan, chooses [`ssd_scan`], unless mamba-ssm's
  kernel runs, which is faster still.
- Where mamba-ssm or causal-conv1d is installed, Transformers calls it on a CPU too, which it does not know. What is on
  a CPU is computed in plain PyTorch.

The last model to go leaves Transformers as it was.
"""

import functools
import importlib.util
import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass
class _Replacement:
    """A dispatcher, the function that it replaces, and whether it is in Transformers' module: there itself, or under a
    function that somebody else has put over it."""

    replaced: Callable
    dispatcher: Callable
    installed: bool = False


_replacements: dict[str, _Replacement] = {}
_claims: dict[int, weakref.finalize] = {}  # by the owner's id, as modules may say that they equal others
_held = False  # whether there are claims: one value for torch.compile to watch, however many models come and go
# Reentrant, as the garbage collector may end a claim at any time, in the thread that has the lock too.
_lock = threading.RLock()


def hold(owner: nn.Module) -> None:
    """Keeps the dispatchers in Transformers' Mamba-2 until `release(owner)`, or until the owner is garbage-collected.

    To hold what is held costs next to nothing. A copy of an owner holds nothing until it is called. It does nothing in
    a graph that torch.compile is making, which cannot change Transformers.
    """
    if torch.compiler.is_compiling() or id(owner) in _claims:
        return
    with _lock:
        if id(owner) not in _claims:  # another thread may have been faster
            claim = _claims[id(owner)] = weakref.finalize(owner, _end_claim, id(owner))
            claim.atexit = False
            _install()


def release(owner: nn.Module) -> None:
    """Gives up what `hold(owner)` claimed. The last one restores Transformers' functions. Where somebody else has put
    a function over a dispatcher, that stays, and passes on what it is given."""
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
            # The same one again wherever possible: graphs of torch.compile are good for the functions that they saw.
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
    """What stands in the place of Transformers' choice between a kernel and its own plain form."""
    is_scan = name == "mamba2_chunk_scan"
    kernel_installed = _is_installed(_PACKAGES[name])
    scan_kernel_runs = is_scan and _scan_kernel_is_importable()
    # Transformers puts its choice around the plain form.
    plain = inspect.unwrap(chosen)
    if plain is chosen:
        plain = None

    @functools.wraps(chosen)
    def dispatcher(*args, **kwargs):
        if not _held:
            return chosen(*args, **kwargs)
        tensor = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)][0]
        own_scan = kwargs.get("ssd_scan", False)
        if is_scan:
            kwargs.pop("ssd_scan", None)
            if own_scan and not (tensor.is_cuda and scan_kernel_runs):
                return ssd_scan(*args, **kwargs)
        # The plain forms cannot keep packed sequences apart; Transformers' choice says so.
        packed = kwargs.get("seq_idx") is not None or kwargs.get("cu_seqlens") is not None
        # Without kernels, it would tell an owner, who calls with `ssd_scan`, to install what no CPU can run.
        if plain is not None and tensor.device.type == "cpu" and (kernel_installed or own_scan) and not packed:
            return plain(*args, **kwargs)
        return chosen(*args, **kwargs)

    return dispatcher


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # somebody's stand-in for the package, without what Python's own imports have
        return True


@functools.cache
def _scan_kernel_is_importable() -> bool:
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # noqa: F401
    except Exception:  # as Transformers does: a broken installation fails in many ways
        return False
    return True
