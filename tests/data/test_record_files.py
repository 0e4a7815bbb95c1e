"""Files of records: every form, encoding, compression and damage."""

import gzip
import json
import math

import pyarrow
import pyarrow.parquet
import pytest

from transformers_ma2mba.data import record_files
from transformers_ma2mba.data.record_files import read_records

RECORDS = [
    {"id": 0, "text": 'a "quoted" [bracket]'},
    {"id": 1, "text": "ünï ✓ \u2028"},
    {"id": 2, "deep": {"a": [1, 2]}},
]


def as_json(records):
    return json.dumps(records, ensure_ascii=False).encode()


def as_lines(records, end="\n"):
    return end.join(json.dumps(record, ensure_ascii=False) for record in records).encode()


FORMS = {
    "list": ("a.json", as_json(RECORDS)),
    "indented": ("a.json", json.dumps(RECORDS, indent=2).encode()),
    "lines": ("a.jsonl", as_lines(RECORDS)),
    "lines-named-json": ("a.json", as_lines(RECORDS) + b"\n"),
    "crlf": ("a.jsonl", as_lines(RECORDS, "\r\n")),
    "crlf-list": ("a.json", json.dumps(RECORDS, indent=1).replace("\n", "\r\n").encode()),
    "byte-order-mark": ("a.json", b"\xef\xbb\xbf" + as_json(RECORDS)),
    "byte-order-mark-lines": ("a.jsonl", b"\xef\xbb\xbf" + as_lines(RECORDS)),
    "gzip": ("a.json.gz", gzip.compress(as_json(RECORDS))),
    "gzip-lines": ("a.jsonl.gz", gzip.compress(as_lines(RECORDS))),
    "space-before": ("a.json", b"\n \n" + as_json(RECORDS) + b"\n"),
}


@pytest.mark.parametrize("name, content", FORMS.values(), ids=FORMS)
def test_every_form_has_the_same_records(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert [record for _, record in read_records(tmp_path / name)] == RECORDS


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
@pytest.mark.parametrize("form", ["list", "indented", "byte-order-mark", "gzip"])
def test_a_list_in_small_chunks(form, chunk, tmp_path, monkeypatch):
    """A chunk may end within a character, a word, a number or a record."""
    monkeypatch.setattr(record_files, "_CHUNK", chunk)
    name, content = FORMS[form]
    (tmp_path / name).write_bytes(content)
    assert list(read_records(tmp_path / name)) == [(i + 1, record) for i, record in enumerate(RECORDS)]


def test_wherever_a_chunk_ends(tmp_path, monkeypatch):
    record = {"a": [-1.5e-7, 12e30, True, None, '\U0001f600 \\ " \n'], "b": {"c": "✓"}}
    (tmp_path / "a.json").write_text(json.dumps([record, record]) + json.dumps(record, ensure_ascii=False))
    for chunk in range(1, 120):
        monkeypatch.setattr(record_files, "_CHUNK", chunk)
        assert list(read_records(tmp_path / "a.json")) == [(1, record), (2, record)]


def test_numbers_and_words_at_the_end_of_a_chunk(tmp_path, monkeypatch):
    values = [12345, True, None, -1.5e-7, "text", [1, [2]], {}]
    (tmp_path / "a.json").write_text(json.dumps(values))
    for chunk in range(1, 9):
        monkeypatch.setattr(record_files, "_CHUNK", chunk)
        assert [value for _, value in read_records(tmp_path / "a.json")] == values


def test_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS[:2] * 1500), tmp_path / "a.parquet")
    records = list(read_records(tmp_path / "a.parquet"))
    assert [number for number, _ in records] == list(range(1, 3001))
    assert [record for _, record in records[-2:]] == RECORDS[:2]


def test_blank_lines_count_as_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + as_lines(RECORDS, "\n\n"))
    assert list(read_records(tmp_path / "a.jsonl")) == [(2 * i + 2, record) for i, record in enumerate(RECORDS)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_numbers_that_json_does_not_have_are_missing(name, tmp_path):
    text = '{"a": NaN, "b": [Infinity, -Infinity], "c": 1}'
    (tmp_path / name).write_text(f"[{text}]" if name == "a.json" else text)
    assert list(read_records(tmp_path / name)) == [(1, {"a": None, "b": [None, None], "c": 1})]


@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_of_objects_is_a_list_of_them(indent, tmp_path):
    content = {"a": {"x": [1]}, "b": {"y": [2]}}
    (tmp_path / "a.json").write_text(json.dumps(content, indent=indent))
    assert list(read_records(tmp_path / "a.json")) == [(1, {"a": {"x": [1]}}), (2, {"b": {"y": [2]}})]
    (tmp_path / "a.json").write_text(json.dumps(RECORDS[2] | {"b": 1}, indent=indent))
    assert list(read_records(tmp_path / "a.json")) == [(1, RECORDS[2] | {"b": 1})]


def described(records) -> list:
    """The records, with the messages of errors."""
    return [(number, str(record) if isinstance(record, ValueError) else record) for number, record in records]


@pytest.mark.parametrize("chunk", [3, 2**20])
@pytest.mark.parametrize(
    "bad",
    ['{"a": 1,, "b": {"c": [1]}}', '{"a": "he said "hi, you" to {me}"}', "{'a': 1}", '{"a": 1 "b": 2}', '{"a": "\n"}'],
    ids=["commas", "quotes", "python", "no-comma", "line-break"],
)
def test_one_bad_record_of_a_list(bad, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "_CHUNK", chunk)
    (tmp_path / "a.json").write_text(f'[{{"a": 0}}, {bad}, {{"a": 2}}]')
    first, (row, error), last = read_records(tmp_path / "a.json")
    assert (first, row, last) == ((1, {"a": 0}), 2, (3, {"a": 2}))
    assert isinstance(error, ValueError) and str(error).startswith("This is not JSON: ")


def test_one_bad_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 0}\n{"a": \xff}\n{"a": \n{"a": 3}\n{"a":')
    rows = described(read_records(tmp_path / "a.jsonl"))
    assert [row for row, _ in rows] == [1, 2, 3, 4, 5]
    assert rows[0][1] == {"a": 0} and rows[3][1] == {"a": 3}
    assert rows[1][1].startswith("This is not JSON: 'utf-8' codec can't decode byte 0xff")
    assert rows[2][1] == "This is not JSON: Expecting value: line 1 column 6 (char 5)."
    assert rows[4][1].endswith("; the file ends here, and may be cut off.")


CUT = b'[{"a": 10}, {"b": "t\\u00e9xt"}, {"c": [null, -1.5e-7]}]'


@pytest.mark.parametrize("length", range(1, 1 + len(CUT)))
def test_a_list_that_is_cut_off(length, tmp_path):
    """Wherever a list is cut, the whole records before it are read, and the last row says that it is cut."""
    content = CUT
    (tmp_path / "a.json").write_bytes(content[:length])
    *records, last = described(read_records(tmp_path / "a.json"))
    whole, ends = json.loads(content), [i + 1 for i, character in enumerate(content) if character == ord("}")]
    if length == len(content):
        assert [*records, last] == list(enumerate(whole, 1))
    else:
        assert records == list(enumerate(whole, 1))[: sum(length >= end for end in ends)]
        assert last[0] == len(records) + 1 and last[1].startswith("The file is cut off ")


def test_damaged_compression(tmp_path):
    content = gzip.compress(as_lines([{"a": i, "b": "x" * (i % 7)} for i in range(50_000)]))
    (tmp_path / "a.jsonl.gz").write_bytes(content[: len(content) // 2])
    *records, (row, error) = read_records(tmp_path / "a.jsonl.gz")
    assert row == len(records) + 1 > 1000 and str(error).startswith("The file is damaged or cut off here: ")
    content = gzip.compress(as_json([{"a": i} for i in range(50_000)]))
    (tmp_path / "a.json.gz").write_bytes(content[: len(content) // 2])
    *records, (row, error) = read_records(tmp_path / "a.json.gz")
    assert row == len(records) + 1 > 1000 and str(error).startswith("The file is cut off within this record: ")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "a.json is no JSON list, JSON Lines or Parquet: it is empty"),
        (b" \n", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it begins with 'version https://git-lfs"),
        ("[]".encode("utf-16"), "it begins with"),
        (b"id,video\n1,a.mp4\n", "it begins with 'id,video'"),
        (b'{"a": {\n"b": ', r"a.json is not JSON: Expecting value"),
        (b"PAR1 and nothing more", "a.json cannot be read as Parquet"),
        (b"\x1f\x8bnothing", "a.json cannot be read: "),
    ],
    ids=["empty", "blank", "git-lfs", "utf-16", "csv", "object", "parquet", "gzip"],
)
def test_files_of_no_known_form(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_records(tmp_path / "a.json"))


def test_a_large_list_is_never_in_memory(tmp_path):
    """Only the window is: a few chunks, whatever the file's size."""
    import tracemalloc

    with open(tmp_path / "a.json", "w") as file:
        file.write("[" + ",\n".join(json.dumps({"id": i, "text": "x" * 1000}) for i in range(20_000)) + "]")
    tracemalloc.start()
    count = sum(1 for _ in read_records(tmp_path / "a.json"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 8 * 2**20 < (tmp_path / "a.json").stat().st_size


def test_missing_values_of_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"a": [1.0, None], "b": [math.nan, 2.0]}), tmp_path / "a.parquet")
    (_, first), (_, second) = read_records(tmp_path / "a.parquet")
    assert math.isnan(first["b"]) and second["a"] is None
