"""Lets Triton's kernels run on the CPU, in its interpreter; nothing changes on a machine with a CUDA device."""

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch

from transformers_ma2mba.mamba2 import kernel_choice


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Skip a test without a device for kernels and without the interpreter, which Triton has chosen when imported."""
    if torch.cuda.is_available():
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a CUDA device, or make test-kernels")
    monkeypatch.setattr(kernel_choice, "runs_kernels", lambda device: True)
    # mamba-ssm queries the device, even while its kernels are interpreted.
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=1))
