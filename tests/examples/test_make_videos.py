"""examples/make_videos.py: the seed decides the films, and the answers are right and hard to guess."""

import json
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import av
import make_videos
import numpy as np
import pytest
from make_videos import COLOURS, FPS, QUESTIONS
from tiny import EXAMPLES

from transformers_ma2mba import probe, read_video

SPLITS = {"train": 2, "train_minutes": 2, "train_hours": 2, "validation": 1, "long": 1, "hours": 1}


def write_films(folder, seed):
    options = {f"num_{split}": count for split, count in SPLITS.items()}
    options |= dict(min_seconds=8, max_seconds=10, max_minutes_seconds=30, max_hours_seconds=90, seed=seed)
    command = [sys.executable, str(EXAMPLES / "make_videos.py"), "--output_dir", str(folder)]
    subprocess.run(command + [f"--{name}={value}" for name, value in options.items()], check=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return write_films(tmp_path_factory.mktemp("films"), seed=1)


def rows_of(folder, split) -> list[dict]:
    return json.loads((folder / f"{split}.json").read_text())


def test_same_seed_gives_the_same_films(films, tmp_path):
    again, other = write_films(tmp_path / "again", seed=1), write_films(tmp_path / "other", seed=2)
    for split in SPLITS:
        assert (again / f"{split}.json").read_bytes() == (films / f"{split}.json").read_bytes()
        assert (other / f"{split}.json").read_bytes() != (films / f"{split}.json").read_bytes()
        for row in rows_of(films, split):
            frames, _ = read_video(films / row["video"], FPS)
            assert np.array_equal(read_video(again / row["video"], FPS)[0], frames)
            assert not np.array_equal(read_video(other / row["video"], FPS)[0], frames)


def test_rows_are_in_the_llava_video_format(films):
    for split, count in SPLITS.items():
        rows = rows_of(films, split)
        assert len(rows) == count
        for row in rows:
            assert (films / row["video"]).is_file()
            turns = row["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * len(QUESTIONS)
            assert sorted(row["kinds"]) == sorted(QUESTIONS) and len(QUESTIONS) >= 6
            assert turns[0]["value"].startswith("<video>\n")
            for kind, question, answer in zip(row["kinds"], turns[0::2], turns[1::2], strict=True):
                assert question["value"].removeprefix("<video>\n") == QUESTIONS[kind][0]
                assert answer["value"] in QUESTIONS[kind][1]


def test_films_are_h264_of_the_lengths_asked_for(films):
    durations = {}
    for split in SPLITS:
        infos = [probe(films / row["video"]) for row in rows_of(films, split)]
        assert all(info.codec == "h264" for info in infos)
        durations[split] = [info.duration for info in infos]
    assert all(8 <= duration <= 10 for duration in durations["train"] + durations["validation"])
    assert all(8 <= duration <= 90 for duration in durations["train_hours"])
    assert all(8 <= duration <= 30 for duration in durations["train_minutes"])
    assert durations["long"] == [40] and durations["hours"] == [90]


def test_a_variable_frame_rate_shows_the_same_film_in_fewer_frames(tmp_path):
    film = make_videos.plan_film(
        300, {kind: choices[-1] for kind, (_, choices) in QUESTIONS.items()}, random.Random(3)
    )
    shown = {}
    for variable_rate in (False, True):
        path = tmp_path / f"{variable_rate}.mp4"
        make_videos.write_film(path, film, variable_rate)
        shown[variable_rate], _ = read_video(path, FPS)
    assert len(shown[True]) == len(shown[False]) == 300 * FPS
    assert np.abs(shown[True].astype(int) - shown[False]).max(axis=(1, 2, 3)).mean() < 16  # coded at other times
    assert read_answers(np.stack(list(make_videos.render(film)))) == {
        kind: c[-1] for kind, (_, c) in QUESTIONS.items()
    }
    with av.open(str(tmp_path / "True.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == len({*make_videos.changes(film), 300 - 1 / FPS}) < 60


@pytest.mark.parametrize("count", [12, 60, 120, 1800])
def test_most_frequent_answers_are_right_at_most_about_once_in_three(tmp_path, count):
    make_videos.make_split(tmp_path, 0, "train", count, (10, 20))
    answers = {kind: Counter() for kind in QUESTIONS}
    for row in rows_of(tmp_path, "train"):
        for kind, turn in zip(row["kinds"], row["conversations"][1::2], strict=True):
            answers[kind][turn["value"]] += 1
    for kind, counter in answers.items():
        assert sum(counter.values()) == count
        assert counter.most_common(1)[0][1] <= 0.35 * count, kind
        assert counter.keys() == set(QUESTIONS[kind][1]), kind


def read_answers(frames: np.ndarray) -> dict[str, str]:
    """Return the right answers by the pixels of all frames, `FPS` a second."""
    seconds = frames[::FPS]
    colours = {colour: name for name, colour in COLOURS.items()}
    in_the_corner = [colours.get(tuple(pixel)) for pixel in seconds[:, -1, -1]]
    (flash,) = filter(None, in_the_corner)  # it lasts one second

    shown = np.flatnonzero((seconds[:, 32, 32] == 245).all(-1))
    assert (np.diff(shown) == 1).all()
    when = "start" if shown[0] == 0 else "end" if shown[-1] == len(seconds) - 1 else "middle"
    shape = (seconds[shown[0], :64, :64] == 245).all(-1)
    what = (
        "square" if shape[15, 15] else "triangle" if not shape[32, 12] else "cross" if shape.sum() < 1200 else "circle"
    )

    lit = [tuple(pixel) == (255, 250, 225) for pixel in seconds[:, 96, 96]]
    blinks = sum(now and not before for before, now in pairwise([False, *lit]))

    blocks = [colours.get(tuple(second[96, 32])) for second in seconds]
    blocks = [block for block, flashing in zip(blocks, in_the_corner, strict=True) if block and not flashing]

    ball = (frames[:, :64, 64:] == (250, 150, 60)).all(-1)
    places = [np.argwhere(frame).mean(0) for frame in ball if frame.any()]
    down, right = places[-1] - places[0]
    moved = {name: x * right + y * down for name, (x, y) in make_videos.DIRECTIONS.items()}
    return {
        "what": what,
        "when": when,
        "direction": max(moved, key=moved.get),
        "first": blocks[0],
        "count": QUESTIONS["count"][1][blinks - 1],
        "flash": flash,
    }


@pytest.mark.parametrize("seed", range(24))
def test_pixels_agree_with_the_answers(seed):
    rng = random.Random(seed)
    answers = {kind: rng.choice(choices) for kind, (_, choices) in QUESTIONS.items()}
    film = make_videos.plan_film(rng.randint(8, 40), answers, rng)
    frames = np.stack(list(make_videos.render(film)))
    assert len(frames) == film["seconds"] * FPS
    assert read_answers(frames) == answers
