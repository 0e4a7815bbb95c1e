"""The kernel that adds to a sum in two tensors, against its plain form: on a GPU, or in Triton's interpreter."""

import pytest
import torch

from transformers_ma2mba.gradient_checkpointing import compensated_add as module
from transformers_ma2mba.gradient_checkpointing.compensated_add import compensated_add, plain_compensated_add

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter breaks ties in rounding to bfloat16 differently from a GPU.
DTYPES = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@pytest.mark.parametrize("shape", [(1,), (2048,), (2049,), (77, 131)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_equals_plain_form(dtype, shape, monkeypatch):
    monkeypatch.setattr(module, "plain_compensated_add", None)  # the kernel is chosen
    torch.manual_seed(0)
    sums = [[torch.zeros(shape, dtype=dtype, device=DEVICE) for _ in range(2)] for _ in range(2)]
    for _ in range(30):
        share = torch.randn(shape[::-1]).to(DEVICE, dtype)
        share = share.T if len(shape) == 2 else share
        plain_compensated_add(*sums[0], share)
        compensated_add(*sums[1], share)
    for plain, kernel in zip(*sums, strict=True):
        assert plain.any() and torch.equal(plain, kernel)
