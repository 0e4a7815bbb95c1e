"""Pinned host memory in the sizes that are asked for.

PyTorch's own allocator rounds pinned memory up to powers of two, and a hundred gigabytes of checkpoints might become
two hundred. Pinning takes seconds for every ten gigabytes, so blocks that are free are kept for the next step.
"""

import contextlib
import ctypes
import math
import mmap
import threading
import weakref

import torch

_SLACK = 1.25  # a free block may be so much larger than what it is taken for


class PinnedMemory:
    """Blocks of host memory that a CUDA device copies from and to directly. A tensor gives its block back when nothing
    refers to its storage any more; whoever copies without waiting must hold it until the copy is done."""

    def __init__(self):
        self.free: list[mmap.mmap] = []
        self.lock = threading.RLock()  # a block may come back wherever Python collects garbage

    def empty(self, shape, dtype: torch.dtype) -> torch.Tensor:
        """A tensor with whatever the memory holds.

        Raises:
            RuntimeError: if the memory cannot be pinned.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        block = self._take(num_bytes) or self._pin(num_bytes)
        memory = (ctypes.c_char * num_bytes).from_buffer(block)
        weakref.finalize(memory, self._give_back, block).atexit = False
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def _take(self, num_bytes: int) -> mmap.mmap | None:
        """The smallest free block that suits."""
        with self.lock:
            suiting = [block for block in self.free if num_bytes <= len(block) <= _SLACK * num_bytes]
            if not suiting:
                return None
            block = min(suiting, key=len)
            self.free.remove(block)
            return block

    def _pin(self, num_bytes: int) -> mmap.mmap:
        # Sequences of another length have come: what theirs left has no use.
        self.release()
        block = mmap.mmap(-1, num_bytes)
        with contextlib.suppress(AttributeError, OSError):  # not every system has them
            block.madvise(mmap.MADV_HUGEPAGE)  # fewer pages to pin
        error = torch.cuda.cudart().cudaHostRegister(_address(block), num_bytes, 0)
        if int(error) != 0:
            raise RuntimeError(
                f"CUDA cannot pin {num_bytes / 2**30:.1f} GiB of host memory for offloaded checkpoints (error "
                f"{int(error)}): there may be too little of it, or `ulimit -l` may forbid it."
            )
        return block

    def _give_back(self, block: mmap.mmap):
        with self.lock:
            self.free.append(block)

    def release(self):
        """Returns the free blocks to the system."""
        with self.lock:
            blocks, self.free = self.free, []
        for block in blocks:
            torch.cuda.cudart().cudaHostUnregister(_address(block))
            block.close()


def _address(block: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(block))


pinned_memory = PinnedMemory()  # one for the process: blocks are large
