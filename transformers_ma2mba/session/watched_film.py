"""A film as far as a model has seen it: the recurrent state, and the frames that wait for the model.

Several films are watched in lockstep, as one batch; one film is a batch of one.
"""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from transformers import Cache

from ..mamba2 import copy_cache, join_caches
from ..video import Clock, Picture, VideoStream, progress_bar


class Memory(NamedTuple):
    """Everything that is known of a film, in one value: an interrupted step leaves the previous one."""

    cache: Cache
    num_frames: int = 0  # frames in the cache
    clock: Clock | None = None  # of a stream with times
    window: tuple[torch.Tensor, ...] = ()  # frames that wait for the model, each (3, height, width)

    def add(self, pixels: torch.Tensor, clock: Clock | None) -> "Memory":
        """The memory after one more sample."""
        return self._replace(window=(*self.window, pixels), clock=clock)


class WatchedFilm:
    """A film that a model watches frame by frame; several threads may use it.

    Args:
        model ([`Ma2mbaForVideoQA`]): the model.
        normalize: turns uint8 frames `(num_frames, 3, height, width)` into the input of the vision encoder.
        frame_rate: samples per second of film.
        memory: the film so far.
    """

    def __init__(self, model, normalize: Callable[[torch.Tensor], torch.Tensor], frame_rate: float, memory: Memory):
        self.model, self.normalize, self.frame_rate, self.memory = model, normalize, frame_rate, memory
        self.lock = threading.RLock()  # held while the memory is replaced

    @property
    def num_frames(self) -> int:
        """The number of frames sampled so far."""
        memory = self.memory
        return memory.num_frames + len(memory.window)

    @property
    def seconds(self) -> float:
        """The length of the film seen so far."""
        return self.num_frames / self.frame_rate

    def take(self, seconds: float | None, picture: Picture) -> Iterator[None]:
        """Add the samples that the arrival of a picture settles, and yield after each.

        Args:
            seconds: the time of the picture, not before that of the last one; None if the picture is one sample.
        """
        yield from self.take_due(before=seconds)
        if seconds is None:
            with self.lock:
                self.memory = self.memory.add(picture.pixels, clock=None)
            yield
            return
        with self.lock:
            clock = self.memory.clock or Clock(self.frame_rate, seconds, seconds, picture)
            self.memory = self.memory._replace(clock=clock.show(seconds, picture))

    def take_due(self, before: float | None = None) -> Iterator[None]:
        """Add the frame on screen at each sample that is due, see [`Clock.is_due`], and yield after each."""
        while True:
            with self.lock:
                clock = self.memory.clock
                if clock is None or not clock.is_due(before):
                    return
                self.memory = self.memory.add(clock.on_screen.pixels, clock.tick())
            yield

    def catch_up(self) -> Memory:
        """Feed the model all samples that are due, and return the memory."""
        with self.lock:
            for _ in self.take_due():
                pass
            feed([self])
            return self.memory


def watch_in_lockstep(
    films: Sequence[WatchedFilm],
    streams: Sequence[VideoStream],
    samples: Sequence[Iterator[None]],
    frames_per_piece: int,
    progress: bool | None,
):
    """Take equally many samples of each film at a time, and feed them to the model as one batch.

    Args:
        films: the films, of one model.
        streams: the sources of the films, for the progress bar.
        samples: for each film an iterator that adds one sample at a time, such as [`WatchedFilm.take`].
        frames_per_piece: the most frames that go through the model at a time.
        progress: whether to show a bar; None shows one if watching takes a while.
    """
    watching = list(zip(films, samples, strict=True))
    feed(films)  # the frames that an interruption left
    with _bar(films, streams, progress) as show:
        while watching:
            piece, still_watching = max(1, frames_per_piece // len(watching)), []
            for film, taken in watching:
                count = 0
                for _ in islice(taken, piece):
                    count += 1
                    show()
                if count == piece:
                    still_watching.append((film, taken))
            feed(films)
            watching = still_watching


def feed(films: Sequence[WatchedFilm]):
    """Feed all waiting frames to the model; films with equally many waiting frames form a batch."""
    batches = defaultdict(list)
    for film in films:
        batches[len(film.memory.window)].append(film)
    for batch in batches.values():
        _feed_batch(batch)


@torch.no_grad()
def _feed_batch(films: Sequence[WatchedFilm]):
    with contextlib.ExitStack() as locks:
        for film in films:
            locks.enter_context(film.lock)
        frames = [frame for film in films for frame in film.memory.window]
        if not frames:
            return
        model, normalize = films[0].model, films[0].normalize
        features_FND = model.get_video_features(normalize(torch.stack(frames))).pooler_output
        embeddings = model.get_input_embeddings().weight
        inputs_embeds_BTD = features_FND.reshape(len(films), -1, features_FND.shape[-1]).to(embeddings.dtype)
        if embeddings.device.type != "meta":  # otherwise accelerate moves the inputs
            inputs_embeds_BTD = inputs_embeds_BTD.to(embeddings.device)
        # On copies: an interrupted step leaves some layers further than others.
        cache = join_caches([film.memory.cache for film in films])
        model(inputs_embeds=inputs_embeds_BTD, cache_params=cache, use_cache=True, logits_to_keep=1)
        for row, film in enumerate(films):
            own_cache = cache if len(films) == 1 else copy_cache(cache, rows=[row])
            film.memory = Memory(own_cache, film.num_frames, film.memory.clock)


@contextlib.contextmanager
def _bar(films: Sequence[WatchedFilm], streams: Sequence[VideoStream], progress: bool | None):
    """A progress bar in seconds of film; yields a function that updates it."""
    lengths = [None if progress is False else stream.seconds for stream in streams]
    name = streams[0].name if len(streams) == 1 else f"{len(streams)} films"
    bar = progress_bar(name, None if None in lengths else sum(lengths), progress)
    started, tokens_per_frame = time.monotonic(), films[0].model.config.tokens_per_frame
    first_second, first_frame = sum(film.seconds for film in films), sum(film.num_frames for film in films)
    shown = 0

    def show():
        nonlocal shown
        seconds = int(sum(film.seconds for film in films) - first_second)
        if seconds > shown:
            tokens = (sum(film.num_frames for film in films) - first_frame) * tokens_per_frame
            speed = tokens / max(time.monotonic() - started, 1e-6)
            bar.set_postfix_str(f"{tokens:,} tokens, {speed:,.0f} tokens/s", refresh=False)
            bar.update(seconds - shown)
            shown = seconds

    with bar:
        yield show
