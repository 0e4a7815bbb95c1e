"""The clock of a stream with times: which frame is on screen when the next sample is due."""

from typing import NamedTuple

from .frames import Picture

# Timestamps are rounded, often to milliseconds: a frame up to this many seconds late for a sample is on time.
_TOLERANCE = 0.6e-3


class Clock(NamedTuple):
    """A point in a stream: the frame on screen, and the number of samples taken so far.

    Samples are due at `origin`, `origin + 1 / frame_rate`, `origin + 2 / frame_rate`, … seconds. Clocks are immutable:
    a session replaces its clock together with the frames that it has seen.
    """

    frame_rate: float  # samples per second
    origin: float  # the first frame's time, in seconds
    latest: float  # the time of the frame on screen, in seconds
    on_screen: Picture
    num_samples: int = 0

    def is_due(self, before: float | None = None) -> bool:
        """Whether the next sample shows the frame on screen.

        Args:
            before: the time of the next frame, in seconds. Without it the frame's own time counts, because only the
                next frame tells how long this one stays on screen.
        """
        due = self.origin + self.num_samples / self.frame_rate
        return due <= self.latest + _TOLERANCE if before is None else due < before - _TOLERANCE

    def tick(self) -> "Clock":
        """The clock after one more sample."""
        return self._replace(num_samples=self.num_samples + 1)

    def show(self, seconds: float, picture: Picture) -> "Clock":
        """The clock after the next frame has appeared on screen."""
        return self._replace(latest=seconds, on_screen=picture)
