"""Checkpoints in host memory: copies from the device and back while the device computes."""

import functools
from collections import deque
from collections.abc import Callable

import torch

from .pinned_memory import pinned_memory

_STORES_UNDER_WAY = 2  # segments on their way to the host, which hold device memory until they arrive


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """One stream for each direction, reused at every step, as PyTorch keeps freed memory for its stream."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class Offloader:
    """Moves tensors between a CUDA device and pinned host memory, on one stream for each direction.

    Without `offload`, and on a CPU, everything stays where it is.
    """

    def __init__(self, device: torch.device, offload: bool):
        self.device = device
        self.active = offload and device.type == "cuda"
        self.inward, self.outward = _streams(device) if self.active else (None, None)
        self.stored = deque()

    def empty(self, shape, dtype: torch.dtype) -> torch.Tensor:
        """Memory for a checkpoint: on the host if checkpoints are offloaded."""
        if self.active:
            return pinned_memory.empty(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def store(self, target: torch.Tensor, source: torch.Tensor):
        """Copy into memory from `empty`. Read it by `fetch`, or after `finish`."""
        if not self.active or target.is_cuda:
            target.copy_(source)
            return
        self.outward.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.outward):
            for whole, part in zip(target, source, strict=True):  # each contiguous, or the copy would not be direct
                whole.copy_(part, non_blocking=True)
        source.record_stream(self.outward)

    def end_segment(self):
        """Wait for the stores of all but the latest segments, which hold device memory until they are done."""
        if self.active:
            self.stored.append(self.outward.record_event())
            if len(self.stored) > _STORES_UNDER_WAY:
                self.stored.popleft().synchronize()

    def fetch(self, source: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to copy a tensor to the device, and return a function that waits for the copy."""
        if not self.active or source.is_cuda:
            moved = source.to(self.device)
            return lambda: moved
        with torch.cuda.stream(self.inward):
            moved = torch.empty(source.shape, dtype=source.dtype, device=self.device)
            for whole, part in zip(moved, source, strict=True):
                whole.copy_(part, non_blocking=True)
        arrived = self.inward.record_event()

        def wait():
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            moved.record_stream(current)
            return moved

        return wait

    def finish(self):
        """Wait for all copies."""
        if self.active:
            self.outward.synchronize()
            self.inward.synchronize()
            self.stored.clear()

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to host memory, differentiably; return the tensor itself if nothing is offloaded."""
        return _ToHost.apply(self, tensor) if self.active and tensor.is_cuda else tensor


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, copies: Offloader, tensor):
        ctx.device = tensor.device
        moved = copies.empty(tensor.shape, tensor.dtype)
        copies.store(moved, tensor)
        copies.finish()
        return moved

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient.to(ctx.device)


class SegmentReader:
    """Reads a tensor `(batch_size, sequence_length, ...)` segment by segment; from host memory, one segment ahead."""

    def __init__(self, tensor: torch.Tensor, segments: list[tuple[int, int]], copies: Offloader):
        self.tensor, self.segments, self.copies = tensor, segments, copies
        self.ahead = {}

    def take(self, segment: int, following: int | None = None) -> torch.Tensor:
        """Return a segment on the device, and begin to fetch the `following` one, if there is one."""
        wait = self.ahead.pop(segment, None) or self._fetch(segment)
        if following is not None and 0 <= following < len(self.segments) and following not in self.ahead:
            self.ahead[following] = self._fetch(following)
        return wait()

    def _fetch(self, segment: int):
        start, stop = self.segments[segment]
        return self.copies.fetch(self.tensor[:, start:stop])
