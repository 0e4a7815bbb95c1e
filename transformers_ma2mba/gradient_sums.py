"""Sums of parameters' gradients over many cells, without losing small shares in large sums."""

import functools
from collections.abc import Callable, Iterable

import torch

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
    what the first cannot hold: as much memory as float32 takes, but the first is the gradient as it is wanted. The sum
    of an embedding's rows is float32 itself: few of its rows change at a time.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]):
        self.sums = dict.fromkeys(parameters)
        self.rests = {}  # of sums in half precision
        self.rows = {}  # of embeddings, at least float32
        self.borrowed = set()  # sums that are still autograd's tensor, which may be another gradient too

    def add(self, parameter: torch.Tensor, gradient: torch.Tensor | None):
        """Adds one cell's share to a parameter's sum; both have the parameter's shape and dtype. None adds nothing."""
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

    def add_rows(self, weight: torch.Tensor, token_ids: torch.Tensor, gradient: torch.Tensor, padding_idx: int | None):
        """Adds the gradient of embeddings that were looked up, without a share as large as the vocabulary.

        Args:
            weight: `(vocab_size, hidden_size)`.
            token_ids: `(batch_size, tokens)`.
            gradient: `(batch_size, tokens, hidden_size)`.
            padding_idx: the token whose embedding is never learned, if there is one.
        """
        if weight not in self.rows:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.rows[weight] = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        token_ids, gradient = token_ids.flatten(), gradient.flatten(0, 1).to(self.rows[weight].dtype)
        if padding_idx is not None:
            gradient = gradient.masked_fill((token_ids == padding_idx)[:, None], 0.0)
        self.rows[weight].index_add_(0, token_ids, gradient)

    def totals(self) -> list[torch.Tensor | None]:
        """The sums in the order of the parameters; None for one that nothing was added to."""
        for weight in list(self.rows):
            total = self.rows.pop(weight)
            self.add(weight, total.to(weight.dtype))
        return list(self.sums.values())
