"""The files that the names in a list stand for."""

import os
from collections import defaultdict
from functools import lru_cache

VIDEO_EXTENSIONS = (
    ".mp4",
    ".mkv",
    ".webm",
    ".avi",
    ".mov",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".ts",
    ".flv",
    ".wmv",
    ".ogv",
    ".gif",
)
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_EXTENSIONS = VIDEO_EXTENSIONS + IMAGE_EXTENSIONS
# The thumbnail of a video that is missing must not take its place.
_EXTENSIONS_OF = {"video": VIDEO_EXTENSIONS, "image": (*IMAGE_EXTENSIONS, ".gif")}
_MOST_UNFOUND = 10_000


class MediaFiles:
    """Finds videos and images by the names that a list gives them.

    A name is tried below each base folder: as it is, with another extension of its kind, video or image, and as a
    folder of frames. Then the first base folder is searched for the one file whose path ends with the name. The base
    folder is `folder`, or else the list's folder and then its parent, where LLaVA-Video-178K has its videos.

    Args:
        folder: where names start; None for the list's folder.
        list_folder: the folder of the list.

    Attributes:
        unfound: the names of files that do not exist, at most 10,000, with the kind of each.
    """

    def __init__(self, folder: str | None, list_folder: str):
        self.bases = (folder,) if folder is not None else (list_folder, os.path.dirname(list_folder))
        self.unfound: dict[tuple[str, ...], str] = {}
        self._search = lru_cache(2**16)(self._search)
        self._names_in = lru_cache(2**10)(self._names_in)
        self._all_paths: dict[str, list[str]] | None = None

    def find(self, *names: str, kind: str = "video") -> str:
        """Return the path of the video or image that has one of these names; that of the first name if there is none.

        Raises:
            ValueError: if several files in different folders have the name.
        """
        for name in names:
            if (path := name if "://" in name else self._search(name, kind)) is not None:
                return path
        if len(self.unfound) < _MOST_UNFOUND:
            self.unfound[names] = kind
        return os.path.join(self.bases[0], names[0])

    def _search(self, name: str, kind: str) -> str | None:
        for base in self.bases:
            path = os.path.join(base, name)
            if os.path.isfile(path):
                return path
            folder, file_name = os.path.split(path)
            if found := self._names_in(folder, kind).get(_stem(file_name)):
                return os.path.join(folder, found)
            if os.path.isdir(path):
                return path
        return None if os.path.isabs(name) else self._search_everywhere(os.path.normpath(name), kind)

    def _names_in(self, folder: str, kind: str) -> dict[str, str]:
        """The files of a folder by their names without extension; of several the one with the first extension."""
        try:
            names = [name for name in os.listdir(folder) if _extension(name) in _EXTENSIONS_OF[kind]]
        except OSError:
            return {}
        return {_stem(name): name for name in sorted(names, key=_preference, reverse=True)}

    def _search_everywhere(self, name: str, kind: str) -> str | None:
        if self._all_paths is None:
            self._all_paths = _paths_by_stem(self.bases[0])
        end = os.sep + _without_extension(name)
        paths = [
            path
            for path in self._all_paths.get(_stem(os.path.basename(name)), ())
            if _without_extension(path).endswith(end) and _extension(path) in ("", *_EXTENSIONS_OF[kind])
        ]
        paths = [path for path in paths if path.endswith(os.sep + name) and _extension(path)] or paths
        paths = [path for path in paths if _extension(path)] or paths
        if len({_without_extension(path) for path in paths}) > 1:
            raise ValueError(f"{name} may be {paths[0]} or {paths[1]}: give the folder where names start.")
        return min(paths, key=_preference, default=None)


def _paths_by_stem(base: str) -> dict[str, list[str]]:
    """The media files and folders below a folder, by their names without extension."""
    paths, seen = defaultdict(list), {os.path.realpath(base)}
    for folder, folders, names in os.walk(base, followlinks=True):
        folders[:] = without_loops(folder, sorted(name for name in folders if not name.startswith(".")), seen)
        for name in [*folders, *sorted(filter(_extension, names))]:
            paths[_stem(name)].append(os.path.join(folder, name))
    return paths


def without_loops(parent: str, folders: list[str], seen: set[str]) -> list[str]:
    """The names of folders below a folder that were not seen before; a link to a folder above would never end."""
    new = []
    for name in folders:
        if (place := os.path.realpath(os.path.join(parent, name))) not in seen:
            seen.add(place)
            new.append(name)
    return new


def _extension(name: str) -> str:
    """The extension of a media file, "" for any other name."""
    extension = os.path.splitext(name)[1].lower()
    return extension if extension in _EXTENSIONS else ""


def _without_extension(path: str) -> str:
    return path[: len(path) - len(_extension(path))]


_stem = _without_extension  # of a name


def _preference(name: str) -> int:
    extension = _extension(name)
    return _EXTENSIONS.index(extension) if extension else len(_EXTENSIONS)
