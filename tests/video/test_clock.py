"""The clock of a stream: the frame on screen at each sample."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformers_ma2mba.video.clock import Clock


def sample(frame_rate: float, times: list[float]) -> list[int]:
    """The indices of the frames that a clock samples until the last frame's own time."""
    clock, sampled = Clock(frame_rate, times[0], times[0], 0), []

    def take(before=None):
        nonlocal clock
        while clock.is_due(before):
            sampled.append(clock.on_screen)
            clock = clock.tick()

    for index, time in enumerate(times[1:], 1):
        take(before=time)
        clock = clock.show(time, index)
    take()
    assert clock.num_samples == len(sampled)
    return sampled


@pytest.mark.parametrize("start", [0.0, -7.0, 1.7e9])
@given(st.lists(st.integers(0, 4000), min_size=1, max_size=12), st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_each_sample_shows_the_last_frame_before_it(start, milliseconds, frame_rate):
    times = [0, *sorted(milliseconds)]
    step = round(1000 / frame_rate)
    expected = [max(index for index, time in enumerate(times) if time <= due) for due in range(0, times[-1] + 1, step)]
    assert sample(frame_rate, [start + time / 1000 for time in times]) == expected


def test_a_frame_late_by_rounding_is_on_time():
    assert sample(1.0, [0.0, 1.0005, 2.0007]) == [0, 1, 1]
    assert sample(3.0, [0.0, 0.333, 0.667, 1.0]) == [0, 1, 2, 3]
