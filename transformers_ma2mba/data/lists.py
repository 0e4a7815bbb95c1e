"""Lists of training data as data sets of the `datasets` library."""

import glob
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache

from .broken_samples import BrokenSamples
from .formats import is_answer_record, rows_of
from .grouping import merge_adjacent, merge_all
from .media_files import MediaFiles, without_loops
from .record_files import read_records

# A part of each cached list's name. A change of the rows that a list gives must change it.
_FORMAT = 2
_SUFFIXES = tuple(suffix + gz for suffix in (".json", ".jsonl", ".ndjson", ".parquet") for gz in ("", ".gz"))
# A file whose first records are all malformed is no list of training data.
_HOPELESS = 100

Problems = Callable[[str, Exception, str], None]


def load_rows(
    files: str | os.PathLike | Iterable[str | os.PathLike],
    folder: str | os.PathLike | None = None,
    streaming: bool = False,
    group: bool = True,
    interleave: bool = False,
    broken: BrokenSamples | None = None,
):
    """Load lists of training data in any form that [`rows_of`] knows.

    The rows are kept in the cache of the `datasets` library, and are read from the lists again only if one of the
    lists has another size or time of modification, or if a video that was missing is there. Rows that go into groups
    pass through the temporary folder (`TMPDIR`), which must have room for them.

    Args:
        files: a JSON list, JSON Lines or Parquet, text also compressed by gzip; a folder, for every list below it; a
            pattern such as "data/*.json"; or several of these. ActivityNet-QA needs its questions and its answers.
        folder: where the names of videos and images start. Without it they start at the list's folder, or else its
            parent. Names without an extension or a folder are completed, see [`MediaFiles`].
        streaming: read the lists while the rows are used. A worker process of a DataLoader reads whole lists.
        group: join questions about one video, or one clip of it, to one row of several turns, in the order of the
            lists. A question that comes again with the same answer is left out. `id` is that of the first.
        interleave: join the segments of one video, which are rows with `start` or `end`, to one row in which each
            segment stands before its caption, in the order of time. Segments that overlap stay as they are, and the
            questions of the segments are left out.
        broken: gets the records that are malformed, named as in "train.json, row 12". Without it they are errors.

    With `streaming`, only adjacent rows of one list are joined.

    Returns:
        A `datasets.Dataset`, or a `datasets.IterableDataset` with `streaming`, of rows as from [`rows_of`], with
        `source`: the list and the row. Rows count from 1.

    Raises:
        ImportError: if the `datasets` library is missing.
        FileNotFoundError: if there is no such file, or no list in a folder.
        ValueError: if a list has none of the forms, no row, or no record that can be read; or if a record is
            malformed and `broken` is None or strict.
    """
    library = _library()
    folder = None if folder is None else os.path.abspath(folder)
    lists, answers, empty = [], [], set()
    for path in _expand(files):
        number, record = next(read_records(path), (0, None))
        (answers if is_answer_record(record) else lists).append(path)
        empty |= {path} if number == 0 else set()
    if not lists:
        raise ValueError(f"{answers[0]} has answers only: give the file of their questions, too.")
    arguments = {
        "lists": tuple(zip(lists, _names(lists), strict=True)),
        "answer_files": tuple(zip(answers, _names(answers), strict=True)),
        "folder": folder,
        "group": group,
        "interleave": interleave,
    }
    if streaming:
        if empty.issuperset(lists):
            raise ValueError(f"{', '.join(_names(lists))} has no rows.")
        # The library gives the elements of a list, unlike those of a tuple, to different processes.
        filled = [entry for entry in arguments["lists"] if entry[0] not in empty]
        arguments |= {"lists": filled, "broken": broken}
        return _read(library, _stream, arguments, "streamed", streaming=True)
    return _load(library, arguments, broken)


def _library():
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "load_rows needs the library `datasets`: pip install datasets, or transformers_ma2mba[train]."
        ) from error
    return datasets


def _expand(files) -> list[str]:
    """The absolute paths of all lists, those of a folder or a pattern in alphabetical order."""
    paths = []
    for path in [files] if isinstance(files, (str, os.PathLike)) else files:
        path = os.path.abspath(path)
        if os.path.isdir(path):
            found = _lists_below(path)
        else:
            found = [path] if os.path.exists(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if not found:
            what = "has no list (.json, .jsonl or .parquet)" if os.path.isdir(path) else "does not exist"
            raise FileNotFoundError(f"{path} {what}.")
        paths += found
    if not paths:
        raise ValueError("Give at least one list.")
    return list(dict.fromkeys(paths))


def _lists_below(folder: str) -> list[str]:
    paths, seen = [], {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = without_loops(parent, sorted(name for name in folders if not name.startswith(".")), seen)
        paths += [os.path.join(parent, name) for name in names if name.endswith(_SUFFIXES) and name[0] != "."]
    return sorted(paths)


def _names(paths: list[str]) -> list[str]:
    """The names of files in messages: without the folder that they have in common."""
    if not paths:
        return []
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, common) for path in paths]


def _load(library, arguments: dict, broken: BrokenSamples | None):
    """Build or reuse the cached rows. Their last row is a footer, which keeps what else was found in the lists."""
    paths = [path for part in ("lists", "answer_files") for path, _ in arguments[part]]
    states = [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, paths)]
    found_since = []
    while True:
        name = library.fingerprint.Hasher.hash([_FORMAT, arguments, states, found_since])
        rows = _read(library, _rows_and_footer, arguments, name)
        footer = json.loads(rows[-1]["footer"])
        media = _MediaOf(arguments["folder"])
        found = [
            [list_folder, names]
            for list_folder, names, kind in footer["unfound"]
            if os.path.exists(media[list_folder].find(*names, kind=kind))
        ]
        if not found:
            break
        found_since.append(found)
    for source, message, path in footer["problems"]:
        _report(broken, source, ValueError(message), path)
    return rows.select(range(len(rows) - 1)).remove_columns("footer")


def _read(library, generator, arguments: dict, name: str, streaming: bool = False):
    """Run a generator of rows as a data set of the library, with `name` for its place in the cache."""
    from datasets.io.generator import GeneratorDatasetInputStream

    try:
        return GeneratorDatasetInputStream(
            generator,
            features=_features(library, footer=not streaming),
            cache_dir=_cache_folder(library.config.HF_DATASETS_CACHE),
            streaming=streaming,
            gen_kwargs=arguments,
            fingerprint=name,
        ).read()
    except library.exceptions.DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def _features(library, footer: bool):
    text, seconds = library.Value("string"), library.Value("float64")
    columns = {
        "id": text,
        "video": [text],
        "image": [text],
        "start": [seconds],
        "end": [seconds],
        "fps": seconds,
        "duration": seconds,
        "conversations": [{"from": text, "value": text}],
        "candidates": [text],
        "answer": text,
        "source": text,
    }
    return library.Features({**columns, "footer": text} if footer else columns)


@cache
def _cache_folder(folder: str) -> str:
    """The cache of the library, or a temporary folder for this process if it cannot be written to."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except OSError:
        _temporary.append(tempfile.TemporaryDirectory(prefix="rows_"))
        return _temporary[-1].name


_temporary = []  # deleted when the process ends


def _rows_and_footer(lists, answer_files, folder, group: bool, interleave: bool) -> Iterator[dict]:
    problems, unfound, row = [], [], None

    def add(source: str, error: Exception, path: str):
        problems.append((source, str(error), path))

    rows = _rows(lists, answer_files, folder, add, unfound)
    for row in merge_all(rows, group, interleave) if group or interleave else rows:
        yield {**row, "footer": None}
    if row is None:
        raise ValueError(f"{', '.join(name for _, name in lists)} has no rows.")
    yield {**dict.fromkeys(row), "footer": json.dumps({"problems": problems, "unfound": unfound})}


def _stream(
    lists, answer_files, folder, group: bool, interleave: bool, broken: BrokenSamples | None
) -> Iterator[dict]:
    def add(source: str, error: Exception, path: str):
        _report(broken, source, error, path)

    rows = _rows(lists, answer_files, folder, add, [])
    return merge_adjacent(rows, group, interleave) if group or interleave else rows


def _report(broken: BrokenSamples | None, source: str, error: Exception, path: str):
    if broken is None:
        raise ValueError(f"{source}: {error}") from error
    broken.add(source, error, [path])


def _rows(lists, answer_files, folder: str | None, add: Problems, unfound: list) -> Iterator[dict]:
    """Yield the rows of all lists."""
    answers = _answers(answer_files, add) if answer_files else None
    media = _MediaOf(folder)
    for path, name in lists:
        yield from _rows_of_list(path, name, media[os.path.dirname(path)], answers, add)
    unfound += [
        (list_folder, names, kind) for list_folder, files in media.items() for names, kind in files.unfound.items()
    ]


class _MediaOf(dict):
    """The media files of the lists of each folder."""

    def __init__(self, folder: str | None):
        self.folder = folder

    def __missing__(self, list_folder: str) -> MediaFiles:
        self[list_folder] = MediaFiles(self.folder, list_folder)
        return self[list_folder]


def _rows_of_list(path: str, name: str, media: MediaFiles, answers: Mapping | None, add: Problems) -> Iterator[dict]:
    num_good, problems = 0, []
    for number, record in read_records(path):
        source = f"{name}, row {number}"
        try:
            if isinstance(record, ValueError):
                raise record
            rows = rows_of(record, media.find, answers)
        except ValueError as error:
            if num_good:
                add(source, error, path)
                continue
            problems.append((source, error, path))
            if len(problems) == _HOPELESS:
                break
            continue
        if not num_good:
            for problem in problems:
                add(*problem)
        num_good += 1
        for row in rows:
            yield {**row, "source": source}
    if problems and not num_good:
        source, error, _ = problems[0]
        raise ValueError(f"{source}: {error} No record of the file can be read.") from error


def _answers(answer_files, add: Problems) -> dict[str, object]:
    answers = {}
    for path, name in answer_files:
        for number, record in read_records(path):
            if is_answer_record(record):
                answers[str(record["question_id"])] = record["answer"]
            else:
                error = record if isinstance(record, ValueError) else ValueError("This is no answer to a question.")
                add(f"{name}, row {number}", error, path)
    return answers
