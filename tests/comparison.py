"""Comparison of tensors by their norms."""

from collections.abc import Mapping


def assert_same(actual, expected, tolerance=1e-10, smallest_norm=0.0, nonzero=False):
    """Asserts that named tensors, or tensors in order, agree in type and shape, and in value to a tolerance.

    Args:
        tolerance: relative to the norm of each expected tensor.
        smallest_norm: taken for smaller norms, such as those of gradients that are zero but for rounding.
        nonzero: whether expected tensors must differ from zero.
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
