"""The shim: checkpoints that load with `trust_remote_code=True`, with and without the package."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from tiny import tiny_config
from transformers import AutoConfig, AutoModel, AutoProcessor

from transformers_ma2mba import Ma2mbaConfig, Ma2mbaForVideoQA, Ma2mbaProcessor
from transformers_ma2mba.checkpoints.shim import SHIM_NAME, add_shim


@pytest.fixture
def folder(tmp_path, checkpoint):
    """A checkpoint with the shim."""
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    add_shim(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def run_python(code: str, cache) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter, which keeps its copies of remote code in `cache`."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HOME": str(cache)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)


def test_the_classes_load_without_importing_the_package(folder, tmp_path):
    code = f"""
import sys
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoVideoProcessor
for auto_class in (AutoConfig, AutoModel, AutoProcessor, AutoVideoProcessor):
    assert auto_class is not AutoConfig or "transformers_ma2mba" not in sys.modules
    loaded = auto_class.from_pretrained({str(folder)!r}, trust_remote_code=True)
    print(type(loaded).__module__, type(loaded).__name__)
    if hasattr(loaded, "save_pretrained"):
        loaded.save_pretrained({str(tmp_path / "again")!r})
"""
    finished = run_python(code, tmp_path / "cache")
    assert finished.returncode == 0, finished.stderr
    names = [line.split() for line in finished.stdout.splitlines() if line.startswith("transformers_ma2mba.")]
    assert [name for _, name in names] == [
        "Ma2mbaConfig",
        "Ma2mbaForVideoQA",
        "Ma2mbaProcessor",
        "Ma2mbaVideoProcessor",
    ]
    # What is saved elsewhere neither needs the shim nor carries any other code.
    assert not list((tmp_path / "again").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert "auto_map" not in json.loads((tmp_path / "again" / "processor_config.json").read_text())


@pytest.mark.parametrize("first", ["AutoModel", "AutoProcessor"])
def test_model_and_processor_need_no_other_class_first(folder, tmp_path, first):
    code = f"""
import sys, transformers
loaded = transformers.{first}.from_pretrained({str(folder)!r}, trust_remote_code=True)
print(type(loaded).__name__)
"""
    finished = run_python(code, tmp_path / "cache")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split()[-1] == {"AutoModel": "Ma2mbaForVideoQA", "AutoProcessor": "Ma2mbaProcessor"}[first]


def test_the_pipeline_answers_without_importing_the_package(folder, tmp_path):
    code = f"""
import numpy, transformers
qa = transformers.pipeline("video-question-answering", model={str(folder)!r}, trust_remote_code=True)
print(qa(video=numpy.zeros((2, 32, 32, 3), numpy.uint8), question="Why?", max_new_tokens=3))
"""
    finished = run_python(code, tmp_path / "cache")
    assert finished.returncode == 0, finished.stderr
    assert set(eval(finished.stdout.splitlines()[-1])) == {"answer", "score"}


@pytest.mark.parametrize("auto_class", ["AutoConfig", "AutoModel", "AutoProcessor"])
def test_a_missing_package_is_named(folder, tmp_path, auto_class):
    code = f"""
import sys, transformers
sys.modules["transformers_ma2mba"] = None  # as if it were not installed
transformers.{auto_class}.from_pretrained({str(folder)!r}, trust_remote_code=True)
"""
    finished = run_python(code, tmp_path / "cache")
    assert finished.returncode != 0
    assert finished.stderr.splitlines()[-1] == (
        "ImportError: This checkpoint is a Video-Ma²mba, which Transformers loads with the package "
        "transformers_ma2mba: run `pip install .` in a clone of that package, and load the checkpoint again."
    )


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_the_shim_changes_nothing_where_the_package_is_imported(folder, checkpoint, trust_remote_code):
    options = {} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(folder, **options)
    assert type(config) is Ma2mbaConfig and config.to_dict() == AutoConfig.from_pretrained(checkpoint).to_dict()
    assert type(AutoModel.from_pretrained(folder, **options)) is Ma2mbaForVideoQA
    assert type(AutoProcessor.from_pretrained(folder, **options)) is Ma2mbaProcessor


def test_files_of_a_shim(folder, checkpoint):
    added = {path.name for path in folder.iterdir()} - {path.name for path in checkpoint.iterdir()}
    assert added == {SHIM_NAME}
    for name in ("config.json", "processor_config.json"):
        content, before = (json.loads((path / name).read_text()) for path in (folder, checkpoint))
        assert content.pop("auto_map") and content == before
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    add_shim(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_a_model_without_a_processor(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    add_shim(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", SHIM_NAME}


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "has no config.json, but the shim is for a saved 'ma2mba' model"),
        ('{"model_type": "mamba2"}', "holds a 'mamba2' model, but the shim"),
        ("{", "config.json' is no JSON file"),
        ("[]", "config.json' holds no JSON object"),
    ],
    ids=["no-config", "another-model", "broken", "list"],
)
def test_other_folders_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    before = list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        add_shim(tmp_path)
    assert list(tmp_path.iterdir()) == before
