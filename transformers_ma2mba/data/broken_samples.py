"""Samples that cannot be read: left out, named, and not read again."""

import json
import os
import tempfile
import warnings
import weakref
from collections.abc import Mapping, Sequence
from numbers import Number
from pathlib import Path

_NAMES_IN_SUMMARY = 20


def sample_name(row: dict) -> str:
    """Name a row in messages.

    Args:
        row: a row as for [`conversation_to_messages`], perhaps malformed.

    Returns:
        The row's `id` and `source`, or else its video or image, or else the beginning of its text; with the `start`
        and `end` of its clip, and of several clips unless it has both `id` and `source`.
    """
    if not isinstance(row, Mapping):
        return _shortened(repr(row))
    named = [str(row[key]) for key in ("id", "source") if row.get(key) not in (None, "")]
    times = {key: row[key] for key in ("start", "end") if _is_given(row.get(key))}
    if named:
        name = named[0] if len(named) == 1 else f"{named[0]} ({named[1]})"
        if len(named) == 2:  # the source says enough
            times = {key: value for key, value in times.items() if "," not in _join(value)}
    else:
        name = next((_join(row[key]) for key in ("video", "image") if row.get(key)), _shortened(repr(dict(row))))
    return ", ".join([name, *(f"{key} {_join(value)}" for key, value in times.items())])


def _join(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _is_given(value) -> bool:
    return any(map(_is_given, value)) if isinstance(value, (list, tuple)) else isinstance(value, (str, Number))


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:79]}…"


class BrokenSamples:
    """Samples of a data set that cannot be read, each with its reason.

    A broken sample is read once: later epochs leave it out unseen, as long as its files stay as they are. All
    processes and later runs with the same `file` share this knowledge, and so do the worker processes of a DataLoader.

    Args:
        file: a JSON Lines file to append to, `{"name", "reason", "files"}` in each line. Once it is deleted, later
            runs try all samples again. Without `file`, a temporary file serves this process and its workers.
        strict: raise an error at the first broken sample.

    Raises:
        IsADirectoryError: if `file` is a folder.
    """

    def __init__(self, file: str | os.PathLike | None = None, strict: bool = False):
        if file is None:
            descriptor, name = tempfile.mkstemp(prefix="broken_samples_", suffix=".jsonl")
            os.close(descriptor)
            weakref.finalize(self, _remove, name, os.getpid())
        else:
            name = os.path.abspath(file)  # worker processes may change their folder
            if os.path.isdir(name):
                raise IsADirectoryError(f"{name} is a folder: give a file that keeps the broken samples.")
        self.file, self.strict = Path(name), strict
        self._is_temporary = file is None
        self._known: dict[tuple, tuple[list, str]] = {}  # (name, paths) to (states of the files, reason)
        self._num_bytes_read = 0

    def add(self, name: str, error: Exception | str, files: Sequence[str | os.PathLike] = ()):
        """Remember that a sample is broken.

        Args:
            name: the sample's name, as from [`sample_name`].
            error: the reason.
            files: the paths of its files. If one of them changes, the sample is no longer known to be broken.

        Raises:
            ValueError: with `strict`; the message names the sample and the reason.
            OSError: if the reason cannot be written to the file.

        Warns:
            UserWarning: once for each sample.
        """
        reason = " ".join(str(error).split()) or type(error).__name__
        if self.strict:
            raise ValueError(f"Sample {name} cannot be read: {reason}") from (
                error if isinstance(error, Exception) else None
            )
        if self.reason(name, files) is not None:
            return
        paths = _paths(files)
        states = list(map(_state, paths))
        self._known[name, paths] = states, reason
        self._append({"name": name, "reason": reason, "files": dict(zip(paths, states, strict=True))})
        warnings.warn(f"Sample {name} is left out: {reason}", UserWarning, stacklevel=2)

    def reason(self, name: str, files: Sequence[str | os.PathLike] = ()) -> str | None:
        """Return the reason why a sample is broken; None if it is not known to be, or one of its files has changed."""
        self._read_on()
        paths = _paths(files)
        if (name, paths) not in self._known:
            return None
        states, reason = self._known[name, paths]
        return reason if states == list(map(_state, paths)) else None

    def __len__(self) -> int:
        """The number of samples that are known to be broken, also those of other processes and earlier runs."""
        return len(self.reasons())

    def __bool__(self) -> bool:
        return True  # an empty collection of broken samples is not a missing one

    def summary(self) -> str:
        """A text for the end of training: the number of broken samples, their names and reasons."""
        reasons = self.reasons()
        if not reasons:
            return "No sample was left out."
        lines = [f"{len(reasons)} broken sample{' was' if len(reasons) == 1 else 's were'} left out:"]
        lines += [f"  {name}: {reason}" for name, reason in reasons[:_NAMES_IN_SUMMARY]]
        if len(reasons) > _NAMES_IN_SUMMARY:
            lines.append(f"  and {len(reasons) - _NAMES_IN_SUMMARY} more")
        if not self._is_temporary:
            lines.append(f"{self.file} has all of them; delete it to try them again.")
        return "\n".join(lines)

    def reasons(self) -> list[tuple[str, str]]:
        """The name of each broken sample, and the reason why it cannot be read."""
        self._read_on()
        return [
            (name, reason)
            for (name, paths), (states, reason) in self._known.items()
            if states == list(map(_state, paths))
        ]

    def _append(self, entry: dict):
        """Append a line by a single write, so that lines of other processes stay whole."""
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if os.lseek(descriptor, 0, os.SEEK_END) > 0:
                os.lseek(descriptor, -1, os.SEEK_END)
                if os.read(descriptor, 1) != b"\n":
                    line = b"\n" + line  # a process was killed while it wrote the last line
            os.write(descriptor, line)
        finally:
            os.close(descriptor)

    def _read_on(self):
        """Read the lines that have been added since the last call, and ignore unreadable ones."""
        try:
            size = os.stat(self.file).st_size
            if size == self._num_bytes_read:
                return
            if size < self._num_bytes_read:  # another file
                self._num_bytes_read = 0
            with open(self.file, "rb") as file:
                file.seek(self._num_bytes_read)
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            return
        for line in lines:
            if not line.endswith(b"\n"):
                return  # not whole yet
            self._num_bytes_read += len(line)
            try:
                entry = json.loads(line)
                name, reason, files = str(entry["name"]), str(entry["reason"]), dict(entry["files"])
            except (ValueError, TypeError, KeyError):
                continue
            self._known[name, tuple(files)] = list(files.values()), reason


def _paths(files: Sequence[str | os.PathLike]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(path if "://" in path else os.path.abspath(path) for path in map(os.fspath, files)))


def _state(path: str) -> list[int] | None:
    """The size and time of modification of a file; None if there is no file, or it is a URL."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _remove(name: str, process_id: int):
    """Delete a temporary file, unless this is a forked copy of the process that made it."""
    if os.getpid() == process_id:
        Path(name).unlink(missing_ok=True)
