"""Fixtures: a tiny model, its processor, a checkpoint with both, and a film. No test reaches the network."""

import os
import tempfile

# Libraries read these variables once, when they are imported. One thread is fastest for such small models. Rows of
# lists are cached in a folder that goes when the tests end.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="rows_")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
import shutil

import pytest
from double_precision import compute_in_double
from tiny import tiny_config, tiny_model, tiny_processor
from transformers import pipeline
from video_files import write_index_video


def pytest_configure(config):
    # setup.cfg turns deprecation warnings in this package's modules into errors. Transformers often warns about its
    # caller from one of its own modules, so these warnings are errors too.
    for category in ("DeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", f"error::{category}:transformers")


def pytest_unconfigure(config):
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


class DeprecationHandler(logging.Handler):
    """A handler that collects the deprecations that Transformers logs instead of warning about them."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        message = record.getMessage()
        if "deprecat" in message.lower():
            self.messages.append(message)


@pytest.fixture(autouse=True)
def no_logged_deprecation():
    """Fail a test if Transformers logs a deprecation during it."""
    handler = DeprecationHandler()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    assert not handler.messages


@pytest.fixture
def in_double(monkeypatch):
    """Compute in float64 throughout, as [`compute_in_double`] describes."""
    compute_in_double(monkeypatch)


@pytest.fixture(scope="session")
def config():
    return tiny_config()


@pytest.fixture(scope="session")
def model(config):
    """Shared by all tests, which must not change it."""
    return tiny_model(config)


@pytest.fixture(scope="session")
def processor(config):
    """Shared by all tests, which must not change it."""
    return tiny_processor(config)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, model, processor):
    """A folder with the model and its processor."""
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def film(tmp_path_factory):
    """Six seconds at 4 frames per second; the frames are numbered from 0 to 23."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_index_video(path, 24, fps=4, preset="ultrafast")
    return path


@pytest.fixture(scope="session")
def qa(checkpoint):
    """The pipeline of the checkpoint."""
    return pipeline("video-question-answering", model=str(checkpoint))
