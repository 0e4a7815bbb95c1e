"""Models that run in milliseconds, their processor, and inputs for them."""

import copy
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import CLIPVisionConfig, Mamba2Config, Mamba2Model, PreTrainedTokenizerFast, SiglipVisionConfig

from transformers_ma2mba import Ma2mbaConfig, Ma2mbaForVideoQA, Ma2mbaProcessor

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
sys.path.append(str(EXAMPLES))  # so that tests can import the examples

VOCABULARY = 384
WIDTH = 32
TEXTS = [
    "<|system|>You are a helpful assistant.",
    "<|user|>",
    "<|assistant|>",
    "Who opens the door?",
    "Which colour is it?",
    "red green blue yellow",
]


def tiny_vision_config(kind="clip", image_size=32, patch_size=8, num_hidden_layers=3, **options):
    """CLIP or SigLIP. By default, 32 px in patches of 8 px give a grid of 4 x 4, pooled to 4 tokens a frame."""
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
        hidden_size=WIDTH,
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


def tiny_mamba2(model_class=Mamba2Model, dtype=torch.float64, seed=0, **options):
    """A stock Mamba-2 model in training mode; `options` go into its configuration."""
    torch.manual_seed(seed)
    return model_class(tiny_text_config(**options)).to(dtype).train()


def lora(model, **options):
    """The model in float64, with LoRA adapters that contribute to its output from the start."""
    torch.manual_seed(3)
    config = LoraConfig(**{"r": 3, "target_modules": ["in_proj"], "init_lora_weights": False, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an attribute that Transformers has deprecated
        return get_peft_model(model, config).to(torch.float64)


def tiny_model(config: Ma2mbaConfig, seed=0, dtype=torch.float32) -> Ma2mbaForVideoQA:
    """An untrained model in evaluation mode whose answers depend on the frames."""
    torch.manual_seed(seed)
    model = Ma2mbaForVideoQA(copy.deepcopy(config))  # some tests change the model's configuration
    with torch.no_grad():
        # The weights of the usual initialisation are so small that frames and layers would hardly change the output.
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "conv1d" not in name:
                parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5)
        model.get_input_embeddings().weight.normal_(std=0.5)
    return model.to(dtype).eval()


def padded_model(scale: float, num_tokens: int | None = VOCABULARY) -> Ma2mbaForVideoQA:
    """A model with 8 rows of padding beyond its tokens, whose logits grow with `scale`, as those of the placeholders.

    The rows are pairs of opposite vectors, so that one of each pair has a logit above 0. All other weights are the
    same for each scale.
    """
    config = tiny_config(
        text=dict(vocab_size=VOCABULARY + 8, tie_word_embeddings=False),
        tie_word_embeddings=False,
        unpadded_vocab_size=num_tokens,
    )
    model = tiny_model(config)
    with torch.no_grad():
        rows = model.lm_head.weight[VOCABULARY - 2 :]
        rows[1::2] = -rows[::2]
        rows *= scale
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE like the GPT-NeoX tokenizer, which reads `<|user|>` as ordinary text.

    It has 382 tokens. The processor adds <image> and <video>.
    """
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
    # A model with random weights may generate any token, so each one needs a text.
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
    """The frames of [`random_frames`] as the model takes them: `(num_frames, 3, size, size)` uint8 pixels."""
    return torch.from_numpy(random_frames(num_frames, size, size, seed)).permute(0, 3, 1, 2).contiguous()


def random_embeddings(length=19, batch_size=2, dtype=torch.float64) -> torch.Tensor:
    """`(batch_size, length, WIDTH)` embeddings, the same ones in each call."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch_size, length, WIDTH, dtype=dtype, generator=generator)


def pad_left(samples: list[torch.Tensor], value) -> torch.Tensor:
    """Join `(1, length)` tensors of different lengths into one batch, padded on the left."""
    longest = max(sample.shape[1] for sample in samples)
    return torch.cat([nn.functional.pad(sample, (longest - sample.shape[1], 0), value=value) for sample in samples])


def approximately(result):
    """The pipeline's answers with approximate scores, because a batch adds numbers in another order than its rows."""
    if isinstance(result, list):
        return [approximately(entry) for entry in result]
    return {**result, "score": pytest.approx(result["score"], rel=1e-3)}
