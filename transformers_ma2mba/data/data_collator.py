"""The data collator: rows of a LLaVA-Video style data set to padded, masked training batches."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from PIL import Image

from ..processing_ma2mba import Ma2mbaProcessor
from ..video import Clip, EncodedFrames, FittedFrames, VideoReadError
from .broken_samples import BrokenSamples, sample_name
from .conversations import conversation_to_learn, files_in, without_placeholders
from .images import ImageReadError, read_image

# A short text without supervised tokens.
_STAND_IN = [{"role": "user", "content": [{"type": "text", "text": ""}]}]


@dataclass
class DataCollatorForVideoQA:
    """Loads videos and images, batches them with their conversations and masks all but the assistant's tokens.

    The tokenizer's special tokens, such as its end of text, are taken out of the conversations' text.

    Args:
        processor ([`Ma2mbaProcessor`]): its `fps` and frame size apply.
        folder: the folder of relative `video` and `image` paths.
        keep_frames (`bool`): keep the frames of each file in memory after its first use, for small data sets that are
            read many times.
        vision_features ([`FrozenVisionFeatures`], *optional*): gives the features of each video in place of frames.
        broken_samples ([`BrokenSamples`], *optional*): remembers rows that are malformed, or whose files cannot be
            read. A short text without supervised tokens takes the place of each, so that all processes take part in
            all steps, with batches of the same size. Without it, such a row is an error.
    """

    processor: Ma2mbaProcessor
    folder: str | os.PathLike = ""
    keep_frames: bool = False
    vision_features: Callable[[str], EncodedFrames] | None = None
    broken_samples: BrokenSamples | None = None
    _kept: dict[Clip, FittedFrames] = field(default_factory=dict, repr=False)

    def __call__(self, rows: list[dict | list[dict]]) -> dict[str, torch.Tensor]:
        """Convert rows, see [`conversation_to_messages`], to a batch padded on the left.

        Args:
            rows: rows, or lists of rows, as from [`batches_by_tokens`].

        Returns:
            The model's inputs and `labels` `(batch_size, sequence_length)`, -100 wherever the assistant is silent.

        Raises:
            FileNotFoundError: if a file does not exist.
            ValueError: if a row is malformed, or a file cannot be read. The message names the row.
        """
        rows = [row for item in rows for row in (item if isinstance(item, list) else [item])]
        load = cache(self._load)  # a film may be in several rows of the batch
        batch = self.processor.apply_chat_template(
            [self._messages(row, load) for row in rows],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "progress": False},
        )
        spoken = torch.as_tensor(batch.pop("assistant_masks"))
        batch["labels"] = torch.where(spoken.bool(), batch["input_ids"], -100)
        return dict(batch)

    def _messages(self, row: dict, load: Callable) -> list[dict]:
        """The messages of a row with its frames and images, or those that stand in for a broken row."""
        name = sample_name(row)
        try:
            messages = conversation_to_learn(row, self.folder)
        except ValueError as error:
            if self.broken_samples is None:
                raise
            self.broken_samples.add(name, error)
            return _STAND_IN
        files = [block["path"] for block in files_in(messages)]
        if files and self.broken_samples is not None and (reason := self.broken_samples.reason(name, files)):
            self.broken_samples.add(name, reason, files)  # an error if no sample may be broken
            return _STAND_IN
        try:
            for block in files_in(messages):
                clip = Clip(block.pop("path"), block.pop("start", None), block.pop("end", None))
                block[block["type"]] = load(block["type"], clip)
        except (FileNotFoundError, VideoReadError, ImageReadError) as error:
            if self.broken_samples is None:
                raise type(error)(f"Row {name}: {error}") from error
            self.broken_samples.add(name, error, files)
            return _STAND_IN
        self._take_out_control_tokens(messages)
        return messages

    def _take_out_control_tokens(self, messages: list[dict]):
        """Take the tokenizer's special tokens out of text: its placeholders, and its end of text, would be obeyed."""
        special = {token.content for token in self.processor.tokenizer.added_tokens_decoder.values() if token.special}
        special |= {self.processor.video_token, self.processor.image_token}
        pattern = re.compile("|".join(map(re.escape, sorted(special))))
        for block in (block for message in messages for block in message["content"]):
            if block["type"] == "text":
                block["text"] = without_placeholders(block["text"], pattern).strip()

    def _load(self, kind: str, clip: Clip) -> EncodedFrames | FittedFrames | Image.Image:
        if kind == "image":
            return read_image(clip.source)
        if self.vision_features is not None:
            return self.vision_features(clip.source, *([] if clip.is_whole else [clip.start, clip.end]))
        if clip in self._kept:
            return self._kept[clip]
        # As uint8 they take a quarter of the memory that normalised frames take.
        encoded = self.processor.video_processor(clip, do_rescale=False, do_normalize=False, progress=False)
        frames = FittedFrames(encoded["pixel_values_videos"])
        if self.keep_frames:
            self._kept[clip] = frames
        return frames
