"""The checkpoint that the task loads by default answers about two hours of film."""

import random

import pytest
from make_videos import FPS, QUESTIONS, plan_film, render
from tiny import EXAMPLES  # noqa: F401  makes the examples importable
from transformers import pipeline
from video_files import write_video

HOURS = 2


@pytest.fixture(scope="module")
def answers():
    rng = random.Random(20)
    return {kind: rng.choice(choices) for kind, (_, choices) in QUESTIONS.items()} | {"when": "start"}


@pytest.fixture(scope="module")
def session(answers, tmp_path_factory):
    """The pipeline has watched an H.264 file of two hours, whose flash is in the first second."""
    film = plan_film(HOURS * 3600, answers, random.Random(20))
    film["flash"] = (answers["flash"], 0)
    path = tmp_path_factory.mktemp("film") / "two_hours.mp4"
    write_video(path, render(film), fps=FPS, preset="ultrafast", crf=20)
    return pipeline("video-question-answering").watch(str(path), progress=False)


def test_two_hours_are_remembered(session, answers):
    assert session.seconds == HOURS * 3600
    given = session.ask([question for question, _ in QUESTIONS.values()])
    assert {kind: entry["answer"] for kind, entry in zip(QUESTIONS, given, strict=True)} == answers


def test_a_saved_session_remembers_them_too(session, answers, tmp_path):
    session.save(tmp_path / "state.safetensors")
    resumed = pipeline("video-question-answering").resume(tmp_path / "state.safetensors")
    assert resumed.ask(QUESTIONS["flash"][0])["answer"] == answers["flash"]
