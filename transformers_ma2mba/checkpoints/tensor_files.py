"""Weight files, read and written one tensor at a time: safetensors, PyTorch pickles, and shards of both.

A model of any size passes through the memory of its largest tensor, because names, shapes and dtypes are read before
any data, and a shard is written as its tensors arrive.
"""

import errno
import json
import math
import mmap
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

# The codes of https://github.com/huggingface/safetensors, by dtype.
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_LONGEST_HEADER = 100 * 2**20  # of safetensors, too
_MAPPED_BYTES = 2**25  # of a mapped file, before its pages are given back

# In the order of Transformers: a model that is saved over shards may leave their index behind.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class _WeightFile:
    """A file of weights that must stay as it is while its tensors are read."""

    def __init__(self, path: Path):
        self.path = path
        self.info: dict[str, TensorInfo] = {}
        self._stamp = self._current_stamp()

    def _current_stamp(self) -> tuple[int, ...]:
        status = self.path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns

    def check_unchanged(self):
        """Raise a ValueError if the file was changed or replaced, since its tensors would be those of two files."""
        if self._current_stamp() != self._stamp:
            raise ValueError(f"{self.path} was changed or replaced while it was read: run the command again.")


class _SafetensorsFile(_WeightFile):
    """The tensors of a safetensors file, read by position."""

    def __init__(self, path: Path):
        super().__init__(path)
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(
                    f"{path} is truncated or no safetensors file: its header does not fit its {size} bytes."
                )
            header = file.read(length)
        try:
            entries = json.loads(header)
            entries.pop("__metadata__", None)
            self.starts = {name: 8 + length + self._add(name, **entry) for name, entry in entries.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} has a header that cannot be read: {error}.") from error
        end = max((self.starts[name] + info.num_bytes for name, info in self.info.items()), default=0)
        if size < end:
            raise ValueError(f"{path} is truncated: it has {size} bytes of {end}. Download or copy it again.")

    def _add(self, name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> int:
        """Add a tensor of the header, and return the place of its data."""
        if dtype not in _DTYPES:
            raise ValueError(f"{name} has the dtype {dtype!r}, which is not supported")
        self.info[name] = TensorInfo(tuple(shape), _DTYPES[dtype])
        start, end = data_offsets
        if start < 0 or end - start != self.info[name].num_bytes:
            raise ValueError(f"the data of {name} at {data_offsets} does not have the shape {shape} in {dtype}")
        return start

    def read(self, name: str) -> torch.Tensor:
        info = self.info[name]
        data = torch.empty(info.num_bytes, dtype=torch.uint8)
        if info.num_bytes:
            with open(self.path, "rb") as file:
                file.seek(self.starts[name])
                if file.readinto(data.numpy()) != info.num_bytes:
                    raise ValueError(f"{self.path} became shorter while {name} was read.")
        return data.view(info.dtype).reshape(info.shape)


class _PickleFile(_WeightFile):
    """The tensors of a file that `torch.save` wrote, mapped into memory and never executed."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.is_mapped = True
        self.bytes_read = 0
        self.tensors = self._open()
        self.info = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}

    def _open(self) -> dict[str, torch.Tensor]:
        try:
            try:
                loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                # A file of before PyTorch 1.6 cannot be mapped.
                self.is_mapped = False
                loaded = torch.load(self.path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{self.path} is damaged or holds more than tensors, which could run code: it was not read."
            ) from error
        except (RuntimeError, EOFError, OSError) as error:
            raise ValueError(
                f"{self.path} is truncated or damaged: {(str(error) or repr(error)).splitlines()[0]}"
            ) from error
        if not isinstance(loaded, Mapping) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()
        ):
            raise ValueError(f"{self.path} is no dictionary of tensors, as a model's weights are.")
        return dict(loaded)

    def read(self, name: str) -> torch.Tensor:
        num_bytes = self.info[name].num_bytes
        if self.is_mapped and self.bytes_read and self.bytes_read + num_bytes > _MAPPED_BYTES:
            self.tensors, self.bytes_read = None, 0  # unmaps the file, whose pages count as this process's memory
            self.tensors = self._open()
        self.bytes_read += num_bytes
        return self.tensors[name].detach().clone(memory_format=torch.contiguous_format)


class TensorFolder(Mapping):
    """The weights in a folder as a mapping from names to tensors, each of which is read when it is asked for.

    Args:
        folder: a folder with one of `files`.
        files: names of weight files or of indices of shards, the preferred one first.

    Raises:
        ValueError: if there is no such file, a shard is missing, or a file is damaged; the message names the file.
    """

    def __init__(self, folder: str | os.PathLike, files: tuple[str, ...] = WEIGHT_FILES):
        self.folder = Path(folder)
        name = next((name for name in files if (self.folder / name).is_file()), None)
        if name is None:
            raise ValueError(f"There are no weights in {str(folder)!r}: expected {' or '.join(files)}.")
        self._files = self._shards(name) if name.endswith(".json") else self._single(name)

    def _single(self, name: str) -> dict:
        file = _open(self.folder / name)
        return dict.fromkeys(file.info, file)

    def _shards(self, index: str) -> dict:
        path = self.folder / index
        try:
            weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
            outside = [name for name in names if not _stays_inside(name)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no index of shards: it has no readable weight_map.") from error
        if outside:
            raise ValueError(f"{path} names files outside of its folder, which are not read: {', '.join(outside)}.")
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{path} names shards that are missing: {', '.join(missing)}. Download or copy them, too."
            )
        shards = {name: _open(self.folder / name) for name in names}
        absent = [f"{name} ({file})" for name, file in weight_map.items() if name not in shards[file].info]
        if absent:
            raise ValueError(f"{path} names tensors that their shards lack: {', '.join(absent)}.")
        return {name: shards[file] for name, file in weight_map.items()}

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a tensor."""
        return self._files[name].info[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self._files[name]
        file.check_unchanged()  # before reading too, because the pages of a shortened file kill the process
        tensor = file.read(name)
        file.check_unchanged()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files  # without reading the tensor


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a model under the model's own names.

    Args:
        tensors: the weights as they are stored.
        stored_names: for each parameter of the model, its name in the file.
    """

    tensors: TensorFolder
    stored_names: dict[str, str]

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a parameter."""
        return self.tensors.info(self.stored_names[name])

    def read(self, name: str) -> torch.Tensor:
        """Read a parameter."""
        return self.tensors[self.stored_names[name]]


def _open(path: Path) -> _SafetensorsFile | _PickleFile:
    return (_SafetensorsFile if path.suffix == ".safetensors" else _PickleFile)(path)


def _stays_inside(name: str) -> bool:
    """Return whether a path in an index stays in the folder. Links are followed: the Hub's cache consists of them."""
    path = PurePosixPath(name.replace("\\", "/"))
    return not path.is_absolute() and ".." not in path.parts and ":" not in name and path.name != ""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: its shape and dtype now, its data later.

    Args:
        info: shape and dtype in the file.
        read: return the tensor, of this shape and any dtype.
    """

    info: TensorInfo
    read: Callable[[], torch.Tensor]

    def bytes(self, name: str) -> memoryview:
        """Read the tensor and return its data as it is stored."""
        tensor = self.read()
        if tuple(tensor.shape) != self.info.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {self.info.shape}.")
        stored = tensor.detach().to("cpu", self.info.dtype).contiguous()
        if stored.dtype != tensor.dtype and stored.isinf().sum() > tensor.isinf().sum():
            raise ValueError(f"{name} has values beyond the range of {self.info.dtype}: choose another dtype.")
        return memoryview(stored.reshape(-1).view(torch.uint8).numpy())


def write_safetensors(folder: Path, tensors: dict[str, PlannedTensor], max_shard_size: int = 5 * 10**9) -> None:
    """Write `model.safetensors`, or shards of it with their index, one tensor after the other.

    Args:
        folder: an existing folder.
        tensors: the tensors by name. Each is read once, when it is written.
        max_shard_size: size limit of a file in bytes; a larger tensor gets a file of its own.
    """
    shards: list[dict[str, PlannedTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.info.num_bytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.info.num_bytes
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", tensors)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    metadata = {
        "total_parameters": sum(math.prod(tensor.info.shape) for tensor in tensors.values()),
        "total_size": sum(tensor.info.num_bytes for tensor in tensors.values()),
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, tensors: dict[str, PlannedTensor]) -> None:
    # Wide elements come first, so that each tensor is aligned to its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].info.dtype.itemsize, name))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        info = tensors[name].info
        offsets = [end, end + info.num_bytes]
        header[name] = {"dtype": _CODES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        end = offsets[1]
    words = json.dumps(header, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)
    with open(path, "wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        for name in order:
            file.write(tensors[name].bytes(name))


def write_pickle(path: Path, tensors: dict[str, PlannedTensor], ties: Mapping[str, str] | None = None) -> None:
    """Write a dictionary of tensors as `torch.save` does, within the memory of the largest tensor.

    The tensors pass through a temporary file beside `path`, because a pickle is written in one go.

    Args:
        path: the file to write.
        tensors: the tensors by name.
        ties: more names, each with the name of the tensor whose storage it shares.
    """
    with tempfile.TemporaryFile(dir=path.parent) as file:
        starts = {}
        for name, tensor in tensors.items():
            file.write(b"\0" * (-file.tell() % 64))
            starts[name] = file.tell()
            file.write(tensor.bytes(name))
        file.write(b"\0")  # an empty file cannot be mapped
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        state = {name: _view(mapped, starts[name], tensor.info) for name, tensor in tensors.items()}
        state |= {name: state[target] for name, target in (ties or {}).items()}
        with open(path, "wb") as target:
            torch.save(state, _UnmappingFile(target, mapped))


def _view(mapped: mmap.mmap, start: int, info: TensorInfo) -> torch.Tensor:
    if not info.num_bytes:
        return torch.empty(info.shape, dtype=info.dtype)
    return torch.frombuffer(mapped, dtype=info.dtype, count=math.prod(info.shape), offset=start).reshape(info.shape)


class _UnmappingFile:
    """A file to write to that gives back the pages of the mapped file it is written from."""

    def __init__(self, file, mapped: mmap.mmap):
        self.file, self.mapped, self.written = file, mapped, 0

    def write(self, data) -> int:
        self.written += len(data)
        if self.written > _MAPPED_BYTES and hasattr(self.mapped, "madvise"):
            self.mapped.madvise(mmap.MADV_DONTNEED)
            self.written = 0
        return self.file.write(data)

    def flush(self):
        self.file.flush()


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary folder beside `path`, and rename it to `path` if all goes well; otherwise remove it.

    A link leads to the folder that it names.

    Raises:
        ValueError: if `path` exists already and is no empty folder, or a file system is mounted there.
    """
    target = Path(os.path.realpath(path))
    if os.path.ismount(target):
        raise ValueError(f"{str(path)!r} is a mounted file system: name a new folder inside it for the output.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{str(path)!r} exists already: name a new or an empty folder for the output.")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        folder = temporary / target.name  # with the usual permissions, which a temporary folder does not have
        folder.mkdir()
        yield folder
        if target.exists():
            target.rmdir()
        folder.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and error.filename is None:
            error.filename = str(target.parent)  # a write names no file
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_tensors(
    where: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], advice: str
) -> None:
    """Check that stored tensors have the names and shapes of a model's.

    Args:
        where: the folder, for the message.
        expected: the model's shapes by name.
        found: the stored shapes by the same names.
        advice: a sentence that says what to do.

    Raises:
        ValueError: if names or shapes differ; the message lists all of them.
    """
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    problems += [f"left over: {name} {list(shape)}" for name, shape in found.items() if name not in expected]
    problems += [
        f"wrong shape: {name} is {list(found[name])}, the configuration makes it {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if problems:
        raise ValueError("\n  ".join([f"The weights in {where} do not fit their configuration. {advice}", *problems]))
