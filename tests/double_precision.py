"""Stock Mamba-2 in float64 throughout, so that no rounding to float32 blurs a comparison."""

import torch
from transformers.models.mamba2 import modeling_mamba2


class DoubleTorch:
    """The module `torch`, with float64 under the name of float32."""

    def __getattr__(self, name):
        return getattr(torch, "float64" if name == "float32" else name)


def compute_in_double(monkeypatch):
    """Replace the conversions to float32 in norms, residuals, A, the stock scan and the loss by float64."""
    monkeypatch.setattr(modeling_mamba2, "torch", DoubleTorch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
