"""Sums of parameters' gradients over many cells, without losing small shares in large sums."""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import nn

_NUMBERS_AT_ONCE = 2**22  # that are float32 on the way


@functools.cache
def _kernel(device: torch.device) -> Callable | None:
    """What does the same as `compensated_add` below in one kernel, if that can be compiled here."""
    try:
        from .compensated_add import compensated_add

        compensated_add(*torch.zeros(3, 1, dtype=torch.bfloat16, device=device))
    except Exception:  # no Triton, or none of the compilers that it needs
        return None
    return compensated_add


def compensated_add(total: torch.Tensor, rest: torch.Tensor, share: torch.Tensor):
    """Adds `share` to the sum that is `total` plus `rest`, in place; the first two are contiguous."""
    numbers = (tensor.reshape(-1).split(_NUMBERS_AT_ONCE) for tensor in (total, rest, share))
    for total_part, rest_part, share_part in zip(*numbers, strict=True):
        exact = total_part.float().add_(rest_part).add_(share_part)
        total_part.copy_(exact)
        rest_part.copy_(exact.sub_(total_part))


class GradientSums:
    """The gradients of parameters, summed cell by cell.

    A half-precision sum would round away what is small beside it. So it has a second number of that precision, for
    what the first cannot hold: as much memory as float32 takes, but the first is the gradient as it is wanted.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.sums = dict.fromkeys(parameters)
        self.rests = {}  # of sums in half precision
        self.borrowed = set()  # sums that are still autograd's tensor, which may be another gradient too

    def add(self, parameter: nn.Parameter, gradient: torch.Tensor | None):
        if gradient is None:
            return
        total = self.sums[parameter]
        if total is None:
            self.sums[parameter] = gradient
            self.borrowed.add(parameter)
            return
        if parameter in self.borrowed:
            self.sums[parameter] = total = total.clone(memory_format=torch.contiguous_format)
            self.borrowed.remove(parameter)
        if total.dtype.itemsize >= 4:
            total += gradient
            return
        if parameter not in self.rests:
            self.rests[parameter] = torch.zeros_like(total)
        add = _kernel(total.device) if total.is_cuda else None
        (add or compensated_add)(total, self.rests[parameter], gradient)

    def totals(self) -> list[torch.Tensor | None]:
        """The sums in the order of the parameters; None for one that nothing was added to."""
        if not any(total is not None for total in self.sums.values()):
            # Nothing that is wanted depends on them. The plain run gives zeros, and other processes wait for them.
            return [torch.zeros_like(parameter) for parameter in self.sums]
        return list(self.sums.values())
