"""Host memory for what a device need not hold: copies to and from it while the device computes."""

import functools
from collections import deque
from collections.abc import Callable

import torch

from .pinned_memory import pinned_memory

_STORES_UNDER_WAY = 2  # segments on their way to the host: until they are there, they take device memory


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """One for each way, the same at every step: PyTorch keeps freed memory for the stream that it was allocated on."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class Offloader:
    """Moves tensors between a device and pinned host memory, each way on a stream of its own.

    Without `offload`, and for a CPU, whose tensors are in host memory anyway, everything stays where it is.
    """

    def __init__(self, device: torch.device, offload: bool):
        self.device = device
        self.active = offload and device.type == "cuda"
        self.inward, self.outward = _streams(device) if self.active else (None, None)
        self.stored = deque()

    def empty(self, shape, dtype: torch.dtype) -> torch.Tensor:
        """Memory for what is to wait: on the host if it is moved there."""
        if self.active:
            return pinned_memory.empty(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def store(self, target: torch.Tensor, source: torch.Tensor):
        """Copies into memory from `empty`; `finish` must come before anybody reads it who does not `fetch` it."""
        if not self.active or target.is_cuda:
            target.copy_(source)
            return
        self.outward.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.outward):
            for whole, part in zip(target, source, strict=True):  # each contiguous, or the copy would not be direct
                whole.copy_(part, non_blocking=True)
        source.record_stream(self.outward)

    def end_segment(self):
        """Waits for the stores of earlier segments, which hold device memory until they are done."""
        if self.active:
            self.stored.append(self.outward.record_event())
            if len(self.stored) > _STORES_UNDER_WAY:
                self.stored.popleft().synchronize()

    def fetch(self, source: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begins to bring a tensor to the device; what it returns waits for it there."""
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
        """Waits until all that was stored is there, and all that was fetched may be given up."""
        if self.active:
            self.outward.synchronize()
            self.inward.synchronize()
            self.stored.clear()

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in host memory, its gradient's way back included; itself if it is to stay."""
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
    """A long tensor `(batch_size, tokens, ...)` a segment at a time; one in host memory is fetched a segment ahead."""

    def __init__(self, tensor: torch.Tensor, segments: list[tuple[int, int]], copies: Offloader):
        self.tensor, self.segments, self.copies = tensor, segments, copies
        self.ahead = {}

    def take(self, segment: int, following: int | None = None) -> torch.Tensor:
        """The rows of a segment on the device; those of the `following` one set out, unless there is none."""
        wait = self.ahead.pop(segment, None) or self._fetch(segment)
        if following is not None and 0 <= following < len(self.segments) and following not in self.ahead:
            self.ahead[following] = self._fetch(following)
        return wait()

    def _fetch(self, segment: int):
        start, stop = self.segments[segment]
        return self.copies.fetch(self.tensor[:, start:stop])
