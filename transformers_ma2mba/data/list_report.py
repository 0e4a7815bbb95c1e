"""A report on lists of training data, made without training: the lengths of rows, and all that is wrong with them."""

import math
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from transformers.utils.logging import tqdm

from ..video import Clip, VideoReadError, iter_frames
from .broken_samples import BrokenSamples, sample_name
from .conversations import conversation_to_learn, files_in
from .images import ImageReadError, read_image
from .token_batches import seconds_of_file


@dataclass(frozen=True)
class RowLength:
    """The length of a row.

    Attributes:
        name: the row, as from [`sample_name`].
        seconds: the length of all its videos.
        frames: the number of their frames and of its images.
        tokens: those of its frames and, where they are counted, of its text.
    """

    name: str
    seconds: float
    frames: int
    tokens: int


@dataclass
class ListReport:
    """The result of `check_rows`.

    Attributes:
        lengths: one for each row that can be trained on.
        num_answers: the turns of the assistant in them.
        num_videos, num_images: the different files in them.
        broken: (row, reason) of rows that would be left out.
        notes: (file, note) of files that are read, but perhaps not as expected.
    """

    lengths: list[RowLength] = field(default_factory=list)
    num_answers: int = 0
    num_videos: int = 0
    num_images: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    @property
    def longest(self) -> RowLength | None:
        """The row with the most tokens."""
        return max(self.lengths, key=lambda length: length.tokens, default=None)


@dataclass(frozen=True)
class _File:
    """A video or an image: its length in seconds, the reason why it cannot be read, and notes about it."""

    seconds: float = 0.0
    reason: str | None = None
    notes: tuple[str, ...] = ()


def check_rows(
    rows: Iterable[dict],
    fps: float,
    tokens_per_frame: int,
    count_text: Callable[[list[dict]], int],
    broken_samples: BrokenSamples,
    whole: bool = False,
) -> ListReport:
    """Read rows and their files as training would, and report on them.

    Args:
        rows: rows as for [`conversation_to_messages`]; they are read twice.
        fps: frames per second of film.
        tokens_per_frame: the tokens of a frame or an image.
        count_text: counts the tokens of a row's messages without those of its frames.
        broken_samples: has the records that were malformed already, and gets the rows that cannot be read.
        whole: decode each film to its end, instead of its first frame only.
    """
    report, used = ListReport(), set()
    files = _examine(rows, fps, whole)
    report.notes = [(os.fspath(path), note) for (_, path), file in files.items() for note in file.notes]
    for row in rows:
        blocks = []
        try:
            messages = conversation_to_learn(row)
            blocks = files_in(messages)
            seconds = [_seconds(block, files[block["type"], block["path"]]) for block in blocks]
        except ValueError as error:
            broken_samples.add(sample_name(row), error, [block["path"] for block in blocks])
            continue
        frames = sum(_num_frames(s, fps) for s in seconds)
        tokens = count_text(messages) + frames * tokens_per_frame
        report.lengths.append(RowLength(sample_name(row), sum(seconds), frames, tokens))
        report.num_answers += sum(message["role"] == "assistant" for message in messages)
        report.notes += _notes_on_row(row, sum(seconds))
        used |= {(block["type"], block["path"]) for block in blocks}
    report.num_videos = sum(kind == "video" for kind, _ in used)
    report.num_images = len(used) - report.num_videos
    report.broken = broken_samples.reasons()
    return report


def _examine(rows: Iterable[dict], fps: float, whole: bool) -> dict[tuple[str, str], _File]:
    """Read each file once."""
    keys = {}
    for row in rows:
        with suppress(ValueError):  # the second pass names malformed rows
            keys.update(
                dict.fromkeys((block["type"], block["path"]) for block in files_in(conversation_to_learn(row)))
            )
    show = partial(tqdm, desc="Reading files" if whole else "Opening files", total=len(keys), delay=2)
    if whole:  # one after the other: warnings belong to the whole process, and FFmpeg decodes with several threads
        return {key: _read(*key, _decode, fps) for key in show(keys)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = pool.map(lambda key: _read(*key, _open, fps), keys)
        return dict(zip(keys, show(read), strict=True))


def _read(kind: str, path: str, read_film: Callable[[str, float], _File], fps: float) -> _File:
    try:
        if kind == "video":
            return read_film(path, fps)
        read_image(path)
        return _File()
    except (OSError, VideoReadError, ImageReadError) as error:
        return _File(reason=str(error))


def _open(path: str, fps: float) -> _File:
    return _File(seconds_of_file(path, fps))


def _decode(path: str, fps: float) -> _File:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        seconds = sum(1 for _ in iter_frames(path, fps)) / fps
    return _File(seconds, notes=tuple(str(warning.message) for warning in caught))


def _seconds(block: dict, file: _File) -> float:
    """The seconds of a video or of a clip of it; 0 for an image."""
    if file.reason is not None:
        raise ValueError(file.reason)
    if block["type"] == "image":
        return 0.0
    clip = Clip(block["path"], block.get("start"), block.get("end"))
    start, end = clip.start or 0.0, file.seconds if clip.end is None else min(clip.end, file.seconds)
    if start >= file.seconds > 0:
        raise ValueError(
            f"{clip.source} ends at {file.seconds:.2f} seconds, before the clip starts at {start:g} seconds."
        )
    return end - start


def _num_frames(seconds: float, fps: float) -> int:
    return max(1, math.ceil(seconds * fps - 1e-6))


def _notes_on_row(row: dict, seconds: float) -> list[tuple[str, str]]:
    stated = row.get("duration")
    if stated and seconds > 1.1 * stated + 1:
        return [(sample_name(row), f"its duration says {stated:g} seconds, but its videos take {seconds:.1f}.")]
    return []


def histogram(values: list[float], num_bins: int = 8) -> list[tuple[float, float, int]]:
    """Count values in bins whose borders are powers of two, or wider ones where there would be more than `num_bins`.

    Returns:
        (from, to, number of values) for each bin, from the smallest to the largest value; 0 has a bin of its own.
    """
    positive = [value for value in values if value > 0]
    bins = [(0, 0, len(values) - len(positive))] if len(positive) < len(values) else []
    if not positive:
        return bins
    exponents = [math.floor(math.log2(value)) for value in positive]
    low, high = min(exponents), max(exponents)
    width = math.ceil((high - low + 1) / num_bins)
    counts = [0] * math.ceil((high - low + 1) / width)
    for exponent in exponents:
        counts[(exponent - low) // width] += 1
    return bins + [(2.0 ** (low + i * width), 2.0 ** (low + (i + 1) * width), count) for i, count in enumerate(counts)]
