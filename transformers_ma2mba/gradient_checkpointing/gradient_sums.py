"""Sums of parameters' gradients over many cells, without losing small shares in large sums."""

from collections.abc import Iterable

import torch

from .compensated_add import compensated_add


class GradientSums:
    """The gradients of parameters, summed cell by cell.

    A sum in half precision would lose shares that are small beside it. So a second tensor of that precision holds the
    rest that the first cannot. Both take as much memory as float32, and the first is the final gradient. The sum of an
    embedding's rows is in float32, because few of its rows change at a time.

    Args:
        parameters: the parameters, in the order in which `totals` returns their sums.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]):
        self.sums = dict.fromkeys(parameters)
        self.rests = {}  # of sums in half precision
        self.rows = {}  # sums of embeddings' rows, at least float32
        self.borrowed = set()  # parameters whose sum is still autograd's tensor, perhaps another gradient too

    def add(self, parameter: torch.Tensor, gradient: torch.Tensor | None):
        """Add one cell's share to the sum of a parameter.

        Args:
            parameter: one of the parameters.
            gradient: the share, of the parameter's shape and type, which stays as it is; None adds nothing.
        """
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
        compensated_add(total, self.rests[parameter], gradient)

    def add_rows(self, weight: torch.Tensor, token_ids: torch.Tensor, gradient: torch.Tensor, padding_idx: int | None):
        """Add the gradient of embeddings that were looked up, without a tensor as large as the vocabulary.

        Args:
            weight: `(vocab_size, hidden_size)`.
            token_ids: `(batch_size, tokens)`.
            gradient: `(batch_size, tokens, hidden_size)`.
            padding_idx: the token whose embedding is not trained, if there is one.
        """
        if weight not in self.rows:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.rows[weight] = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        token_ids, gradient = token_ids.flatten(), gradient.flatten(0, 1).to(self.rows[weight].dtype)
        if padding_idx is not None:
            gradient = gradient.masked_fill((token_ids == padding_idx)[:, None], 0.0)
        self.rows[weight].index_add_(0, token_ids, gradient)

    def totals(self) -> list[torch.Tensor | None]:
        """Return the sums in the order of the parameters; None for a parameter without shares."""
        for weight in list(self.rows):
            total = self.rows.pop(weight)
            self.add(weight, total.to(weight.dtype))
        return list(self.sums.values())
