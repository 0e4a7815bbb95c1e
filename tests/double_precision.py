"""Stock Mamba-2 in float64 throughout, so that a comparison is not blurred by where it rounds to float32."""

import torch
from transformers.models.mamba2 import modeling_mamba2


class DoubleTorch:
    """`torch`, where float32 means float64."""

    def __getattr__(self, name):
        return getattr(torch, "float64" if name == "float32" else name)


def compute_in_double(monkeypatch):
    """Norms, residuals, A and the stock scan ask for float32 whatever they are given. Here they get float64."""
    monkeypatch.setattr(modeling_mamba2, "torch", DoubleTorch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
