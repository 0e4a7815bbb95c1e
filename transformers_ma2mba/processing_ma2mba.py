"""The processor: text, videos and images to the model's inputs, in the paper's conversation format."""

import os
import re
from collections.abc import Mapping

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import load_image
from transformers.processing_utils import MultiModalData, ProcessingKwargs

from .configuration_ma2mba import Ma2mbaConfig
from .video import Clip, EncodedFrames, as_list_of_videos
from .video_processing_ma2mba import Ma2mbaVideoProcessor, Ma2mbaVideosKwargs

# Paper, Table 5. `<|system|>`, `<|user|>` and `<|assistant|>` are ordinary text. The model learns the assistant's text
# with its end of text.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for block in content -%}
{%- if block.type == 'video' -%}<video>
{%- elif block.type == 'image' -%}<image>
{%- else -%}{{ block.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0].role != 'system' -%}<|system|>You are a helpful assistant.<|endoftext|>{%- endif -%}
{%- for message in messages -%}
<|{{ message.role }}|>
{%- if message.role == 'assistant' -%}
{%- generation -%}{{ render(message.content) }}<|endoftext|>{%- endgeneration -%}
{%- else -%}
{{ render(message.content) }}<|endoftext|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


# Behind it an answer begins. No token may reach over this place, because prompts of generation end there.
_BEHIND_MARKER = re.compile(r"(?<=<\|assistant\|>)")


class Ma2mbaProcessorKwargs(ProcessingKwargs, total=False):
    """Options of the processor, by the part that they belong to."""

    videos_kwargs: Ma2mbaVideosKwargs


class Ma2mbaProcessor(ProcessorMixin):
    r"""A tokenizer and a video processor in one, with the paper's chat template.

    Args:
        tokenizer: a fast tokenizer; `image_token` and `video_token` are among its special tokens.
        video_processor ([`Ma2mbaVideoProcessor`]): prepares videos, and images as videos of one frame.
        tokens_per_frame (`int`): the number of placeholders for a frame, `config.tokens_per_frame`.
        chat_template (`str`, *optional*): the paper's (Table 5) by default.
        image_token, video_token (`str`): the placeholders that stand for a whole image or video in text.
    """

    valid_processor_kwargs = Ma2mbaProcessorKwargs

    def __init__(
        self,
        tokenizer=None,
        video_processor=None,
        tokens_per_frame: int = 144,
        chat_template=None,
        image_token: str = "<image>",
        video_token: str = "<video>",
    ):
        for token in (image_token, video_token):
            if token not in tokenizer.get_vocab():
                raise ValueError(
                    f"The tokenizer has no token {token}: add it, or let `Ma2mbaProcessor.from_model_config` do so."
                )
        # Padding after a text would become part of its state. The initial arguments are saved with the tokenizer.
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
        self.tokens_per_frame = tokens_per_frame
        self.image_token = image_token
        self.video_token = video_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(video_token)
        if chat_template is None:
            chat_template = CHAT_TEMPLATE.replace("<image>", image_token).replace("<video>", video_token)
        super().__init__(tokenizer, video_processor, chat_template=chat_template)

    @classmethod
    def from_model_config(cls, config: Ma2mbaConfig, tokenizer) -> "Ma2mbaProcessor":
        """Make a processor for a new model, with the frame size, rate and normalisation of `config`.

        The placeholders are added to `tokenizer` if it lacks them, and must get their ids in `config`. The number of
        tokens becomes `config.unpadded_vocab_size`: call this method before the model or its config is saved.

        Raises:
            ValueError: if they get other ids, or the tokenizer has more tokens than the language model.
        """
        placeholders = {"<image>": config.image_token_id, "<video>": config.video_token_id}
        missing = [token for token in placeholders if token not in tokenizer.get_vocab()]
        tokenizer.add_tokens(missing, special_tokens=True)
        for token, expected in placeholders.items():
            if (token_id := tokenizer.convert_tokens_to_ids(token)) != expected:
                raise ValueError(
                    f"The tokenizer gives {token} the id {token_id}, but the config expects {expected}: set "
                    "image_token_id and video_token_id of the config to the tokenizer's."
                )
        num_tokens, rows = max(tokenizer.get_vocab().values()) + 1, config.text_config.vocab_size
        if num_tokens > rows:
            raise ValueError(
                f"The tokenizer has {num_tokens} tokens, placeholders included, but the language model has only "
                f"{rows}: use the tokenizer that the language model was trained with."
            )
        config.unpadded_vocab_size = num_tokens
        side = config.vision_config.image_size
        video_processor = Ma2mbaVideoProcessor(
            size={"height": side, "width": side},
            fps=config.frame_rate,
            image_mean=config.image_mean,
            image_std=config.image_std,
        )
        return cls(tokenizer, video_processor, tokens_per_frame=config.tokens_per_frame)

    def check_model_config(self, config: Ma2mbaConfig):
        """Check that the frames and placeholders of this processor suit a model.

        Raises:
            ValueError: if the model has another frame size or another number of tokens per frame.
        """
        size, side = dict(self.video_processor.size), config.vision_config.image_size
        is_final = self.video_processor.do_resize and not self.video_processor.do_center_crop
        if is_final and (height := size.get("height")) and (height, size["width"]) != (side, side):
            raise ValueError(
                f"The processor makes frames of {height} x {size['width']} px, but this checkpoint's vision encoder "
                f"takes {side} x {side} px: load both from one checkpoint."
            )
        if self.tokens_per_frame != config.tokens_per_frame:
            raise ValueError(
                f"The processor counts {self.tokens_per_frame} tokens a frame, but the model makes "
                f"{config.tokens_per_frame}: load both from one checkpoint."
            )

    def __call__(self, images=None, text=None, videos=None, **kwargs) -> BatchFeature:
        r"""Convert text, videos and images to the model's inputs.

        Args:
            text (`str` or `list[str]`): text in which each `<video>` and `<image>` stands for one video or image, in
                order.
            videos: one video, a list, or a list of lists; see [`Ma2mbaVideoProcessor`].
            images: one image, a list, or a list of lists; arrays, PIL images, paths or URLs.
            kwargs: options of tokenizer (`padding`, `return_tensors`, ...) and video processor (`fps`, ...).

        Returns:
            `input_ids` and `attention_mask` `(batch_size, sequence_length)`, with `padding` padded on the left;
            `pixel_values_videos` `(num_frames, 3, height, width)` if there are videos and `pixel_values`
            `(num_images, 3, height, width)` if there are images, both of the whole batch in order.

        Raises:
            ValueError: if placeholders and videos or images differ in number, or all three are missing.
        """
        if text is None and videos is None and images is None:
            raise ValueError("Give the processor text, videos or images.")
        options = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_options, video_options = options["text_kwargs"], options["videos_kwargs"]
        return_tensors = text_options.pop("return_tensors", None)
        video_options.pop("return_tensors", None)

        if text is not None:
            texts = [text] if isinstance(text, str) else text
            if not isinstance(texts, (list, tuple)) or not all(isinstance(sample, str) for sample in texts):
                raise ValueError("text must be a string or a list of strings.")
            self._check_counts(texts, videos, "video", self.video_token, as_list_of_videos)
            self._check_counts(texts, images, "image", self.image_token, _flat_list_of_images)

        data, num_frames, num_images = {}, [], []
        if videos is not None:
            encoded = _join_encoded(videos) or self.video_processor(videos, **video_options)
            num_frames = encoded.pop("num_frames")
            data.update(encoded)
        if images is not None:
            video_options.pop("return_metadata", None)
            loaded = [
                [load_image(os.fspath(image)) if isinstance(image, (str, os.PathLike)) else image]
                for image in _flat_list_of_images(images)
            ]
            encoded = self.video_processor(loaded, **video_options)
            num_images = encoded["num_frames"]
            data["pixel_values"] = encoded["pixel_values_videos"]
        if text is not None:
            text_inputs = self._tokenize(texts, num_frames, num_images, text_options)
            if return_tensors is None:
                text_inputs = {name: [row.tolist() for row in rows] for name, rows in text_inputs.items()}
            data = {**text_inputs, **data}
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["video_metadata"])

    def apply_chat_template(self, conversation, *args, **kwargs):
        """Format messages, and with `tokenize=True` convert them to the model's inputs; see Transformers.

        A video block may have `start` and `end`, the seconds between which a clip is cut out of its file:
        `{"type": "video", "path": "film.mp4", "start": 60, "end": 90.5}`.

        Raises:
            ValueError: if an image has `start` or `end`, or a clip does not end after its start.
        """
        return super().apply_chat_template(_with_clips(conversation), *args, **kwargs)

    def _check_counts(self, texts: list[str], visuals, kind: str, token: str, flatten):
        """Check that every placeholder has its video or image, sample by sample if they are nested."""
        found = [sample.count(token) for sample in texts]
        given = 0 if visuals is None else len(flatten(visuals))
        where = "The text has"
        nested = isinstance(visuals, (list, tuple)) and all(isinstance(sample, (list, tuple)) for sample in visuals)
        if nested and len(visuals) == len(texts) and sum(found) == given:
            for row, (sample, count) in enumerate(zip(visuals, found, strict=True)):
                if sample and len(flatten(sample)) != count:
                    found, given, where = [count], len(flatten(sample)), f"Text {row} of the batch has"
                    break
        if sum(found) != given:
            raise ValueError(
                f"{where} {sum(found)} {token} placeholder{'' if sum(found) == 1 else 's'}, but {given} {kind}"
                f"{' was' if given == 1 else 's were'} given: each {kind} needs one {token} in the text."
            )

    def _tokenize(self, texts: list[str], num_frames: list[int], num_images: list[int], options: dict) -> dict:
        """Tokenizes one placeholder for each video, and then repeats its id for each token of each frame.

        An hour of film has half a million placeholders, which would slow the tokenizer down.
        """
        options = dict(options)
        padding = options.pop("padding", False)
        side = options.pop("padding_side", None) or self.tokenizer.padding_side
        max_length, multiple = options.pop("max_length", None), options.pop("pad_to_multiple_of", None)
        if options.pop("truncation", None):
            raise ValueError("Truncation would cut videos in two: shorten the text, or lower `fps`, instead.")
        for unused in ("return_mm_token_type_ids", "return_text_replacement_offsets"):
            options.pop(unused, None)
        encoding = self._encode(texts, options)

        lengths = {self.video_token_id: iter(num_frames), self.image_token_id: iter(num_images)}
        expanded = {name: [] for name in encoding}
        for row, input_ids in enumerate(encoding["input_ids"]):
            repeats = np.ones(len(input_ids), dtype=np.int64)
            for position, token_id in enumerate(input_ids):
                if token_id in lengths:
                    repeats[position] = next(lengths[token_id]) * self.tokens_per_frame
            for name in encoding:
                expanded[name].append(np.repeat(np.asarray(encoding[name][row]), repeats, axis=0))

        target = None
        if padding == "max_length":
            target = max_length
        elif padding not in (False, None, "do_not_pad"):
            target = max(len(row) for row in expanded["input_ids"])
        if target is None:
            return expanded
        target = -(-target // multiple) * multiple if multiple else target
        fill = {"input_ids": self.tokenizer.pad_token_id}
        return {name: [_pad(row, target, side, fill.get(name, 0)) for row in rows] for name, rows in expanded.items()}

    def _encode(self, texts: list[str], options: dict) -> dict[str, list]:
        """Tokenize answers on their own: in the answer "(A)", a token ">(" would hold the marker's end, too."""
        adds_tokens = options.get("add_special_tokens", True) and self.tokenizer.num_special_tokens_to_add()
        pieces = [[text] if adds_tokens else _BEHIND_MARKER.split(text) for text in texts]
        encoding = self.tokenizer([piece for row in pieces for piece in row], **options)
        joined, number = {name: [] for name in encoding}, 0
        for row in pieces:
            starts = np.cumsum([0, *map(len, row)]).tolist()
            for name, encoded in encoding.items():
                values = encoded[number : number + len(row)]
                if name == "offset_mapping":
                    # Offsets without spaces would put a space at an answer's begin before it.
                    values = [
                        [(first + start, max(last, 1) + start) for first, last in own]
                        for own, start in zip(values, starts, strict=False)
                    ]
                joined[name].append([value for own in values for value in own])
            number += len(row)
        return joined

    def _adjust_assistant_masks_indices(self, processed_dict, generation_indices):
        # The stock loop visits every token in Python, once for each turn. Here repeated placeholders keep the offsets
        # of the placeholder in the text, so that a range of characters is one comparison of arrays.
        masks = []
        for offsets, ranges in zip(processed_dict.pop("offset_mapping"), generation_indices, strict=True):
            start, end = np.asarray(offsets).reshape(-1, 2).T
            mask = np.zeros(len(start), dtype=np.int64)
            for first, last in ranges:
                mask |= (start < last) & (end > first)
            masks.append(mask)
        is_tensor = hasattr(processed_dict["input_ids"], "shape")
        processed_dict["assistant_masks"] = masks if is_tensor else [mask.tolist() for mask in masks]
        return processed_dict

    @property
    def model_input_names(self) -> list[str]:
        """The names of the model's inputs."""
        return ["input_ids", "attention_mask", "pixel_values_videos", "pixel_values"]

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs) -> MultiModalData:
        """Count the placeholders for images of `(height, width)` and videos of `(num_frames, height, width)`."""
        data = {}
        if image_sizes is not None:
            data["num_image_tokens"] = [self.tokens_per_frame] * len(image_sizes)
            data["num_image_patches"] = [1] * len(image_sizes)
        if video_sizes is not None:
            data["num_video_tokens"] = [num_frames * self.tokens_per_frame for num_frames, _, _ in video_sizes]
        return MultiModalData(**data)


def _pad(row: np.ndarray, length: int, side: str, value: int) -> np.ndarray:
    missing = length - len(row)
    if missing < 0:
        raise ValueError(f"A text with its videos takes {len(row)} tokens, more than max_length={length}.")
    widths = (missing, 0) if side == "left" else (0, missing)
    return np.pad(row, [widths, *[(0, 0)] * (row.ndim - 1)], constant_values=value)


def _join_encoded(videos) -> dict | None:
    """The inputs for films that are encoded already; None for other videos."""
    films = as_list_of_videos(videos)
    if not any(isinstance(film, EncodedFrames) for film in films):
        return None
    if not all(isinstance(film, EncodedFrames) for film in films):
        raise ValueError("The videos of one batch must be encoded already, or not, all of them.")
    different = list(dict.fromkeys(films))  # by identity: a film may be in several samples
    starts = dict(zip(different, np.cumsum([0, *(len(film.features) for film in different)]).tolist(), strict=False))
    return {
        "num_frames": [len(film.picture_indices) for film in films],
        "vision_features_videos": torch.cat([film.features for film in different]),
        "picture_indices_videos": torch.cat([film.picture_indices + starts[film] for film in films]),
    }


def _with_clips(messages):
    """Messages, or lists of messages, in which the videos of blocks with `start` or `end` are clips."""
    if isinstance(messages, (list, tuple)):
        return [_with_clips(item) for item in messages]
    if not isinstance(messages, Mapping):
        return messages
    if not isinstance(messages.get("content"), (list, tuple)):
        return messages
    return {**messages, "content": [_with_clip(block) for block in messages["content"]]}


def _with_clip(block):
    start, end = (block.get(name) for name in ("start", "end")) if isinstance(block, Mapping) else (None, None)
    if start is None and end is None:
        return block
    if block.get("type") != "video":
        raise ValueError(f"Only a video has a start and an end, got {dict(block)!r}.")
    source = next((block[name] for name in ("video", "url", "path") if block.get(name) is not None), None)
    return {"type": "video", "video": Clip(source, start, end)}


def _flat_list_of_images(images) -> list:
    """Flattens one image, a list, or a list of lists of images, paths and URLs."""
    if isinstance(images, (list, tuple)):
        return [image for nested in images for image in _flat_list_of_images(nested)]
    return [images]


__all__ = ["Ma2mbaProcessor"]
