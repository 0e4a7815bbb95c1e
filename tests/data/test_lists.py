"""Lists in any form as data sets of the `datasets` library."""

import gzip
import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from dataset_records import DATA_SETS, turns
from PIL import Image
from video_files import index_video_bytes

from transformers_ma2mba import BrokenSamples, DataCollatorForVideoQA, load_rows
from transformers_ma2mba.data import lists


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    return tmp_path / "cache"


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
