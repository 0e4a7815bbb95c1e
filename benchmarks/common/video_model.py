"""A Video-Ma²mba with random weights, random inputs for it, and the steps by which it watches a film."""

import torch

from common.options import TINY
from common.training_step import limit_gpu_memory

HOUR = 3600  # seconds
DIFFERENT_FRAMES = 480


def load_model(job: dict):
    """Return a `Ma2mbaForVideoQA` with random weights, of the job's preset or tiny."""
    from transformers import CLIPVisionConfig, Mamba2Config

    from transformers_ma2mba import Ma2mbaConfig, Ma2mbaForVideoQA

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    device = torch.device(job["device"])
    limit_gpu_memory(device)
    if job["preset"]:
        config = Ma2mbaConfig.from_preset(job["preset"])
    else:
        sizes = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=3)
        vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
        tokens = dict(image_token_id=TINY["vocab_size"] - 2, video_token_id=TINY["vocab_size"] - 1)
        config = Ma2mbaConfig(vision_config=vision, text_config=Mamba2Config(**TINY), **tokens)
    torch.set_default_dtype(getattr(torch, job["dtype"]))
    with device:
        model = Ma2mbaForVideoQA(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def random_frames(model, num_frames: int) -> torch.Tensor:
    """Return `(num_frames, 3, size, size)` uint8 in host memory, of which at most `DIFFERENT_FRAMES` differ."""
    size = model.config.vision_config.image_size
    frames = torch.randint(256, (min(num_frames, DIFFERENT_FRAMES), 3, size, size), dtype=torch.uint8)
    return frames.repeat(-(-num_frames // len(frames)), 1, 1, 1)[:num_frames]


def random_text(model, num_tokens: int) -> torch.Tensor:
    """Return `(1, num_tokens)` ids without placeholders."""
    highest = min(model.config.image_token_id, model.config.video_token_id)
    return torch.randint(highest, (1, num_tokens), device=model.device)


@torch.no_grad()
def watch_piece(model, frames: torch.Tensor, cache):
    """Return the state after the frames, `(num_frames, 3, size, size)`, which follow those of the state `cache`."""
    features = model.get_video_features(frames).pooler_output
    embeddings = features.reshape(1, -1, features.shape[-1])
    return model(inputs_embeds=embeddings, cache_params=cache, use_cache=True, logits_to_keep=1).cache_params


def watch_pieces(model, frames: torch.Tensor, frames_per_piece: int) -> None:
    """Watch the frames piece by piece and wait for the device."""
    cache = None
    for piece in frames.split(frames_per_piece):
        cache = watch_piece(model, piece, cache)
    synchronize(model)


def synchronize(model) -> None:
    """Wait for the model's device."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def duration(seconds: int) -> str:
    """Return a film's length in words."""
    if seconds < 600:
        return f"{seconds} seconds"
    return f"{seconds / 60:g} minutes" if seconds < HOUR else f"{seconds / HOUR:.3g} hours"
