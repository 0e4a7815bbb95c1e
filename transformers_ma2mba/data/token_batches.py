"""Batches of similarly long rows, bounded by their tokens."""

import math
import os
import random
from collections.abc import Callable
from functools import cache
from numbers import Real

from ..processing_ma2mba import Ma2mbaProcessor
from ..video import iter_frames, probe
from .conversations import conversation_to_messages


def batches_by_tokens(
    rows: list[dict], processor: Ma2mbaProcessor, max_tokens: int, folder: str | os.PathLike = "", seed: int = 0
) -> list[list[dict]]:
    """Group rows of any length into batches of at most `max_tokens` tokens, padding included.

    One batch holds a film of hours or many clips. Use the list as the Trainer's data set, with
    `per_device_train_batch_size=1`: [`DataCollatorForVideoQA`] takes lists of rows, and the Trainer shuffles them.

    Args:
        rows: rows as for [`conversation_to_messages`]. The length of a video is its row's `duration` in seconds, or
            else (missing, None or 0) that of its file. A duration below the file's makes batches too large.
        processor: its frame rate, frame size and tokenizer apply.
        max_tokens: the most tokens of a batch. A row with more is a batch of its own.
        folder: the folder of relative paths.
        seed: rows of almost the same length are together by chance; the same seed gives the same batches.

    Raises:
        ValueError: if `max_tokens` is not above 0, a row or its duration is malformed, or the file of a video cannot
            be read.
    """
    if not max_tokens >= 1:
        raise ValueError(f"max_tokens must be above 0, got {max_tokens}.")
    generator, rows = random.Random(seed), list(rows)
    seconds_of_file = cache(_seconds_of_file)  # many rows may ask about one film
    lengths = [_count_tokens(row, processor, folder, seconds_of_file) for row in rows]
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


def _count_tokens(
    row: dict, processor: Ma2mbaProcessor, folder, seconds_of_file: Callable[[str, float], float]
) -> int:
    """The number of tokens of a row, for its video as long as its row or its file says."""
    messages = conversation_to_messages(row, folder)
    text = processor.apply_chat_template(messages, tokenize=False)
    num_tokens, fps = len(processor.tokenizer(text)["input_ids"]), processor.video_processor.fps
    for block in (block for message in messages for block in message["content"]):
        if block["type"] == "video":
            seconds = _stated_seconds(row) or seconds_of_file(block["path"], fps)
            num_tokens += math.ceil(seconds * fps) * processor.tokens_per_frame
        elif block["type"] == "image":
            num_tokens += processor.tokens_per_frame
    return num_tokens


def _stated_seconds(row: dict) -> float | None:
    seconds = row.get("duration")
    if seconds is not None and not (isinstance(seconds, Real) and 0 <= seconds < math.inf):
        raise ValueError(
            f"Row {row.get('id', row)!r} has the duration {seconds!r}: it must be a number of seconds, or missing."
        )
    return seconds


def _seconds_of_file(path: str, fps: float) -> float:
    seconds = probe(path).duration
    return sum(1 for _ in iter_frames(path, fps)) / fps if seconds is None else seconds
