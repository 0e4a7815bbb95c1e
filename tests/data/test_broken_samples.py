"""Broken samples: named, counted, remembered by all processes and later runs, and tried again if a file changes."""

import json
import multiprocessing
import os
import pickle
import warnings

import pytest

from transformers_ma2mba import BrokenSamples, sample_name


@pytest.fixture
def list_file(tmp_path):
    return tmp_path / "run" / "broken.jsonl"


@pytest.fixture
def film(tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(b"no film")
    return path


def test_a_broken_sample_is_known_until_its_file_changes(list_file, film):
    broken = BrokenSamples(list_file)
    assert broken.reason("row 7", [film]) is None and len(broken) == 0
    with pytest.warns(UserWarning, match="Sample row 7 is left out: it is no film") as caught:
        broken.add("row 7", ValueError("it is\nno film"), [film])
        broken.add("row 7", "anything", [str(film)])
    assert len(caught) == 1
    for known in (broken, BrokenSamples(list_file)):
        assert known.reason("row 7", [film]) == "it is no film"
        assert known.reason("row 7") is None  # another row with the same name
        assert known.reason("row 8", [film]) is None
        assert len(known) == 1
    os.utime(film, ns=(1, 1))
    for known in (broken, BrokenSamples(list_file)):
        assert known.reason("row 7", [film]) is None
        assert len(known) == 0 and known.summary() == "No sample was left out."
    with pytest.warns(UserWarning, match="row 7"):
        broken.add("row 7", "still no film", [film])
    assert BrokenSamples(list_file).reason("row 7", [film]) == "still no film"


def test_a_missing_file_is_tried_again_once_it_is_there(list_file, tmp_path):
    broken, late = BrokenSamples(list_file), tmp_path / "late.mp4"
    with pytest.warns(UserWarning):
        broken.add("row 1", FileNotFoundError("There is no file."), [late])
    assert BrokenSamples(list_file).reason("row 1", [late])
    late.write_bytes(b"film")
    assert BrokenSamples(list_file).reason("row 1", [late]) is None


def test_strict_raises(list_file):
    error = KeyError("pixels")
    with pytest.raises(ValueError, match="^Sample row 7 cannot be read: 'pixels'$") as caught:
        BrokenSamples(list_file, strict=True).add("row 7", error)
    assert caught.value.__cause__ is error
    assert not list_file.exists()


def test_a_line_that_was_cut_off_costs_only_itself(list_file):
    broken = BrokenSamples(list_file)
    with pytest.warns(UserWarning):
        broken.add("first", "broken")
    with open(list_file, "ab") as file:
        file.write(b'{"name": "second", "rea')
    later = BrokenSamples(list_file)
    assert len(later) == 1
    with pytest.warns(UserWarning):
        later.add("third", "broken")
    with open(list_file, "ab") as file:
        file.write(b'[1]\n{"name": "fourth"}\n\xff\n{"name": ["a"], "reason": 1, "files": {}}\n')
    for known in (broken, later, BrokenSamples(list_file)):
        assert known.reason("first") and known.reason("third") and not known.reason("second")
        assert len(known) == 3


def test_other_alphabets_and_undecodable_paths(list_file, tmp_path):
    path = tmp_path / os.fsdecode("фильм ".encode() + b"\xff.mp4")
    with pytest.warns(UserWarning):
        BrokenSamples(list_file).add("ряд", "плохо", [path])
    assert BrokenSamples(list_file).reason("ряд", [path]) == "плохо"
    assert "плохо" in list_file.read_text(errors="replace")


def add_many(path, start):
    broken = BrokenSamples(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(start, start + 200):
            broken.add(f"row {number}", "x" * 500)


def test_processes_share_the_file(list_file):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=add_many, args=(list_file, start)) for start in (0, 100, 200)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    broken = BrokenSamples(list_file)
    assert {name for name in map("row {}".format, range(400)) if broken.reason(name)} == {
        f"row {number}" for number in range(400)
    }
    assert all(json.loads(line) for line in list_file.read_text().splitlines())


@pytest.mark.parametrize("copy", ["fork", "pickle"])
def test_worker_processes_report_without_a_file(copy):
    broken = BrokenSamples()
    other = pickle.loads(pickle.dumps(broken)) if copy == "pickle" else broken
    process = multiprocessing.get_context("fork").Process(target=other.add, args=("row 7", "broken"))
    process.start()
    process.join()
    assert broken.reason("row 7") == "broken" and len(broken) == 1
    path = broken.file
    assert "row 7: broken" in broken.summary() and str(path) not in broken.summary()
    del broken, other, process
    assert not path.exists()


def test_the_file_may_be_deleted(list_file):
    broken = BrokenSamples(list_file)
    with pytest.warns(UserWarning):
        broken.add("row 7", "broken")
    list_file.unlink()
    assert broken.reason("row 7")
    with pytest.warns(UserWarning):
        broken.add("row 8", "broken")
    assert BrokenSamples(list_file).reason("row 8")


def test_summary(list_file):
    broken = BrokenSamples(list_file)
    with pytest.warns(UserWarning):
        broken.add("row 0", "no film")
    assert broken.summary() == (
        f"1 broken sample was left out:\n  row 0: no film\n{list_file} has all of them; delete it to try them again."
    )
    with pytest.warns(UserWarning):
        for number in range(1, 30):
            broken.add(f"row {number}", "no film")
    lines = broken.summary().splitlines()
    assert lines[0] == "30 broken samples were left out:" and lines[-2] == "  and 10 more"
    assert len(lines) == 23


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder: give a file"):
        BrokenSamples(tmp_path)


@pytest.mark.parametrize(
    "row, name",
    [
        ({"id": 7, "video": "a.mp4"}, "7"),
        ({"id": 0, "source": "train.json, row 0"}, "0 (train.json, row 0)"),
        ({"id": None, "source": "train.json, row 12", "video": "a.mp4"}, "train.json, row 12"),
        ({"video": "a.mp4", "start": None, "end": None}, "a.mp4"),
        ({"video": "a.mp4", "start": 10, "end": 12.5}, "a.mp4, start 10, end 12.5"),
        ({"id": "x", "video": ["a.mp4", "a.mp4"], "start": [0, 5], "end": [None, None]}, "x, start 0, 5"),
        ({"id": "x", "source": "a.json, row 1", "video": ["a.mp4"] * 2, "start": [0, 5]}, "x (a.json, row 1)"),
        ({"image": "b.png"}, "b.png"),
        ({"text": "Who?"}, "{'text': 'Who?'}"),
        ("film.mp4", "'film.mp4'"),
        (None, "None"),
    ],
)
def test_names_of_rows(row, name):
    assert sample_name(row) == name
    assert len(sample_name({"conversations": ["word " * 100]})) == 80
