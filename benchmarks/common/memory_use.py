"""Memory of this process and of its GPU: peaks, free memory, sizes in words. Linux only."""

import ctypes
import gc
import sys
from pathlib import Path

import torch

USABLE = 0.9  # share of the free memory that a measurement may take


def _field_bytes(path: str, field: str) -> int:
    lines = Path(path).read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def available_bytes() -> int:
    """Return the host memory that new allocations can have."""
    return _field_bytes("/proc/meminfo", "MemAvailable")


def expected_shortage(expected_bytes: int) -> str | None:
    """Return why a measurement on the CPU must not be tried, or None: other processes would be killed as well."""
    free = available_bytes()
    if expected_bytes <= USABLE * free:
        return None
    return f"expected to take {expected_bytes / 1e9:.1f} GB of {free / 1e9:.1f} GB free"


class PeakMemory:
    """The highest memory above that at the object's creation.

    On a CPU this is the resident size. On a GPU it is the memory that PyTorch allocated; beside it stand the memory
    that PyTorch reserved, and the host's resident size, which includes pinned memory.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            for name, module in list(sys.modules.items()):
                # Blocks that an earlier, shorter sequence left. A worker without MA-GC does not load the package.
                if name.startswith("transformers_ma2mba.") and name.endswith(".pinned_memory"):
                    module.pinned_memory.release()
            self.before = torch.cuda.memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        except OSError:
            if not self.on_gpu:
                raise
        self.resident = _field_bytes("/proc/self/status", "VmRSS")
        self.forget()

    def forget(self) -> None:
        """Start anew on a GPU, and leave its allocator as it is."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> dict[str, int]:
        """Return `peak_bytes`, and on a GPU `reserved_bytes` and `host_bytes`."""
        resident = _field_bytes("/proc/self/status", "VmHWM") - self.resident
        if not self.on_gpu:
            return {"peak_bytes": resident}
        return {
            "peak_bytes": torch.cuda.max_memory_allocated() - self.before,
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "host_bytes": resident,
        }


def gigabytes(num_bytes: int) -> str:
    """Return 10^9 bytes in three digits: 0.305, 2.57, 10.3."""
    size = num_bytes / 1e9
    return f"{size:.{3 if size < 0.9995 else 2 if size < 9.995 else 1}f}"
