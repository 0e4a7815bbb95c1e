"""The kernel that adds to a sum in two numbers, against its plain form: on a GPU, or in Triton's interpreter."""

import os

import pytest
import torch

from transformers_ma2mba import gradient_sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter rounds to bfloat16 otherwise than a GPU does where two numbers are equally near.
DTYPES = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or make test-kernels"
)


@pytest.mark.parametrize("shape", [(1,), (2048,), (2049,), (77, 131)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_plain_form(dtype, shape):
    from transformers_ma2mba.compensated_add import compensated_add

    torch.manual_seed(0)
    sums = [[torch.zeros(shape, dtype=dtype, device=DEVICE) for _ in range(2)] for _ in range(2)]
    for _ in range(30):
        share = torch.randn(shape[::-1]).to(DEVICE, dtype)
        share = share.T if len(shape) == 2 else share
        gradient_sums.compensated_add(*sums[0], share)
        compensated_add(*sums[1], share)
    for plain, kernel in zip(*sums, strict=True):
        assert plain.any() and torch.equal(plain, kernel)
