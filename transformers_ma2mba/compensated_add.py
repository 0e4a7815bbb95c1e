"""A sum in two half-precision numbers, by one kernel where plain PyTorch needs six. For where there is Triton."""

import torch
import triton
import triton.language as tl

_BLOCK = 2048  # numbers of one program


@triton.jit
def _add(total_pointer, rest_pointer, share_pointer, num_elements, BLOCK: tl.constexpr):
    # Parameters of more than 2^31 numbers are rare, but not unheard of.
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = where < num_elements
    total = tl.load(total_pointer + where, inside)
    exact = total.to(tl.float32) + tl.load(rest_pointer + where, inside).to(tl.float32)
    exact += tl.load(share_pointer + where, inside).to(tl.float32)
    rounded = exact.to(total.dtype)
    tl.store(total_pointer + where, rounded, inside)
    tl.store(rest_pointer + where, (exact - rounded.to(tl.float32)).to(total.dtype), inside)


def compensated_add(total: torch.Tensor, rest: torch.Tensor, share: torch.Tensor):
    """Adds `share` to the sum that is `total` plus `rest`, in place; all of one shape and type, the first two
    contiguous."""
    num_elements = total.numel()
    _add[(triton.cdiv(num_elements, _BLOCK),)](total, rest, share.contiguous(), num_elements, BLOCK=_BLOCK)
