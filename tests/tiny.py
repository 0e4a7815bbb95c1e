"""A Ma²mba so small that a test can run it in milliseconds, and what goes into it."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPVisionConfig, Mamba2Config, PreTrainedTokenizerFast, SiglipVisionConfig

from transformers_ma2mba import Ma2mbaConfig, Ma2mbaForVideoQA, Ma2mbaProcessor

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
sys.path.append(str(EXAMPLES))  # for tests of the examples

VOCABULARY = 384
TEXTS = [
    "<|system|>You are a helpful assistant.",
    "<|user|>",
    "<|assistant|>",
    "Who opens the door?",
    "Which colour is it?",
    "red green blue yellow",
]


def tiny_vision_config(kind="clip", image_size=32, patch_size=8, num_hidden_layers=3, **options):
    """CLIP or SigLIP: 32 px in patches of 8 px are a grid of 4 x 4, pooled to 4 tokens a frame."""
    config_class = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[kind]
    return config_class(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=3,
        image_size=image_size,
        patch_size=patch_size,
        **options,
    )


def tiny_text_config(**options) -> Mamba2Config:
    defaults = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        head_dim=16,
        num_heads=4,
        state_size=16,
        n_groups=1,
        chunk_size=8,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        tie_word_embeddings=True,
    )
    return Mamba2Config(**{**defaults, **options})


def tiny_config(kind="clip", text=None, vision=None, **options) -> Ma2mbaConfig:
    defaults = dict(image_token_id=VOCABULARY - 2, video_token_id=VOCABULARY - 1, frames_per_vision_pass=3)
    return Ma2mbaConfig(
        vision_config=tiny_vision_config(kind, **(vision or {})),
        text_config=tiny_text_config(**(text or {})),
        **{**defaults, **options},
    )


def tiny_model(config: Ma2mbaConfig, seed=0, dtype=torch.float32) -> Ma2mbaForVideoQA:
    """An untrained model in evaluation mode whose answers depend on what it sees."""
    torch.manual_seed(seed)
    model = Ma2mbaForVideoQA(copy.deepcopy(config))  # some tests change it
    with torch.no_grad():
        # Of the usual initialisation hardly anything arrives: pictures and layers would make no difference.
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "conv1d" not in name:
                parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5)
        model.get_input_embeddings().weight.normal_(std=0.5)
    return model.to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A small relative of the GPT-NeoX tokenizer: byte-level BPE, to which `<|user|>` is ordinary text. With <image>
    and <video>, which are added last, it has 384 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    # Filled up, so that every token that a model with random weights may say has a text.
    tokenizer.add_tokens([f"word{index}" for index in range(VOCABULARY - 2 - tokenizer.get_vocab_size())])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|padding|>",
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_processor(config: Ma2mbaConfig) -> Ma2mbaProcessor:
    return Ma2mbaProcessor.from_model_config(config, tiny_tokenizer())


def random_frames(num_frames: int, height=32, width=32, seed=0) -> np.ndarray:
    """`(num_frames, height, width, 3)` uint8 noise, coarse enough to survive resizing."""
    blocks = np.random.default_rng(seed).integers(0, 256, (num_frames, -(-height // 8), -(-width // 8), 3), np.uint8)
    return blocks.repeat(8, 1).repeat(8, 2)[:, :height, :width]


def random_pixels(num_frames: int, size=32, seed=0) -> torch.Tensor:
    """`(num_frames, 3, size, size)` uint8, as the model takes them."""
    return torch.from_numpy(random_frames(num_frames, size, size, seed)).permute(0, 3, 1, 2).contiguous()


def approximately(result):
    """Answers as the pipeline returns them, to compare with others whose scores may be rounded otherwise: a batch adds
    up in another order than its rows."""
    if isinstance(result, list):
        return [approximately(entry) for entry in result]
    return {**result, "score": pytest.approx(result["score"], rel=1e-3)}
