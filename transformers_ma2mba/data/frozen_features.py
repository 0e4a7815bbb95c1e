"""The features of a frozen vision tower, kept once for each film."""

import hashlib
import json
import math
import os
import uuid
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils.logging import tqdm

from ..modeling_ma2mba import Ma2mbaModel
from ..processing_ma2mba import Ma2mbaProcessor
from ..video import Clip, EncodedFrames, FrameFolder, VideoReadError, iter_frames
from .broken_samples import BrokenSamples, sample_name
from .conversations import conversation_to_messages, files_in
from .vision_fingerprint import VisionFingerprint

# A part of each film's key. A change of the features, or of their files, must change it.
_FORMAT = 1
_NOT_PREPARED = (
    "A worker process of a DataLoader cannot encode films on a GPU, and a copy of FrozenVisionFeatures cannot encode "
    "them at all: call `prepare` for all films before training, or set dataloader_num_workers=0."
)


class FrozenVisionFeatures:
    """Encodes each film with the frozen vision tower once, and keeps the features for later epochs and runs.

    A film is read a few frames at a time and each different picture is encoded once, so that neither memory nor time
    depends on how long a picture stays on screen. Features belong to a file's path, size and time of modification, the
    clip, the frame rate, the vision tower's weights and the way frames are prepared; if any of these changes, they are
    not used.
    The vision tower runs in evaluation mode and in its own data type, without autocast. Copies by pickle or deepcopy,
    as in worker processes that are not forked, know the kept features only.

    Give it to [`DataCollatorForVideoQA`] as `vision_features`. Calling it with a path, and perhaps the seconds
    at which a clip starts and ends, returns [`EncodedFrames`].

    Args:
        model ([`Ma2mbaForVideoQA`]): its vision tower must be frozen.
        processor ([`Ma2mbaProcessor`]): prepares the frames.
        folder (`str`, *optional*): keeps features there as safetensors, for all processes and later runs; it may be
            deleted at any time. Without it they stay in this process's memory.

    Raises:
        ValueError: if `model` is not a Video-Ma²mba.
        NotADirectoryError: if `folder` is a file.
    """

    def __init__(self, model, processor: Ma2mbaProcessor, folder: str | os.PathLike | None = None):
        self.model = next((module for module in model.modules() if isinstance(module, Ma2mbaModel)), None)
        if self.model is None:
            raise ValueError(f"model must be a Ma2mbaForVideoQA, or a wrapper of one; got {type(model).__name__}.")
        self.processor, self.folder = processor, None if folder is None else Path(folder)
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is a file: give a folder that keeps the features.")
        self._kept: dict[Clip, tuple[str, EncodedFrames]] = {}
        self._fingerprint = VisionFingerprint(self.model, processor)

    def __getstate__(self) -> dict:
        return {**vars(self), "model": None}

    def prepare(
        self,
        rows: Iterable[dict | str | os.PathLike],
        folder: str | os.PathLike = "",
        broken_samples: BrokenSamples | None = None,
    ):
        """Encode the films that are not kept yet; leave out URLs.

        With a folder, each of several processes encodes a part of the films, and they wait for each other. Call this
        before a DataLoader starts worker processes: they cannot use a vision tower on a GPU, and would each keep
        features in a memory of their own.

        Args:
            rows: rows as for [`conversation_to_messages`], whose videos are encoded, or the paths of videos.
            folder: the folder of relative paths in rows.
            broken_samples: leaves out rows that are malformed, and files that cannot be read, and remembers them.

        Raises:
            RuntimeError: if another process fails; for a failure of this process see `__call__`.
        """
        rank, world_size, group = 0, 1, None
        if self.folder is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
            # The default group gives up after minutes. One process may have hours of film left when another is done.
            group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))
        users, failures, error = {}, {}, None
        try:
            users = _users_of_clips(rows, folder, broken_samples)
            self._vision_fingerprint()  # workers need it even where there is no film to encode
            clips = sorted(users, key=lambda clip: (os.fspath(clip.source), clip.start or 0, clip.end or math.inf))
            for clip in tqdm(clips[rank::world_size], desc="Encoding films", delay=2, disable=rank > 0):
                if reason := self._reason_against(clip, users[clip], broken_samples):
                    failures[clip] = reason
        except Exception as exception:  # the other processes must hear of it, as they wait for this one
            error = exception
        if group is not None:
            results = [None] * world_size
            problem = None if error is None else f"Process {rank} could not encode its films: {error}"
            torch.distributed.all_gather_object(results, (problem, failures), group=group)
            torch.distributed.destroy_process_group(group)
            if error is None and any(problem for problem, _ in results):
                error = RuntimeError(next(problem for problem, _ in results if problem))
            failures = {clip: reason for _, others in results for clip, reason in others.items()}
        if error is not None:
            raise error
        for clip, reason in failures.items():
            for name, files in users[clip]:
                broken_samples.add(name, reason, files)

    def _reason_against(self, clip: Clip, users: list, broken_samples: BrokenSamples | None) -> str | None:
        """Encode a clip; return the reason if it cannot be read, or none of its rows could be read before."""
        if broken_samples is not None:
            reasons = [broken_samples.reason(name, files) for name, files in users]
            if all(reasons):
                return reasons[0]
        try:
            self(clip.source, clip.start, clip.end)
        except (FileNotFoundError, VideoReadError) as error:
            if broken_samples is None:
                raise
            return str(error)

    def __call__(self, path: str | os.PathLike, start: float | None = None, end: float | None = None) -> EncodedFrames:
        """Return the features of a film, or of the clip from `start` to `end` seconds.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if it cannot be read, or the vision tower is trained, sharded, offloaded or has adapters.
            RuntimeError: if it is not kept yet, and this process cannot encode it.
            OSError: if its features cannot be written to the folder.
        """
        source = path if isinstance(path, FrameFolder) else os.fspath(path)
        clip = Clip(source, None if not start else float(start), None if end is None else float(end))
        key = self._key(clip)
        if key is None:
            return self._encode(clip)
        kept = self._load(clip, key)
        if kept is None:
            kept = self._encode(clip)
            if self._key(clip) == key:  # otherwise the file changed while it was read
                self._keep(clip, key, kept)
        return kept

    def _key(self, clip: Clip) -> str | None:
        """All that the features of a film depend on; None for a URL, which does not tell whether it has changed."""
        fingerprint = self._vision_fingerprint()
        if _is_url(clip.source):
            warnings.warn("The features of URLs are not kept: download the films.", stacklevel=2)
            return None
        try:
            stat = os.stat(clip.source)
            frames = _states_of_frames(clip.source) if isinstance(clip.source, FrameFolder) else None
        except FileNotFoundError as error:
            raise FileNotFoundError(f"There is no file {os.fspath(clip.source)}: check its path.") from error
        except (OSError, ValueError) as error:
            raise VideoReadError(
                f"{os.fspath(clip.source)} could not be opened ({error}): check its path, and access to it."
            ) from error
        entries = {"path": os.path.realpath(clip.source), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        entries["format"] = _FORMAT
        entries |= {"frame_rate": float(self.processor.video_processor.fps), "vision": fingerprint}
        if frames is not None:
            entries |= {"frames": frames, "frames_per_second": float(clip.source.fps)}
        if not clip.is_whole:
            entries["clip"] = [clip.start, clip.end]
        return json.dumps(entries, sort_keys=True)

    def _vision_fingerprint(self) -> str:
        """A hash of the vision tower and of the way frames are prepared."""
        if not self._is_reader():
            return self._fingerprint.update()
        if not self._fingerprint.value:
            raise RuntimeError(_NOT_PREPARED)
        return self._fingerprint.value

    def _is_reader(self) -> bool:
        """Whether this process has no vision tower that it can use."""
        if self.model is None:
            return True
        return torch.utils.data.get_worker_info() is not None and self.model.vision_tower.device.type != "cpu"

    def _file(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def _load(self, clip: Clip, key: str) -> EncodedFrames | None:
        if self.folder is None:
            kept_key, kept = self._kept.get(_in_real_path(clip), (None, None))
            return kept if kept_key == key else None
        try:
            with safe_open(self._file(key), framework="pt") as file:
                if (file.metadata() or {}).get("key") == key:
                    return EncodedFrames(file.get_tensor("features"), file.get_tensor("picture_indices"))
        except (OSError, SafetensorError):
            pass  # not there, not readable, or damaged
        return None

    def _keep(self, clip: Clip, key: str, kept: EncodedFrames):
        if self.folder is None:
            self._kept[_in_real_path(clip)] = (key, kept)
            return
        partial = self.folder / f"{uuid.uuid4().hex}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.touch()
            mode = partial.stat().st_mode
            save_file({"features": kept.features, "picture_indices": kept.picture_indices}, partial, {"key": key})
            partial.chmod(mode)  # safetensors writes files that only their owner may read
            os.replace(partial, self._file(key))
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"The features of {os.fspath(clip.source)} could not be written to {self.folder} ({error}): make room "
                "there, check access to it, or choose another folder."
            ) from error
        finally:
            with suppress(OSError):  # it is there only if writing was interrupted
                partial.unlink()

    @torch.no_grad()
    def _encode(self, clip: Clip) -> EncodedFrames:
        if self._is_reader():
            raise RuntimeError(f"The features of {os.fspath(clip.source)} are not kept. {_NOT_PREPARED}")
        fit, piece = self.processor.video_processor.frame_fitter(), self.model.config.frames_per_vision_pass
        seen, indices, waiting, features, shown = {}, [], [], [], None
        frames = iter_frames(
            clip.source,
            self.processor.video_processor.fps,
            transform=lambda frame: fit(torch.from_numpy(frame).permute(2, 0, 1)).numpy(),
            start=clip.start,
            end=clip.end,
        )
        for _, frame in frames:
            if frame is not shown:  # the reader gives a frame that stays on screen as the same array
                shown, picture = frame, hashlib.blake2b(frame, digest_size=16).digest()
                if picture not in seen:
                    seen[picture] = len(seen)
                    waiting.append(torch.from_numpy(frame))
            indices.append(seen[picture])
            if len(waiting) == piece:
                features.append(self._features(waiting))
                waiting = []
        if waiting:
            features.append(self._features(waiting))
        return EncodedFrames(torch.cat(features), torch.tensor(indices))

    def _features(self, frames: list[torch.Tensor]) -> torch.Tensor:
        tower = self.model.vision_tower
        modes = {module: module.training for module in tower.modules()}
        tower.eval()
        try:
            with torch.autocast(tower.device.type, enabled=False):
                pixels = self.processor.video_processor.frame_normalizer()(torch.stack(frames))
                return self.model.get_vision_features(pixels).cpu()
        finally:
            for module, training in modes.items():
                module.training = training


def _users_of_clips(rows, folder, broken_samples: BrokenSamples | None) -> dict[Clip, list[tuple[str, list[str]]]]:
    """The names and files of the rows that each clip is in, without broken rows, URLs and images."""
    users = {}
    for row in rows:
        if not isinstance(row, Mapping):
            name, blocks = os.fspath(row), [{"type": "video", "path": os.fspath(row)}]
        else:
            name = sample_name(row)
            try:
                messages = conversation_to_messages(row, folder)
            except ValueError as error:
                if broken_samples is None:
                    raise
                broken_samples.add(name, error)
                continue
            blocks = files_in(messages)
        files = [block["path"] for block in blocks]
        for block in blocks:
            if block["type"] == "video" and not _is_url(block["path"]):
                clip = Clip(block["path"], block.get("start"), block.get("end"))
                users.setdefault(clip, []).append((name, files))
    return users


def _in_real_path(clip: Clip) -> Clip:
    path = os.path.realpath(clip.source)
    return replace(clip, source=replace(clip.source, path=path) if isinstance(clip.source, FrameFolder) else path)


def _states_of_frames(folder: FrameFolder) -> str:
    """A hash of the names, sizes and times of modification of a folder's files."""
    with os.scandir(folder) as entries:
        states = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries)
    return hashlib.sha256(repr(states).encode("utf-8", "surrogatepass")).hexdigest()


def _is_url(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)
