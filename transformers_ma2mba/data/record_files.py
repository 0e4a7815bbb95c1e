"""Files of records: JSON lists, JSON Lines and Parquet, read one record at a time."""

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from io import BufferedIOBase

_CHUNK = 2**20
_DECODER = json.JSONDecoder(parse_constant=lambda name: None)  # NaN and Infinity, which JSON does not have
# A syntax error this close to the end of the text may come from the missing rest of a word such as -Infinity.
_LONGEST_WORD = 16
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)
# Errors of a file that is cut off or damaged.
_READ_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)


def read_records(path: str | os.PathLike) -> Iterator[tuple[int, object]]:
    """Yield the records of a file as (row, record), or (row, ValueError) for a record that cannot be read.

    The form is recognised by the content: a JSON list, JSON Lines, one JSON object (each of its items is a record if
    all their values are objects), or Parquet; text also compressed by gzip. Rows count from 1; in JSON Lines a row is
    a line. Text is UTF-8, with or without a byte order mark; in a list, other bytes become lone surrogates. NaN and
    Infinity become None.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it has none of these forms.
    """
    path = os.fspath(path)
    with open(path, "rb") as raw:
        magic = raw.read(4)
        if magic == b"PAR1":
            yield from _parquet_rows(path)
            return
        raw.seek(0)
        file = gzip.open(raw) if magic[:2] == b"\x1f\x8b" else raw
        try:
            start = file.read(1000).removeprefix(codecs.BOM_UTF8).lstrip()
            file.seek(0)
            is_lines = start.startswith(b"{") and (".jsonl" in os.path.basename(path) or _has_lines_of_json(file))
        except _READ_ERRORS as error:
            raise ValueError(f"{path} cannot be read: {error}.") from error
        file.seek(0)
        if start.startswith(b"["):
            yield from _list_elements(file)
        elif is_lines:
            yield from _lines(file)
        elif start.startswith(b"{"):
            yield from _object_items(file, path)
        else:
            raise ValueError(
                f"{path} is no JSON list, JSON Lines or Parquet: it "
                + (f"begins with {start.splitlines()[0][:40].decode(errors='replace')!r}." if start else "is empty.")
            )


def _has_lines_of_json(file: BufferedIOBase) -> bool:
    """Whether there are several lines, and the first of them is JSON."""
    lines = (line for line in file if line.removeprefix(codecs.BOM_UTF8).strip())
    first = next(lines)
    return next(lines, None) is not None and _is_json(first.removeprefix(codecs.BOM_UTF8))


def _is_json(line: bytes) -> bool:
    try:
        _DECODER.decode(line.decode())
    except ValueError:
        return False
    return True


def _lines(file: BufferedIOBase) -> Iterator[tuple[int, object]]:
    row = 0
    try:
        for row, line in enumerate(file, 1):
            text = line.removeprefix(codecs.BOM_UTF8).strip() if row == 1 else line.strip()
            if not text:
                continue
            try:
                record = _DECODER.decode(text.decode())
            except ValueError as error:
                end = "" if line.endswith(b"\n") else "; the file ends here, and may be cut off"
                record = ValueError(f"This is not JSON: {error}{end}.")
            yield row, record
    except _READ_ERRORS as error:
        yield row + 1, ValueError(f"The file is damaged or cut off here: {error}.")


def _object_items(file: BufferedIOBase, path: str) -> Iterator[tuple[int, object]]:
    try:
        content = _DECODER.decode(file.read().decode("utf-8-sig"))
    except (ValueError, *_READ_ERRORS) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if all(isinstance(value, dict) for value in content.values()):
        yield from enumerate(({key: value} for key, value in content.items()), 1)
    else:
        yield 1, content


def _parquet_rows(path: str) -> Iterator[tuple[int, object]]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for record in batch.to_pylist():
                row += 1
                yield row, record
    except (pyarrow.ArrowException, OSError) as error:
        if row == 0:
            raise ValueError(f"{path} cannot be read as Parquet, and may be cut off: {error}") from error
        yield row + 1, ValueError(f"The file is damaged or cut off here: {error}")


class _Text:
    """A window onto the text of a file, from the next character to be parsed."""

    def __init__(self, file: BufferedIOBase):
        # Bytes that are not UTF-8 become surrogates, which make only their own record malformed.
        self._file, self._decode = file, codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self.text, self.position, self.at_end, self.damage = "", 0, False, ""

    def extend(self) -> bool:
        """Double the window, or read a chunk; False at the end of the file."""
        if self.at_end:
            return False
        size, data = max(_CHUNK, len(self.text) - self.position), b""
        try:
            while len(data) < size and (piece := self._file.read1(size - len(data))):
                data += piece
        except _READ_ERRORS as error:
            self.damage = f": {error}"
        self.at_end = not data
        self.text, self.position = self.text[self.position :] + self._decode(data, final=not data), 0
        return True

    def next_character(self, skipped: str) -> str:
        """Skip characters and return the next one, "" at the end of the file."""
        while True:
            while self.position < len(self.text):
                if self.text[self.position] not in skipped:
                    return self.text[self.position]
                self.position += 1
            if not self.extend():
                return ""

    def value(self):
        """Parse a JSON value; leave the window at its begin if that fails."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                may_go_on = error.pos + _LONGEST_WORD > len(self.text) or error.msg.startswith("Unterminated string")
                if not (may_go_on and self.extend()):
                    raise
                continue
            # At the end of the window a number may go on.
            is_whole = (
                isinstance(value, (dict, list, str))
                or self.text[end : end + 1].strip(" \t\r\n,]") != self.text[end : end + 1]
            )
            if is_whole or not self.extend():
                self.position = end
                return value

    def skip_value(self) -> bool:
        """Go behind a value that is not JSON, by its brackets; False if it does not end."""
        while True:
            depth = 0
            for match in _STRING_OR_BRACKET.finditer(self.text, self.position):
                depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(match[0], 0)
                if depth <= 0 and match[0] in "}]":
                    self.position = match.end()
                    return True
            if not self.extend():
                return False


def _list_elements(file: BufferedIOBase) -> Iterator[tuple[int, object]]:
    window, row = _Text(file), 0
    window.next_character(" \t\r\n")
    window.position += 1  # the bracket
    while (character := window.next_character(" \t\r\n,")) != "]":
        row += 1
        if not character:
            yield row, ValueError(f"The file is cut off before the end of its list{window.damage}.")
            return
        try:
            record = window.value()
        except json.JSONDecodeError as error:
            if not window.skip_value():
                reason = window.damage or f", or is not JSON: {error.msg}"
                yield row, ValueError(f"The file is cut off within this record{reason}.")
                return
            record = ValueError(f"This is not JSON: {error.msg}.")
        yield row, record
