"""Lists in any form as data sets of the `datasets` library."""

import gzip
import json
import multiprocessing
import os
import subprocess
import sys

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from dataset_records import DATA_SETS, turns
from PIL import Image
from torch.utils.data import DataLoader
from video_files import index_frame, index_video_bytes

from transformers_ma2mba import BrokenSamples, DataCollatorForVideoQA, load_rows, read_video
from transformers_ma2mba.data import lists


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    path = tmp_path_factory.mktemp("datasets") / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(path))
    datasets.disable_progress_bars()
    return path


@pytest.fixture(scope="module")
def film() -> bytes:
    """Two seconds of frames 0 to 7."""
    return index_video_bytes(8, fps=4, preset="ultrafast")


def write_media(folder, names, film):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".jpg", ".png")):
            Image.fromarray(np.zeros((40, 24, 3), np.uint8)).save(folder / name)
        else:
            (folder / name).write_bytes(film)


def write_list(path, rows):
    path.write_text(json.dumps(rows))
    return path


def question(number, video="a.mp4", answer="red", **more) -> dict:
    return {"id": number, "video": video, "conversations": turns(f"<video>\nq{number}", answer), **more}


def texts(row) -> list[str]:
    return [turn["value"] for turn in row["conversations"]]


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_data_set_as_it_is(name, tmp_path, film, processor):
    data = DATA_SETS[name]
    write_media(tmp_path, data.media, film)
    rows = load_rows(data.write(tmp_path), data.folder and tmp_path / data.folder)
    assert len(rows) == len(data.rows)
    for row, expected in zip(rows, data.rows, strict=True):
        files = row["video"] or row["image"]
        assert len(files) == len(expected.files)
        assert all(map(str.endswith, files, expected.files)) and all(map(os.path.isfile, files))
        system = [expected.system] if expected.system else []
        assert texts(row) == system + expected.turns
        assert [turn["from"] for turn in row["conversations"]] == (
            ["system"] * len(system) + ["human", "gpt"] * (len(expected.turns) // 2)
        )
        assert (row["id"], row["start"], row["end"]) == (expected.id, expected.start, expected.end)
        assert {key: row[key] for key in expected.more} == expected.more
    batch = DataCollatorForVideoQA(processor)(list(rows))
    assert len(batch["labels"]) == len(rows)


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_data_set_streams_the_same_rows(name, tmp_path):
    data = DATA_SETS[name]
    files = data.write(tmp_path)
    rows = list(load_rows(files, group=False))
    assert list(load_rows(files, group=False, streaming=True)) == rows


# Files


ROWS = [
    question(0),
    question(1, ["a.mp4", "b.mp4"], start=[0, 1], end=[None, 2.5]),
    {"image": "c.png", "conversations": turns("<image>\nWho?", 3)},
    {"id": "text", "conversations": turns("Why?", "ünï ✓"), "duration": 12},
    question(2, "b.mp4", "no", start="00:00:01", end=2),
]


def as_parquet(rows) -> pyarrow.Table:
    """The rows with one type in each column, and None where a row lacks a field."""
    keys = dict.fromkeys(key for row in rows for key in row)
    table = {key: [row.get(key) for row in rows] for key in keys}
    for key in ("video", "image", "start", "end"):
        table[key] = [value if value is None or isinstance(value, list) else [value] for value in table[key]]
    table["start"][4] = [1.0]
    table["id"] = [None if value is None else str(value) for value in table["id"]]
    table["conversations"] = [turns(*map(str, texts(row))) for row in rows]
    return pyarrow.table(table)


@pytest.fixture
def in_all_forms(tmp_path):
    """The same rows as a JSON list, JSON Lines and Parquet, each alone in a folder next to `a.mp4`."""
    files = {}
    for form in ("json", "jsonl", "parquet", "json.gz", "jsonl.gz"):
        (tmp_path / form).mkdir()
        files[form] = tmp_path / form / f"train.{form}"
    files["json"].write_text(json.dumps(ROWS))
    files["jsonl"].write_text("\n".join(map(json.dumps, ROWS)))
    pyarrow.parquet.write_table(as_parquet(ROWS), files["parquet"])
    files["json.gz"].write_bytes(gzip.compress(files["json"].read_bytes()))
    files["jsonl.gz"].write_bytes(gzip.compress(files["jsonl"].read_bytes()))
    return files


def without_place(rows) -> list[dict]:
    """Rows without their folders and the suffix of their list."""
    base = ("video", "image")
    rows = [
        {**row, **{key: row[key] and [os.path.basename(path) for path in row[key]] for key in base}} for row in rows
    ]
    return [{**row, "source": row["source"].partition(", ")[2]} for row in rows]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "json.gz", "jsonl.gz"])
@pytest.mark.parametrize("options", [{}, {"streaming": True}, {"group": False}, {"interleave": True}], ids=str)
def test_all_forms_have_equal_rows(form, options, in_all_forms):
    expected = load_rows(in_all_forms["json"], **options)
    rows = load_rows(in_all_forms[form], **options)
    assert rows.features == expected.features
    assert without_place(rows) == without_place(expected)
    first = next(iter(expected))
    assert first.keys() == set(expected.column_names)
    assert first["source"] == "train.json, row 1"


def test_mixed_types_become_one(in_all_forms):
    rows = load_rows(in_all_forms["json"], group=False)
    assert [row["video"] and len(row["video"]) for row in rows] == [1, 2, None, None, 1]
    assert [(row["start"], row["end"]) for row in rows][1] == ([0.0, 1.0], [None, 2.5])
    assert (rows[4]["start"], rows[4]["end"], rows[4]["id"]) == ([1.0], [2.0], "2")
    assert [texts(row)[1] for row in rows] == ["red", "red", "3", "ünï ✓", "no"]
    assert (rows[3]["duration"], rows[3]["video"], rows[3]["image"]) == (12.0, None, None)


def test_a_folder_a_pattern_and_several_files(tmp_path):
    for i, name in enumerate(
        ["b/two.json", "a/one.jsonl", "c.json", ".hidden/three.json", "b/notes.txt", "d.parquet"]
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_list(tmp_path / name, [question(i, None)])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([question("5")]), tmp_path / "d.parquet")

    both = ["b/two.json, row 1", "c.json, row 1"]

    def sources(files):
        return [row["source"] for row in load_rows(files)]

    assert sources(tmp_path) == [f"{name}, row 1" for name in ("a/one.jsonl", "b/two.json", "c.json", "d.parquet")]
    assert sources(str(tmp_path / "*" / "*.json")) == ["two.json, row 1"]
    assert sources(str(tmp_path / "**" / "*.json")) == both
    assert sources([tmp_path / "c.json", tmp_path / "b", tmp_path / "c.json"]) == [
        "c.json, row 1",
        "b/two.json, row 1",
    ]
    assert list(load_rows(tmp_path, streaming=True)) == list(load_rows(tmp_path))


def test_a_name_with_brackets_is_no_pattern(tmp_path):
    assert len(load_rows(write_list(tmp_path / "list [1].json", [question(0)]))) == 1


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "train.json has no rows"),
        ("not a list", "train.json is no JSON list, JSON Lines or Parquet: it begins with 'not a list'"),
        (
            '[{"path": "a"}, {"path": "b"}]',
            "train.json, row 1: The fields path are .* No record of the file can be read",
        ),
        ('[{"answer": 1, "question_id": "a"}]', "has answers only: give the file of their questions"),
        (json.dumps([{"path": "a"}] * 150 + [question(1)]), "train.json, row 1: The fields path .* No record"),
    ],
    ids=["empty", "text", "unknown", "answers", "hopeless"],
)
def test_lists_without_rows(content, message, tmp_path):
    (tmp_path / "train.json").write_text(content)
    for broken in (None, BrokenSamples()):
        with pytest.raises(ValueError, match=message):
            load_rows(tmp_path / "train.json", broken=broken)


def test_files_that_do_not_exist(tmp_path):
    for name in ("nowhere.json", "*.json"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load_rows(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"has no list \(.json, .jsonl or .parquet\)"):
        load_rows(tmp_path)
    with pytest.raises(ValueError, match="Give at least one list"):
        load_rows([])


# Malformed records

BAD = (
    f'[{{"id": 0, "conversations": 5}}, {json.dumps(question(1, None))}, {{"id": 2,, "x": 1}}, '
    f'{json.dumps(question(3, None))}, {{"video": "a.mp4", "conv'
)
REASONS = {
    "train.json, row 1": "`conversations` must be a list",
    "train.json, row 3": "This is not JSON: ",
    "train.json, row 5": "The file is cut off within this record",
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.filterwarnings("ignore:Sample train.json")
def test_malformed_records_are_left_out_and_named(streaming, tmp_path):
    (tmp_path / "train.json").write_text(BAD)
    for _ in range(2):  # also when the rows are in the cache
        broken = BrokenSamples()
        rows = load_rows(tmp_path / "train.json", streaming=streaming, broken=broken)
        assert [row["source"] for row in rows] == ["train.json, row 2", "train.json, row 4"]
        assert len(broken) == 3
        for source, reason in REASONS.items():
            assert reason in broken.reason(source, [tmp_path / "train.json"])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("broken", [None, BrokenSamples(strict=True)], ids=["none", "strict"])
@pytest.mark.filterwarnings("ignore:Sample train.json")
def test_malformed_records_are_errors(streaming, broken, tmp_path):
    (tmp_path / "train.json").write_text(BAD)
    for _ in range(2):
        with pytest.raises(ValueError, match="train.json, row 1.*`conversations` must be a list"):
            list(load_rows(tmp_path / "train.json", streaming=streaming, broken=broken))
    load_rows(tmp_path / "train.json", broken=BrokenSamples())
    with pytest.raises(ValueError, match="train.json, row 1.*`conversations` must be a list"):
        load_rows(tmp_path / "train.json", broken=broken)


def test_a_malformed_answer_is_named(tmp_path):
    write_list(tmp_path / "q.json", [{"question": "Who?", "video_name": "a", "question_id": "v_a_1"}])
    write_list(tmp_path / "a.json", [{"answer": "red", "question_id": "v_a_1"}, {"answer": "blue"}])
    with pytest.raises(ValueError, match="a.json, row 2: This is no answer to a question"):
        load_rows(tmp_path)


# The cache


def test_the_cache_follows_the_lists(tmp_path, monkeypatch):
    path = write_list(tmp_path / "train.json", [question(0, None)])
    load_rows(path)
    with monkeypatch.context() as context:
        context.setattr(lists, "_rows", None)
        assert [row["id"] for row in load_rows(path)] == ["0"]  # not read again
    write_list(path, [question(1, None)])
    os.utime(path, ns=(0, 0))
    assert [row["id"] for row in load_rows(path)] == ["1"]
    write_list(path, [question(2, None)])
    os.utime(path, ns=(1, 1))  # of the same size
    assert [row["id"] for row in load_rows(path)] == ["2"]


def test_a_video_that_comes_later_is_found(tmp_path):
    path = write_list(tmp_path / "train.json", [question(0, "v_a"), question(1, "v_b"), question(2, "v_c.mp4")])
    assert [row["video"] for row in load_rows(path)] == [[str(tmp_path / name)] for name in ("v_a", "v_b", "v_c.mp4")]
    (tmp_path / "v_a.mkv").touch()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "v_c.mp4").touch()
    names = ("v_a.mkv", "v_b", "videos/v_c.mp4")
    for _ in range(2):
        assert [row["video"] for row in load_rows(path)] == [[str(tmp_path / name)] for name in names]
    (tmp_path / "v_b.mp4").touch()
    names = ("v_a.mkv", "v_b.mp4", "videos/v_c.mp4")
    assert [row["video"] for row in load_rows(path)] == [[str(tmp_path / name)] for name in names]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, cache):
    cache.write_text("a file where the folder should be")
    path = write_list(tmp_path / "train.json", [question(0), question(1)])
    for streaming in (False, True):
        rows = load_rows(path, streaming=streaming)
        assert [texts(row) for row in rows] == [["<video>\nq0", "red", "q1", "red"]]
    assert cache.read_text() == "a file where the folder should be"


def test_two_processes_build_one_cache(tmp_path, cache):
    path = write_list(tmp_path / "train.json", [question(i, f"{i % 100}.mp4") for i in range(3000)])
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        lengths = pool.map(count_rows, [path] * 2, chunksize=1)
    assert lengths == [100, 100]
    assert len(list(cache.rglob("*.arrow"))) == 1


def count_rows(path):
    return len(load_rows(path))


def test_relative_paths_do_not_depend_on_the_current_folder(tmp_path, monkeypatch):
    write_list(tmp_path / "train.json", [question(0)])
    monkeypatch.chdir(tmp_path)
    here = list(load_rows("train.json", "videos"))
    assert here[0]["video"] == [str(tmp_path / "videos" / "a.mp4")]
    monkeypatch.chdir("/")
    assert list(load_rows(tmp_path / "train.json", tmp_path / "videos")) == here


# Use


def test_the_library_is_optional():
    code = """
import sys
import transformers_ma2mba
print("datasets" in sys.modules, "pyarrow" in sys.modules)
sys.modules["datasets"] = None
try:
    transformers_ma2mba.load_rows("train.json")
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    imported, message = result.stdout.splitlines()
    assert imported == "False False"
    assert message.startswith("load_rows needs the library `datasets`: pip install ")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_loader_reads_streamed_lists(num_workers, tmp_path, film, processor):
    write_media(tmp_path, ["a.mp4", "b.mp4"], film)
    for name in "ab":
        write_list(tmp_path / f"{name}.json", [question(i, f"{name}.mp4", end=1) for i in range(3)])
    rows = load_rows(tmp_path, streaming=True, broken=BrokenSamples())
    loader = DataLoader(rows, batch_size=1, collate_fn=DataCollatorForVideoQA(processor), num_workers=num_workers)
    batches = list(loader)
    assert [len(batch["pixel_values_videos"]) for batch in batches] == [1, 1]  # one second each
    assert [int((batch["labels"] != -100).sum()) for batch in batches] == [3 * 2] * 2


def test_interleaved_segments_go_through_the_collator(tmp_path, film, processor):
    """Each second of the film stands before its caption."""
    write_media(tmp_path, ["a.mp4"], film)
    path = write_list(tmp_path / "train.json", [question(i, start=i, end=i + 1, answer=f"c{i}") for i in (1, 0)])
    batch = DataCollatorForVideoQA(processor)(list(load_rows(path, interleave=True)))
    by_hand = processor.apply_chat_template(
        [
            message
            for i in range(2)
            for message in (
                {"role": "user", "content": [{"type": "video", "video": frames_of(film, i)}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"c{i}"}]},
            )
        ],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert torch.equal(batch["input_ids"], by_hand["input_ids"])
    assert torch.equal(batch["pixel_values_videos"], by_hand["pixel_values_videos"])


def frames_of(film: bytes, second: int):
    frames, _ = read_video(film)
    return frames[second : second + 1]


def test_a_folder_of_frames_is_a_film(tmp_path, processor):
    """MVBench has one with three frames per second."""
    folder = tmp_path / "tvqa" / "friends_s01"
    folder.mkdir(parents=True)
    for i in range(12):
        Image.fromarray(index_frame(i)).save(folder / f"{i:05d}.jpg", quality=95)
    record = {"video": "friends_s01", "question": "Who?", "candidates": ["I", "you"], "answer": "I", "fps": 3}
    path = write_list(tmp_path / "episodic_reasoning.json", [record, {**record, "start": 1, "end": 3}])
    whole, clip = load_rows(path)
    assert (whole["video"], whole["fps"]) == ([str(folder)], 3.0)
    collator = DataCollatorForVideoQA(processor)
    for row, shown in ((whole, [0, 3, 6, 9]), (clip, [3, 6])):
        frames = [np.asarray(Image.open(folder / f"{i:05d}.jpg")) for i in shown]
        expected = processor.video_processor([np.stack(frames)])["pixel_values_videos"]
        pixels = collator([row])["pixel_values_videos"]
        assert pixels.shape == expected.shape
        assert (pixels.int() - expected.int()).abs().max() <= 8  # two decoders of JPEG
    with pytest.raises(ValueError, match="is a directory: give the path of one video file, or `fps`"):
        collator([{**whole, "fps": None}])


def test_an_empty_list_is_left_out_of_a_stream(tmp_path):
    """The Trainer repeats a stream, and a stream without a row ended training before its first step."""
    write_list(tmp_path / "empty.json", [])
    with pytest.raises(ValueError, match="empty.json has no rows"):
        load_rows(tmp_path / "empty.json", streaming=True)
    write_list(tmp_path / "full.json", [question(1)])
    rows = load_rows(tmp_path, streaming=True)
    assert rows.num_shards == 1 and [row["id"] for row in rows] == ["1"]


def test_lists_in_linked_folders_are_found(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").mkdir()
    write_list(tmp_path / "disk/ä list.json", [question(1)])
    (tmp_path / "data/linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/twice").symlink_to(tmp_path / "disk")
    write_list(tmp_path / "data/list.json", [question(2)])
    assert [row["id"] for row in load_rows(tmp_path / "data", group=False)] == ["1", "2"]


def test_an_empty_answer_is_not_trained_on(tmp_path):
    broken = BrokenSamples()
    write_list(tmp_path / "list.json", [question(1), question(2, "b.mp4", answer=" ")])
    with pytest.warns(UserWarning, match="list.json, row 2.*empty answer"):
        assert [row["id"] for row in load_rows(tmp_path / "list.json", broken=broken)] == ["1"]
