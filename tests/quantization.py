"""Whether bitsandbytes runs here."""

import torch


def why_not() -> str | None:
    """The reason why bitsandbytes cannot run here."""
    try:
        import bitsandbytes

        for layer in (
            bitsandbytes.nn.Linear4bit(64, 32),
            bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
        ):
            layer.to("cpu")(torch.zeros(1, 64))
    except Exception as error:  # a missing or broken installation fails in many ways
        return f"bitsandbytes cannot run: {error!r}"
    return None
