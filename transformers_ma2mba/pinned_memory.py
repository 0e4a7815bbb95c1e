"""Pinned host memory in the sizes that are asked for.

PyTorch's own allocator rounds pinned memory up to powers of two, and a hundred gigabytes of checkpoints might become
two hundred. Pinning takes seconds for every ten gigabytes, so blocks that are free are kept for the steps to come, of
whatever length these are.
"""

import contextlib
import ctypes
import math
import mmap
import threading
import weakref
from collections import deque

import torch

_LARGEST_SHARE = 4  # a block serves what takes at least one part in so many of it, or little would wait for much


class PinnedMemory:
    """Blocks of host memory that a CUDA device copies from and to directly.

    A tensor gives its block back when nothing refers to its storage any more; whoever copies without waiting must hold
    it until the copy is done. A free block serves whatever fits into it and takes at least a quarter of it, the
    smallest such block first. If none does, a block of just the size that is asked for is pinned.

    What is pinned is at most twice the largest demand, which is the most bytes that tensors have held at a time. Two
    rules see to that. What the blocks in use have beyond their tensors stays within the largest demand: otherwise a
    new block is pinned. And a new block takes the place of free ones, those that are next smaller first, if with it
    more would be pinned than twice the largest demand.
    """

    def __init__(self):
        self.free: list[mmap.mmap] = []
        self.pinned_bytes = 0
        self.demand = 0  # bytes that tensors hold
        self.largest_demand = 0
        self.used_bytes = 0  # of the blocks that tensors hold
        # Blocks come back wherever Python collects garbage, perhaps in the midst of what follows. So they wait here,
        # each with the bytes that were asked for, until somebody holds the lock who can put them away.
        self.returned: deque[tuple[mmap.mmap, int]] = deque()
        self.lock = threading.Lock()

    def empty(self, shape, dtype: torch.dtype) -> torch.Tensor:
        """A tensor with whatever the memory holds.

        Raises:
            RuntimeError: if the memory cannot be pinned.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        with self.lock:
            self._put_away()
            largest = max(self.largest_demand, self.demand + num_bytes)
            block = self._take(num_bytes, largest) or self._pin(num_bytes, largest)
            self.demand += num_bytes
            self.used_bytes += len(block)
            self.largest_demand = largest
        memory = (ctypes.c_char * num_bytes).from_buffer(block)
        weakref.finalize(memory, self.returned.append, (block, num_bytes)).atexit = False
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def release(self):
        """Returns the free blocks to the system."""
        with self.lock:
            self._put_away()
            self._release_all()

    def _put_away(self):
        while self.returned:
            block, num_bytes = self.returned.popleft()
            self.free.append(block)
            self.demand -= num_bytes
            self.used_bytes -= len(block)

    def _take(self, num_bytes: int, largest_demand: int) -> mmap.mmap | None:
        """The smallest free block that suits."""
        suiting = [block for block in self.free if num_bytes <= len(block) <= _LARGEST_SHARE * num_bytes]
        if not suiting:
            return None
        block = min(suiting, key=len)
        if self.used_bytes + len(block) - (self.demand + num_bytes) > largest_demand:
            return None
        self.free.remove(block)
        return block

    def _pin(self, num_bytes: int, largest_demand: int) -> mmap.mmap:
        """A new block, and free ones released in exchange for it."""
        superseded = sorted(self.free, key=lambda block: (len(block) > num_bytes, abs(len(block) - num_bytes)))
        while superseded and self.pinned_bytes + num_bytes > 2 * largest_demand:
            self._unpin(superseded.pop(0))
        while True:
            try:
                block = _pinned_block(num_bytes)
            except RuntimeError:
                if not self.free:
                    raise
            else:
                self.pinned_bytes += num_bytes
                return block
            self._release_all()

    def _release_all(self):
        while self.free:
            self._unpin(self.free[-1])

    def _unpin(self, block: mmap.mmap):
        self.free.remove(block)
        self.pinned_bytes -= len(block)
        torch.cuda.cudart().cudaHostUnregister(_address(block))
        with contextlib.suppress(BufferError):  # a thread is still on its way out of it; then it goes with that
            block.close()


def _pinned_block(num_bytes: int) -> mmap.mmap:
    shortage = (
        f"CUDA cannot pin {num_bytes / 2**30:.1f} GiB of host memory for offloaded checkpoints (error {{}}): there "
        "may be too little of it, or `ulimit -l` may forbid it."
    )
    # Private: of a mapping that processes might share, Linux makes no huge pages. Windows knows neither.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        block = mmap.mmap(-1, num_bytes, **private)
    except OSError as error:
        raise RuntimeError(shortage.format(error)) from error
    # Huge pages are fewer to pin. And after a fork, the first to write to a page would get a copy of it, and that
    # might be this process, with the device still at the original; so a child gets none.
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        with contextlib.suppress(AttributeError, OSError):  # not every system has them
            block.madvise(getattr(mmap, advice))
    error = int(torch.cuda.cudart().cudaHostRegister(_address(block), num_bytes, 0))
    if error != 0:
        block.close()
        if torch.cuda.is_initialized():
            # CUDA remembers the error until somebody asks for it, and PyTorch asks after each kernel that it starts.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device="cuda")
        raise RuntimeError(shortage.format(error))
    return block


def _address(block: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(block))


pinned_memory = PinnedMemory()  # one for the process: blocks are large
