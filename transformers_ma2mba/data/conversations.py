"""Rows of LLaVA-Video style lists as chat messages."""

import os
from collections.abc import Mapping

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def conversation_to_messages(row: dict, folder: str | os.PathLike = "") -> list[dict]:
    """Convert a row of a LLaVA-Video style list to chat messages.

    Args:
        row: `video` or `image` (a path, or a list of paths), and `conversations`: turns with `from` ("human" or
            "gpt") and `value`. A row without either has only text.
        folder: the folder of relative paths.

    Returns:
        Messages for `processor.apply_chat_template`. Videos and images come once, before the first question (paper,
        Table 5), with or without `<image>` or `<video>` in the first turn.

    Raises:
        ValueError: if the row is not a mapping or has no turns, a turn has an unknown speaker or no text, a video or
            an image is not a path, or a row with one of them has no turn of a human.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"A row must be a dictionary with `conversations`, got {row!r}.")
    turns = row.get("conversations")
    if not turns:
        raise ValueError(f"Row {row.get('id', row)!r} has no `conversations`.")
    blocks = []
    for kind in ("video", "image"):
        paths = row.get(kind) or []
        paths = paths if isinstance(paths, (list, tuple)) else [paths]
        if not all(isinstance(path, (str, os.PathLike)) for path in paths):
            raise ValueError(
                f"Row {row.get('id', row)!r} has the {kind} {row[kind]!r}: give a path or a list of paths."
            )
        for path in map(os.fspath, paths):
            blocks.append({"type": kind, "path": path if "://" in path else os.path.join(folder, path)})
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
            raise ValueError(
                f"Row {row.get('id', row)!r} has the turn {turn!r}: `from` must be human or gpt, and `value` a text."
            )
        text = turn["value"].replace("<video>", "").replace("<image>", "").strip()
        content = [{"type": "text", "text": text}]
        if blocks and ROLES[turn["from"]] == "user":
            content, blocks = blocks + content, []
        messages.append({"role": ROLES[turn["from"]], "content": content})
    if blocks:
        raise ValueError(f"Row {row.get('id', row)!r} has a video or an image, but no turn of a human to put it into.")
    return messages
