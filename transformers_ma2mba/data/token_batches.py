"""Batches of similarly long rows, bounded by their tokens."""

import math
import os
import random

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
            else that of its file.
        processor: its frame rate, frame size and tokenizer apply.
        max_tokens: the most tokens of a batch. A row with more is a batch of its own.
        folder: the folder of relative paths.
        seed: rows of almost the same length are together by chance; the same seed gives the same batches.

    Raises:
        ValueError: if `max_tokens` is not above 0, a row is malformed, or the file of a video cannot be read.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be above 0, got {max_tokens}.")
    generator = random.Random(seed)
    lengths = [count_tokens(row, processor, folder) for row in rows]
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


def count_tokens(row: dict, processor: Ma2mbaProcessor, folder: str | os.PathLike = "") -> int:
    """The number of tokens of a row, for its video as long as its row or its file says."""
    messages = conversation_to_messages(row, folder)
    text = processor.apply_chat_template(messages, tokenize=False)
    num_tokens, fps = len(processor.tokenizer(text)["input_ids"]), processor.video_processor.fps
    for block in (block for message in messages for block in message["content"]):
        if block["type"] == "video":
            num_tokens += _count_frames(block["path"], row.get("duration"), fps) * processor.tokens_per_frame
        elif block["type"] == "image":
            num_tokens += processor.tokens_per_frame
    return num_tokens


def _count_frames(path: str, seconds: float | None, fps: float) -> int:
    seconds = seconds or probe(path).duration
    return sum(1 for _ in iter_frames(path, fps)) if seconds is None else math.ceil(seconds * fps)
