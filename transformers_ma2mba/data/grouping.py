"""Rows about one video joined to one row, so that the video is watched once for all of them.

Questions about one video, or one clip of it, become one conversation of several turns (paper, supplement B).
Segments of one video with their captions become one conversation in which each segment's frames stand before its
caption (paper, section 3.5, stage 1.5).
"""

import hashlib
import json
import math
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from itertools import groupby

import numpy as np

from .conversations import PLACEHOLDER, without_placeholders


def merge_adjacent(rows: Iterable[dict], group: bool, interleave: bool) -> Iterator[dict]:
    """Join adjacent rows. For the arguments see [`load_rows`]."""
    for key, members in groupby(rows, lambda row: _key(row, group, interleave)):
        if key is None:
            yield from members
        else:
            yield _merge(key, list(members))


def merge_all(rows: Iterable[dict], group: bool, interleave: bool) -> Iterator[dict]:
    """Join rows wherever they are, in the order of the first of each group.

    The rows go through a temporary file; memory holds 24 bytes for each row.
    """
    offsets, keys = array("q"), bytearray()
    with tempfile.TemporaryFile(prefix="rows_") as spool:
        for number, row in enumerate(rows):
            offsets.append(spool.tell())
            spool.write(json.dumps(row).encode() + b"\n")
            key = _key(row, group, interleave)
            # A row that joins no group has a key of its own.
            keys += (
                number.to_bytes(16, "big")
                if key is None
                else hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
            )
        for members in _groups(keys):
            rows = [_read(spool, offsets[number]) for number in members]
            key = _key(rows[0], group, interleave)
            yield rows[0] if key is None else _merge(key, rows)


def _groups(keys: bytearray) -> Iterator[np.ndarray]:
    """Yield the numbers of the rows of each group."""
    if not keys:
        return
    _, first, group_of = np.unique(np.frombuffer(keys, "S16"), return_index=True, return_inverse=True)
    leaders = first[group_of]  # of each row, the first row of its group
    order = np.argsort(leaders, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(leaders[order])) + 1)


def _read(spool, offset: int) -> dict:
    spool.seek(offset)
    return json.loads(spool.readline())


def _key(row: dict, group: bool, interleave: bool) -> tuple | None:
    """All that the rows of one group have in common, beginning with their kind; None for a row on its own."""
    videos, turns = row["video"], row["conversations"]
    if not videos:
        return None
    instruction = tuple(turn["value"] for turn in turns if turn["from"] == "system")
    if interleave and len(videos) == 1 and not row["image"] and (row["start"] or row["end"]):
        return "segments", videos[0], instruction
    if group:
        starts = tuple(start or 0.0 for start in row["start"] or [None] * len(videos))
        ends = tuple(row["end"] or [None] * len(videos))
        return "questions", tuple(videos), starts, ends, tuple(row["image"] or ()), instruction
    return None


def _merge(key: tuple, rows: list[dict]) -> dict:
    merged = _merge_segments(rows) if key[0] == "segments" else _merge_questions(rows)
    if len(rows) > 1:
        duration = next((row["duration"] for row in rows if row["duration"] is not None), None)
        source = f"{rows[0]['source']}, and {len(rows) - 1} more"
        merged |= {"duration": duration, "candidates": None, "answer": None, "source": source}
    return merged


def _merge_questions(rows: list[dict]) -> dict:
    """One conversation of all questions, each question with the same answer once."""
    if len(rows) == 1:
        return rows[0]
    turns, asked = [turn for turn in rows[0]["conversations"] if turn["from"] == "system"], set()
    for number, row in enumerate(rows):
        for exchange in _exchanges(row["conversations"]):
            text = tuple(without_placeholders(turn["value"], PLACEHOLDER).strip() for turn in exchange)
            if text not in asked:
                # The video stands where the first row has it, or before the first question.
                turns += (
                    exchange
                    if number == 0
                    else [{**turn, "value": value} for turn, value in zip(exchange, text, strict=True)]
                )
            asked.add(text)
    return {**rows[0], "conversations": turns}


def _exchanges(turns: list[dict]) -> Iterator[list[dict]]:
    """Yield each question with the turns that answer it."""
    exchange = []
    for turn in turns:
        if turn["from"] == "human" and exchange:
            yield exchange
            exchange = []
        if turn["from"] != "system":
            exchange.append(turn)
    if exchange:
        yield exchange


def _merge_segments(rows: list[dict]) -> dict:
    """One conversation of all segments in the order of their start, then their end; overlaps stay as they are.

    The captions of one segment that is there more than once follow one another, the same caption once.
    """
    captions: dict[tuple[float | None, float | None], dict[str, None]] = {}
    for row in rows:
        clip = tuple((row[name] or [None])[0] for name in ("start", "end"))
        caption = "\n".join(turn["value"] for turn in row["conversations"] if turn["from"] == "gpt")
        captions.setdefault(clip, {})[caption] = None
    clips = sorted(captions, key=lambda clip: (clip[0] or 0.0, math.inf if clip[1] is None else clip[1]))
    turns = [turn for turn in rows[0]["conversations"] if turn["from"] == "system"]
    for clip in clips:
        turns.append({"from": "human", "value": "<video>"})
        turns.append({"from": "gpt", "value": "\n".join(captions[clip])})
    start, end = ([clip[i] for clip in clips] for i in (0, 1))
    return {
        **rows[0],
        "video": rows[0]["video"] * len(clips),
        "start": start,
        "end": end if any(time is not None for time in end) else None,
        "conversations": turns,
    }
