"""Pinned host memory in exactly the requested sizes.

PyTorch's own allocator rounds pinned memory up to powers of two, and a hundred gigabytes of checkpoints might become
two hundred. Pinning takes seconds for every ten gigabytes, so free blocks are kept for later steps, whose sequences
may be shorter or longer.
"""

import contextlib
import ctypes
import math
import mmap
import threading
import weakref
from collections import deque

import torch

_LARGEST_RATIO = 4  # of a block's size to that of a tensor in it, so that small tensors do not occupy large blocks


class PinnedMemory:
    """Blocks of host memory that a CUDA device copies from and to directly.

    A tensor returns its block when nothing refers to its storage any more; the caller of an asynchronous copy must
    keep the tensor until the copy is done. A request takes the smallest free block that it fills to at least a
    quarter. If there is none, a block of exactly the requested size is pinned.

    The largest demand is the most bytes that tensors have held at a time. At most twice as many bytes are pinned, by
    two rules. First, the unused part of the blocks in use stays within the largest demand: a request that would exceed
    it gets a new block. Second, if a new block would bring the pinned bytes above twice the largest demand, free
    blocks are released before, the next smaller ones first.
    """

    def __init__(self):
        self.free: list[mmap.mmap] = []
        self.pinned_bytes = 0
        self.demand = 0  # bytes that tensors hold
        self.largest_demand = 0
        self.used_bytes = 0  # of the blocks that tensors hold
        # Python may collect garbage, and so return blocks, at any line of these methods. So returned blocks wait here
        # with the number of requested bytes, until a thread that holds the lock puts them away.
        self.returned: deque[tuple[mmap.mmap, int]] = deque()
        self.lock = threading.Lock()

    def empty(self, shape, dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor in pinned memory.

        Args:
            shape: the tensor's shape.
            dtype: its type.

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
        """Return the free blocks to the system."""
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
        """Take the smallest suitable free block, or None."""
        suitable = [block for block in self.free if num_bytes <= len(block) <= _LARGEST_RATIO * num_bytes]
        if not suitable:
            return None
        block = min(suitable, key=len)
        if self.used_bytes + len(block) - (self.demand + num_bytes) > largest_demand:
            return None
        self.free.remove(block)
        return block

    def _pin(self, num_bytes: int, largest_demand: int) -> mmap.mmap:
        """Pin a new block, and release free ones in exchange."""
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
        with contextlib.suppress(BufferError):  # a thread is just dropping its tensor, and will free the block with it
            block.close()


def _pinned_block(num_bytes: int) -> mmap.mmap:
    shortage = (
        f"CUDA cannot pin {num_bytes / 2**30:.1f} GiB of host memory for offloaded checkpoints (error {{}}): there "
        "may be too little of it, or `ulimit -l` may limit it."
    )
    # Private, because Linux makes no huge pages for shared mappings. Windows has neither flag.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        block = mmap.mmap(-1, num_bytes, **private)
    except OSError as error:
        raise RuntimeError(shortage.format(error)) from error
    # Huge pages are fewer to pin. Children get none of the pages: after a fork, the first process to write to a page
    # gets a copy, and if that were this process, the device would go on using the original.
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        with contextlib.suppress(AttributeError, OSError):  # not every system has these
            block.madvise(getattr(mmap, advice))
    error = int(torch.cuda.cudart().cudaHostRegister(_address(block), num_bytes, 0))
    if error != 0:
        block.close()
        if torch.cuda.is_initialized():
            # CUDA keeps the error until the next query, and PyTorch queries after each kernel: this one clears it.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device="cuda")
        raise RuntimeError(shortage.format(error))
    return block


def _address(block: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(block))


pinned_memory = PinnedMemory()  # one for the process, because blocks are large
