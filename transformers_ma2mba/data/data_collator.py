"""The data collator: rows of a LLaVA-Video style data set to padded, masked training batches."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch

from ..processing_ma2mba import Ma2mbaProcessor
from ..video import EncodedFrames, FittedFrames
from .conversations import conversation_to_messages


@dataclass
class DataCollatorForVideoQA:
    """Loads videos and images, batches them with their conversations and masks all but the assistant's tokens.

    Args:
        processor ([`Ma2mbaProcessor`]): its `fps` and frame size apply.
        folder: the folder of relative `video` and `image` paths.
        keep_frames (`bool`): keep the frames of each file in memory after its first use, for small data sets that are
            read many times.
        vision_features ([`FrozenVisionFeatures`], *optional*): gives the features of each video in place of frames.
    """

    processor: Ma2mbaProcessor
    folder: str | os.PathLike = ""
    keep_frames: bool = False
    vision_features: Callable[[str], EncodedFrames] | None = None
    _kept: dict[str, FittedFrames] = field(default_factory=dict, repr=False)

    def __call__(self, rows: list[dict | list[dict]]) -> dict[str, torch.Tensor]:
        """Convert rows, see [`conversation_to_messages`], to a batch padded on the left.

        Args:
            rows: rows, or lists of rows, as from [`batches_by_tokens`].

        Returns:
            The model's inputs and `labels` `(batch_size, sequence_length)`, -100 wherever the assistant is silent.
        """
        rows = [row for item in rows for row in (item if isinstance(item, list) else [item])]
        conversations = [conversation_to_messages(row, self.folder) for row in rows]
        if self.keep_frames or self.vision_features is not None:
            frames_of = cache(self._frames_of)  # a film may be in several rows of the batch
            for block in (block for messages in conversations for message in messages for block in message["content"]):
                if block["type"] == "video":
                    block["video"] = frames_of(block.pop("path"))
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

    def _frames_of(self, path: str) -> EncodedFrames | FittedFrames:
        if self.vision_features is not None:
            return self.vision_features(path)
        if path not in self._kept:
            # As uint8 they take a quarter of the memory that normalised frames take.
            encoded = self.processor.video_processor(path, do_rescale=False, do_normalize=False, progress=False)
            self._kept[path] = FittedFrames(encoded["pixel_values_videos"])
        return self._kept[path]
