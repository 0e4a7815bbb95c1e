"""Sums of gradients are exact in float64, and do not lose small shares in half precision."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from transformers_ma2mba.gradient_checkpointing import compensated_add
from transformers_ma2mba.gradient_checkpointing.gradient_sums import GradientSums


def parameters(*shapes, dtype=torch.float64):
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]


def test_sums_in_the_order_of_the_parameters():
    first, second = parameters((3, 2), (4,))
    sums = GradientSums([first, second])
    shares = [torch.randn(3, 2, dtype=torch.float64) for _ in range(5)]
    for share in shares:
        sums.add(first, share)
    sums.add(first, None)
    total, nothing = sums.totals()
    torch.testing.assert_close(total, sum(shares), rtol=1e-14, atol=0)
    assert nothing is None


def test_a_parameter_without_shares_has_no_sum():
    """The sum is None instead of zeros, which would look like a computed gradient."""
    assert GradientSums(parameters((3, 2), (4,))).totals() == [None, None]


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_embedding_rows_are_added_by_index(dtype, padding_idx):
    torch.manual_seed(0)
    embedding = nn.Embedding(11, 4, padding_idx=padding_idx, dtype=dtype)
    exact = nn.Embedding(11, 4, padding_idx=padding_idx, dtype=torch.float64)
    sums = GradientSums([embedding.weight])
    for _ in range(300):
        token_ids, gradient = torch.randint(0, 7, (2, 5)), torch.randn(2, 5, 4).to(dtype)
        sums.add_rows(embedding.weight, token_ids, gradient, padding_idx)
        exact(token_ids).backward(gradient.double())
    share = torch.ones(11, 4, dtype=dtype)
    sums.add(embedding.weight, share)  # as if the weight had another use
    (total,) = sums.totals()
    assert total.dtype == dtype
    # bfloat16 loses no more than by rounding the whole sum once, and once again with the share.
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-4, torch.bfloat16: 1e-3}[dtype]
    torch.testing.assert_close(total.double(), exact.weight.grad + 1, rtol=torch.finfo(dtype).eps, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_shares_are_not_modified(dtype):
    """Autograd may return one tensor as the gradient of several parameters."""
    first, second = parameters((3, 2), (3, 2), dtype=dtype)
    sums = GradientSums([first, second])
    shared = torch.ones(3, 2, dtype=dtype)
    for parameter in (first, second, first):
        sums.add(parameter, shared)
    assert torch.equal(shared, torch.ones(3, 2, dtype=dtype))
    assert [total[0, 0].item() for total in sums.totals()] == [2, 1]


@pytest.mark.parametrize("at_once", [4, 2**22], ids=["in parts", "at once"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_does_not_lose_small_shares(dtype, at_once, monkeypatch):
    monkeypatch.setattr(compensated_add, "_ELEMENTS_AT_ONCE", at_once)
    torch.manual_seed(0)
    (parameter,) = parameters((5, 7), dtype=dtype)
    sums = GradientSums([parameter])
    naive = torch.zeros(5, 7, dtype=dtype)
    exact = torch.zeros(5, 7, dtype=torch.float64)
    for _ in range(2000):
        share = torch.rand(7, 5).to(dtype).T  # not contiguous, as gradients of transposed weights are
        sums.add(parameter, share)
        naive += share
        exact += share
    (total,) = sums.totals()
    assert total.dtype == dtype

    def error(tensor):
        return ((tensor.double() - exact).abs() / exact).max().item()

    half_a_unit = torch.finfo(dtype).eps / 2
    assert error(total) < 1.1 * half_a_unit  # as if the sum were exact and rounded once
    assert error(naive) > 20 * half_a_unit


def test_package_imports_without_triton():
    """The plain form remains where Triton is missing, or its installation is broken."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from transformers_ma2mba.gradient_checkpointing.compensated_add import compensated_add, triton\n"
        "tensors = torch.ones(3, 4, dtype=torch.bfloat16)\n"
        "compensated_add(*tensors)\n"
        "assert triton is None and (tensors[0] == 3).all()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
