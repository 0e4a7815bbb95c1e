"""A batch with a video, the gradients of a training step on it, and a question with candidates."""

import torch
from tiny import random_pixels

QUESTION = "Who opens the door?"
CANDIDATES = ["red", "blue"]


def video_batch(config, num_frames=3, side=32) -> dict:
    """Inputs and labels of a video between two words and six, of which the last four are supervised."""
    video = [config.video_token_id] * (num_frames * config.tokens_per_frame)
    input_ids = torch.tensor([[7, 8, *video, 9, 10, 11, 12, 13, 14]])
    labels = torch.where(torch.arange(input_ids.shape[1]) < input_ids.shape[1] - 4, -100, input_ids)
    return dict(input_ids=input_ids, labels=labels, pixel_values_videos=random_pixels(num_frames, side))


def gradients(model, batch) -> dict:
    """The loss of a training step, and the gradient of each trained parameter by name."""
    model.zero_grad()
    loss = model.train()(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}
