"""A film as far as a model has seen it: the recurrent state, and the frames that wait for the model."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import Cache

from .clock import Clock
from .frames import Picture
from .recurrent_state import copy_cache, join_caches


class _Memory(NamedTuple):
    """Everything that is known of a film, in one value: an interrupted step leaves the previous one."""

    cache: Cache
    num_frames: int = 0  # frames in the cache
    clock: Clock | None = None  # of a stream with times
    window: tuple[torch.Tensor, ...] = ()  # frames that wait for the model, each (3, height, width)

    def add(self, pixels: torch.Tensor, clock: Clock | None) -> "_Memory":
        """The memory after one more sample."""
        return self._replace(window=(*self.window, pixels), clock=clock)


class WatchedFilm:
    """A film that a model watches frame by frame; several threads may use it.

    Args:
        model ([`Ma2mbaForVideoQA`]): the model.
        normalize: turns uint8 frames `(num_frames, 3, height, width)` into the input of the vision encoder.
        frame_rate: samples per second of film.
        cache: the state of one sample after the first `num_frames` frames.
        clock: the clock of a stream that these frames ended.
    """

    def __init__(
        self,
        model,
        normalize: Callable[[torch.Tensor], torch.Tensor],
        frame_rate: float,
        cache: Cache,
        num_frames: int = 0,
        clock: Clock | None = None,
    ):
        self.model, self.normalize, self.frame_rate = model, normalize, frame_rate
        self.lock = threading.RLock()  # held while the memory is replaced
        self._memory = _Memory(cache, num_frames, clock)

    @property
    def cache(self) -> Cache:
        """The state after the frames that have gone through the model."""
        return self._memory.cache

    @property
    def clock(self) -> Clock | None:
        """The clock of a stream with times, or None."""
        return self._memory.clock

    @property
    def num_waiting(self) -> int:
        """The number of frames that wait for the model."""
        return len(self._memory.window)

    @property
    def num_frames(self) -> int:
        """The number of frames sampled so far."""
        memory = self._memory
        return memory.num_frames + len(memory.window)

    def take(self, seconds: float | None, picture: Picture) -> Iterator[None]:
        """Adds the samples that the arrival of a picture settles, and yields after each.

        Args:
            seconds: the time of the picture, not before that of the last one; None if the picture is one sample.
        """
        yield from self.take_due(before=seconds)
        if seconds is None:
            with self.lock:
                self._memory = self._memory.add(picture.pixels, clock=None)
            yield
            return
        with self.lock:
            clock = self.clock or Clock(self.frame_rate, seconds, seconds, picture)
            self._memory = self._memory._replace(clock=clock.show(seconds, picture))

    def take_due(self, before: float | None = None) -> Iterator[None]:
        """Adds the frame on screen at each sample that is due, see [`Clock.is_due`], and yields after each."""
        while True:
            with self.lock:
                clock = self.clock
                if clock is None or not clock.is_due(before):
                    return
                self._memory = self._memory.add(clock.on_screen.pixels, clock.tick())
            yield


@torch.no_grad()
def feed(films: Sequence[WatchedFilm]):
    """Puts the frames that wait, equally many of each film, through the model as one batch."""
    with contextlib.ExitStack() as locks:
        for film in films:
            locks.enter_context(film.lock)
        frames = [frame for film in films for frame in film._memory.window]
        if not frames:
            return
        model, normalize = films[0].model, films[0].normalize
        features_FND = model.get_video_features(normalize(torch.stack(frames))).pooler_output
        embeddings = model.get_input_embeddings().weight
        inputs_embeds_BTD = features_FND.reshape(len(films), -1, features_FND.shape[-1]).to(embeddings.dtype)
        if embeddings.device.type != "meta":  # otherwise accelerate moves the inputs
            inputs_embeds_BTD = inputs_embeds_BTD.to(embeddings.device)
        # On copies: an interrupted step leaves some layers further than others.
        cache = join_caches([film.cache for film in films])
        model(inputs_embeds=inputs_embeds_BTD, cache_params=cache, use_cache=True, logits_to_keep=1)
        for row, film in enumerate(films):
            own_cache = cache if len(films) == 1 else copy_cache(cache, rows=[row])
            film._memory = _Memory(own_cache, film.num_frames, film.clock)


__all__ = ["WatchedFilm", "feed"]
