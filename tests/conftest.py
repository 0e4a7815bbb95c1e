"""Fixtures: a tiny model with its processor, the same as a checkpoint, and a film. No test reaches the network."""

import os

# Before transformers and PyTorch are imported, which read these once. Models this small lose more by sharing an
# operation among threads than they gain.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging

import pytest
from tiny import tiny_config, tiny_model, tiny_processor
from transformers import pipeline
from video_files import write_index_video


def pytest_configure(config):
    # What setup.cfg asks of warnings that name this package's modules holds for Transformers' too: it often warns from
    # within about what its caller did.
    for category in ("DeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", f"error::{category}:transformers")


class DeprecationHandler(logging.Handler):
    """Collects what Transformers logs, rather than warns, about deprecations."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        message = record.getMessage()
        if "deprecat" in message.lower():
            self.messages.append(message)


@pytest.fixture(autouse=True)
def no_logged_deprecation():
    """Fails a test during which Transformers logs that something is deprecated."""
    handler = DeprecationHandler()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    assert not handler.messages


@pytest.fixture(scope="session")
def config():
    return tiny_config()


@pytest.fixture(scope="session")
def model(config):
    """Shared by all tests: leave it as it is."""
    return tiny_model(config)


@pytest.fixture(scope="session")
def processor(config):
    """Shared by all tests: leave it as it is."""
    return tiny_processor(config)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, model, processor):
    """A directory with the model and its processor."""
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def film(tmp_path_factory):
    """Six seconds at 4 frames per second, the frames numbered from 0 to 23."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_index_video(path, 24, fps=4, preset="ultrafast")
    return path


@pytest.fixture(scope="session")
def qa(checkpoint):
    """The pipeline, on the checkpoint."""
    return pipeline("video-question-answering", model=str(checkpoint))
