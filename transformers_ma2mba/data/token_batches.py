"""Batches of similarly long rows, bounded by their tokens."""

import math
import os
import random
from collections.abc import Callable
from functools import cache
from numbers import Real

from ..processing_ma2mba import Ma2mbaProcessor
from ..video import VideoReadError, iter_frames, probe
from .broken_samples import BrokenSamples, sample_name
from .conversations import conversation_to_learn, conversation_to_messages, files_in


def batches_by_tokens(
    rows: list[dict],
    processor: Ma2mbaProcessor,
    max_tokens: int,
    folder: str | os.PathLike = "",
    seed: int = 0,
    broken_samples: BrokenSamples | None = None,
) -> list[list[dict]]:
    """Group rows of any length into batches of at most `max_tokens` tokens, padding included.

    One batch holds a film of hours or many clips. Use the list as the Trainer's data set, with
    `per_device_train_batch_size=1`: [`DataCollatorForVideoQA`] takes lists of rows, and the Trainer shuffles them.

    Args:
        rows: rows as for [`conversation_to_messages`]. The length of a video is its row's `duration` in seconds, or
            else (missing, None or 0) that of its file; that of a clip is at most `end` minus `start`. A duration below
            the file's makes batches too large.
        processor: its frame rate, frame size and tokenizer apply.
        max_tokens: the most tokens of a batch. A row with more is a batch of its own.
        folder: the folder of relative paths.
        seed: rows of almost the same length are together by chance; the same seed gives the same batches.
        broken_samples: leaves out rows that are malformed, or whose length is that of a file that cannot be read, and
            remembers them. Without it, they are errors.

    Raises:
        ValueError: if `max_tokens` is not above 0, a row or its duration is malformed, the file of a video cannot be
            read, or no row is left.
    """
    if not max_tokens >= 1:
        raise ValueError(f"max_tokens must be above 0, got {max_tokens}.")
    generator = random.Random(seed)
    rows, lengths = _with_lengths(rows, processor, folder, broken_samples)
    if not rows:
        reasons = [] if broken_samples is None else broken_samples.reasons()
        raise ValueError("There is no row to train on" + (f"; {': '.join(reasons[0])}" if reasons else "."))
    order = sorted(range(len(rows)), key=lambda i: lengths[i] * math.exp(generator.gauss(0, 0.1)))
    batches, longest = [], 0
    for i in order:
        longest = max(longest, lengths[i])
        if not batches or longest * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
            longest = lengths[i]
        batches[-1].append(rows[i])
    generator.shuffle(batches)
    return batches


def _with_lengths(rows, processor, folder, broken_samples: BrokenSamples | None) -> tuple[list[dict], list[int]]:
    """The rows that are not broken, and the number of tokens of each."""
    length_of_file = cache(seconds_of_file)  # many rows may ask about one film
    kept, lengths = [], []
    for row in rows:
        # A row that training has found to be broken stays: a run that is resumed needs the same batches again.
        try:
            lengths.append(_count_tokens(row, processor, folder, length_of_file))
        except (ValueError, FileNotFoundError) as error:
            if broken_samples is None:
                raise
            unreadable = isinstance(error, (FileNotFoundError, VideoReadError))
            messages = conversation_to_messages(row, folder) if unreadable else []
            broken_samples.add(sample_name(row), error, [block["path"] for block in files_in(messages)])
        else:
            kept.append(row)
    return kept, lengths


def _count_tokens(row: dict, processor: Ma2mbaProcessor, folder, length_of_file: Callable[[str, float], float]) -> int:
    """The number of tokens of a row, for its video as long as its row or its file says."""
    messages = conversation_to_learn(row, folder)
    num_tokens, fps = count_text_tokens(processor, messages), processor.video_processor.fps
    for block in files_in(messages):
        num_frames = 1
        if block["type"] == "video":
            num_frames = math.ceil(_seconds_of(block, _stated_seconds(row), fps, length_of_file) * fps)
        num_tokens += num_frames * processor.tokens_per_frame
    return num_tokens


def count_text_tokens(processor: Ma2mbaProcessor, messages: list[dict]) -> int:
    """Count the tokens of a conversation, with one placeholder for each video and image instead of their frames."""
    text = processor.apply_chat_template(messages, tokenize=False)
    return len(processor.tokenizer(text)["input_ids"])


def _seconds_of(block: dict, stated: float | None, fps: float, length_of_file: Callable) -> float:
    start, end = block.get("start") or 0, block.get("end")
    if end is None:
        return max((stated or length_of_file(block["path"], fps)) - start, 1 / fps)
    return min(end - start, stated or math.inf)


def _stated_seconds(row: dict) -> float | None:
    seconds = row.get("duration")
    if seconds is not None and not (isinstance(seconds, Real) and 0 <= seconds < math.inf):
        raise ValueError(
            f"Row {sample_name(row)} has the duration {seconds!r}: it must be a number of seconds, or missing."
        )
    return seconds


def seconds_of_file(path: str | os.PathLike, fps: float) -> float:
    """Return the length of a film: what its file states, or else that of its frames, all decoded at `fps`.

    Raises:
        FileNotFoundError: if the file does not exist.
        VideoReadError: if it is not a video that can be decoded.
    """
    seconds = probe(path).duration
    return sum(1 for _ in iter_frames(path, fps)) / fps if seconds is None else seconds
