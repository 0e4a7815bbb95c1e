"""The data collator: rows of a LLaVA-Video style data set to padded, masked training batches."""

import os
from dataclasses import dataclass, field

import torch

from .processing_ma2mba import Ma2mbaProcessor
from .video import FittedFrames

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
        ValueError: if the row has no turns, a turn has an unknown speaker or no text, or a row with a video or an
            image has no turn of a human.
    """
    turns = row.get("conversations")
    if not turns:
        raise ValueError(f"Row {row.get('id', row)!r} has no `conversations`.")
    blocks = []
    for kind in ("video", "image"):
        paths = row.get(kind) or []
        for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
            path = os.fspath(path)
            blocks.append({"type": kind, "path": path if "://" in path else os.path.join(folder, path)})
    messages = []
    for turn in turns:
        if turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
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


@dataclass
class DataCollatorForVideoQA:
    """Loads videos and images, batches them with their conversations and masks all but the assistant's tokens.

    Args:
        processor ([`Ma2mbaProcessor`]): its `fps` and frame size apply.
        folder: the folder of relative `video` and `image` paths.
        keep_frames (`bool`): keep the frames of each file in memory after its first use, for small data sets that are
            read many times.
    """

    processor: Ma2mbaProcessor
    folder: str | os.PathLike = ""
    keep_frames: bool = False
    _kept: dict[str, FittedFrames] = field(default_factory=dict, repr=False)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Convert rows, see [`conversation_to_messages`], to a batch padded on the left.

        Returns:
            The model's inputs and `labels` `(batch_size, sequence_length)`, -100 wherever the assistant is silent.
        """
        conversations = [conversation_to_messages(row, self.folder) for row in rows]
        if self.keep_frames:
            for messages in conversations:
                for message in messages:
                    message["content"] = [self._with_frames(block) for block in message["content"]]
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "progress": False},
        )
        spoken = torch.as_tensor(batch.pop("assistant_masks"))
        batch["labels"] = torch.where(spoken.bool(), batch["input_ids"], -100)
        return dict(batch)

    def _with_frames(self, block: dict) -> dict:
        if block["type"] != "video":
            return block
        path = block["path"]
        if path not in self._kept:
            # As uint8 they take a quarter of the memory that normalised frames take.
            encoded = self.processor.video_processor(path, do_rescale=False, do_normalize=False, progress=False)
            self._kept[path] = FittedFrames(encoded["pixel_values_videos"])
        return {"type": "video", "video": self._kept[path]}


__all__ = ["DataCollatorForVideoQA", "conversation_to_messages"]
