"""Comparisons of tensors, and of the tensors that a computation makes."""

from collections.abc import Mapping

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def assert_same(actual, expected, tolerance=1e-10, smallest_norm=0.0, nonzero=False):
    """Assert that named tensors, or sequences of tensors, have the same types, shapes and values.

    Args:
        tolerance: bound on the norm of the difference, relative to the norm of the expected tensor.
        smallest_norm: replaces smaller norms in this bound, for gradients that are zero up to rounding.
        nonzero: whether each expected tensor must differ from zero.
    """
    if not isinstance(expected, Mapping):
        actual, expected = dict(enumerate(actual)), dict(enumerate(expected))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor is None:
            assert actual[name] is None, name
            continue
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
        difference, norm = (actual[name] - tensor).norm().item(), tensor.norm().item()
        assert difference <= tolerance * max(norm, smallest_norm), (name, difference, norm)
        assert norm > 0 or not nonzero, name


class LargestTensor(TorchDispatchMode):
    """The number of elements in the largest storage that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result
