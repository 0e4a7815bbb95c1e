"""Addition to a sum that two half-precision tensors hold: its rounded value, and the rest that rounding took away."""

import functools

import torch

from ..mamba2 import kernel_choice

try:
    import triton
    import triton.language as tl
except Exception:  # a broken installation fails in many ways
    triton = None

_ELEMENTS_AT_ONCE = 2**22  # converted to float32 at a time by the plain form
_BLOCK = 2048  # elements of one program of the kernel


def compensated_add(total: torch.Tensor, rest: torch.Tensor, share: torch.Tensor) -> None:
    """Add `share` to the sum `total + rest` in place, with one kernel where Triton runs.

    Args:
        total: the sum rounded to its type, contiguous.
        rest: what the rounding took away, of the same shape and type, contiguous.
        share: the summand, of the same shape and type.
    """
    if kernel_choice.runs_kernels(total.device) and _kernel_compiles(total.device):
        _add_by_kernel(total, rest, share)
    else:
        plain_compensated_add(total, rest, share)


def plain_compensated_add(total: torch.Tensor, rest: torch.Tensor, share: torch.Tensor) -> None:
    """Do the same in plain PyTorch: the reference of the kernel, and its fallback."""
    parts = (tensor.reshape(-1).split(_ELEMENTS_AT_ONCE) for tensor in (total, rest, share))
    for total_part, rest_part, share_part in zip(*parts, strict=True):
        exact = total_part.float().add_(rest_part).add_(share_part)
        total_part.copy_(exact)
        rest_part.copy_(exact.sub_(total_part))


if triton is not None:

    @triton.jit
    def _kernel(total_pointer, rest_pointer, share_pointer, num_elements, BLOCK: tl.constexpr):
        # In 64 bits, because a parameter may have more than 2^31 elements.
        where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = where < num_elements
        total = tl.load(total_pointer + where, inside)
        exact = total.to(tl.float32) + tl.load(rest_pointer + where, inside).to(tl.float32)
        exact += tl.load(share_pointer + where, inside).to(tl.float32)
        rounded = exact.to(total.dtype)
        tl.store(total_pointer + where, rounded, inside)
        tl.store(rest_pointer + where, (exact - rounded.to(tl.float32)).to(total.dtype), inside)


def _add_by_kernel(total: torch.Tensor, rest: torch.Tensor, share: torch.Tensor) -> None:
    grid = (triton.cdiv(total.numel(), _BLOCK),)
    _kernel[grid](total, rest, share.contiguous(), total.numel(), BLOCK=_BLOCK)


@functools.cache
def _kernel_compiles(device: torch.device) -> bool:
    try:
        _add_by_kernel(*torch.zeros(3, 1, dtype=torch.bfloat16, device=device))
    except Exception:  # Triton is missing, or a compiler that it needs
        return False
    return True
