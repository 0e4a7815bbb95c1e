"""Rows of LLaVA-Video style lists as chat messages."""

import os
import re
from collections.abc import Mapping

from ..video import Clip, FrameFolder
from .broken_samples import sample_name

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLACEHOLDER = re.compile("(<video>|<image>)")


def conversation_to_messages(row: dict, folder: str | os.PathLike = "") -> list[dict]:
    """Convert a row of a LLaVA-Video style list to chat messages.

    Args:
        row: a dictionary with `conversations`, turns with `from` ("human" or "gpt") and `value`, and perhaps
            - `video` or `image`: a path, or a list of paths;
            - `start` and `end`: the seconds at which a clip of the video starts and ends, each a number, or a list
              with a number or None for each video;
            - `fps`: the frames per second of a video that is a folder of images.
        folder: the folder of relative paths.

    Returns:
        Messages for `processor.apply_chat_template`. A single video or image comes before the text of the turn that
        says `<video>` or `<image>`, or else before the first question (paper, Table 5). Several of one kind replace
        their placeholders in the questions if there are as many, and come before the first question otherwise. Blocks
        of clips have `start` and `end`. Placeholders in other text are taken out.

    Raises:
        ValueError: if the row is not a mapping or has no turns, a turn has an unknown speaker or no text, a video or
            an image is not a path, a clip makes no sense, or a row with one of them has no turn of a human.
    """
    turns = _turns(row)
    questions = [number for number, turn in enumerate(turns) if ROLES[turn["from"]] == "user"]
    blocks = {kind: _blocks(row, kind, folder) for kind in ("video", "image")}
    if any(blocks.values()) and not questions:
        raise ValueError(f"Row {sample_name(row)} has a video or an image, but no turn of a human to put it into.")
    contents = [PLACEHOLDER.split(turn["value"]) for turn in turns]
    in_front = [[] for _ in turns]
    for kind, own in blocks.items():
        # Lists of videos often say <image>.
        names = (f"<{kind}>",) if all(blocks.values()) else ("<video>", "<image>")
        places = [(turn, i) for turn in questions for i, item in enumerate(contents[turn]) if item in names]
        if len(own) > 1 and len(places) == len(own):
            for (turn, i), block in zip(places, own, strict=True):
                contents[turn][i] = block
        elif own:
            in_front[places[0][0] if places and len(own) == 1 else questions[0]] += own
    return [
        {"role": ROLES[turn["from"]], "content": first + _joined(content)}
        for turn, first, content in zip(turns, in_front, contents, strict=True)
    ]


def conversation_to_learn(row: dict, folder: str | os.PathLike = "") -> list[dict]:
    """As [`conversation_to_messages`], for training.

    Raises:
        ValueError: also if no turn is the assistant's.
    """
    messages = conversation_to_messages(row, folder)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"Row {sample_name(row)} has no answer to learn from.")
    return messages


def _turns(row: dict) -> list[Mapping]:
    if not isinstance(row, Mapping):
        raise ValueError(f"A row must be a dictionary with `conversations`, got {row!r}.")
    turns = row.get("conversations")
    if not turns:
        raise ValueError(f"Row {sample_name(row)} has no `conversations`.")
    if not isinstance(turns, (list, tuple)):
        raise ValueError(f"Row {sample_name(row)} has the conversations {turns!r}: give a list of turns.")
    for turn in turns:
        if not (isinstance(turn, Mapping) and str(turn.get("from")) in ROLES and isinstance(turn.get("value"), str)):
            raise ValueError(
                f"Row {sample_name(row)} has the turn {turn!r}: `from` must be human or gpt, and `value` a text."
            )
    return turns


def files_in(messages: list[dict]) -> list[dict]:
    """The blocks of videos and images in messages."""
    return [block for message in messages for block in message["content"] if block["type"] != "text"]


def without_placeholders(text: str, pattern: re.Pattern) -> str:
    """Take out placeholders, also those that appear when others are taken out."""
    while pattern.search(text):
        text = pattern.sub("", text)
    return text


def _joined(items: list[str | dict]) -> list[dict]:
    """Blocks of texts and other blocks; texts next to each other become one, without placeholders."""
    content, text = [], ""
    for item in [*items, None]:
        if isinstance(item, str):
            text += item
            continue
        text = without_placeholders(text, PLACEHOLDER).strip()
        if text or (item is None and not content):
            content.append({"type": "text", "text": text})
        if item is not None:
            content.append(item)
        text = ""
    return content


def _blocks(row: Mapping, kind: str, folder) -> list[dict]:
    """The blocks of the videos or images of a row."""
    paths = row.get(kind) or []
    paths = paths if isinstance(paths, (list, tuple)) else [paths]
    if not all(isinstance(path, (str, os.PathLike)) for path in paths):
        raise ValueError(f"Row {sample_name(row)} has the {kind} {row[kind]!r}: give a path or a list of paths.")
    paths = [path if "://" in path else os.path.join(folder, path) for path in map(os.fspath, paths)]
    if kind == "video" and row.get("fps"):
        paths = [FrameFolder(path, row["fps"]) if os.path.isdir(path) else path for path in paths]
    blocks = [{"type": kind, "path": path} for path in paths]
    if kind == "video":
        for name in ("start", "end"):
            for block, seconds in zip(blocks, _times(row, name, len(paths)), strict=True):
                if seconds is not None:
                    block[name] = seconds
        for block in blocks:
            try:
                Clip(block["path"], block.get("start"), block.get("end"))
            except ValueError as error:
                raise ValueError(f"Row {sample_name(row)}: {error}") from error
    return blocks


def _times(row: Mapping, name: str, num_videos: int) -> list:
    times = row.get(name)
    times = times if isinstance(times, (list, tuple)) else [times]
    if all(seconds is None for seconds in times):
        return [None] * num_videos
    if len(times) != num_videos:
        raise ValueError(
            f"Row {sample_name(row)} has the {name} {row[name]!r}, but {num_videos} videos: give one number for each."
        )
    return times
