"""The films of `examples/make_videos.py` without a codec, and pipelines that watch their still parts quickly."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from make_videos import FPS, QUESTIONS, changes, paint

NEVER = (-1, -1)  # the beginning and the end of an event that does not happen


def random_answers(rng: random.Random) -> dict[str, str]:
    """Return an answer to each kind of question."""
    return {kind: rng.choice(choices) for kind, (_, choices) in QUESTIONS.items()}


def without_events(film: dict) -> dict:
    """Return a film of the same length and background in which nothing happens."""
    nothing = {"shape": ("circle", *NEVER), "ball": ("left", *NEVER), "blocks": [], "blinks": [], "flash": ("red", -1)}
    return {**film, **nothing}


def pictures_with_times(film: dict) -> Iterator[tuple[float, np.ndarray]]:
    """Yield pairs of seconds and a frame, one for each change of the picture and one for the end."""
    picture = paint(film)
    for seconds in sorted({*changes(film), film["seconds"] - 1 / FPS}):
        yield seconds, picture(seconds)


def encode_each_picture_once(model) -> None:
    """Let the vision encoder of a model skip each frame that equals the frame before it.

    The features of such a frame are those of the frame before.
    """
    encode = model.get_video_features

    def encode_changes(pixels_F3HW: torch.Tensor):
        is_new = F.pad((pixels_F3HW[1:] != pixels_F3HW[:-1]).flatten(1).any(1), (1, 0), value=True)
        output = encode(pixels_F3HW[is_new])
        output.pooler_output = output.pooler_output[is_new.cumsum(0) - 1]
        return output

    model.get_video_features = encode_changes


def load_pipeline(model: str | None):
    """Return the pipeline of a checkpoint, by default of the one that ships with the package, for still films."""
    if model is not None and not Path(model).is_dir():
        sys.exit(f"{model} is not a folder with a checkpoint: run `make demo` first, or name another folder.")
    from transformers import pipeline

    import transformers_ma2mba  # noqa: F401  registers the pipeline

    torch.set_num_threads(1)
    qa = pipeline("video-question-answering", model=model)
    encode_each_picture_once(qa.model)
    return qa


def watch(qa, films: list[dict]) -> list:
    """Watch films of one length from beginning to end as one batch, and return their sessions."""
    return qa.watch([pictures_with_times(film) for film in films], progress=False, frames_per_piece=4096)
