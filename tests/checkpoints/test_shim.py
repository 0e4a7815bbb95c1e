"""The shim: checkpoints that load with `trust_remote_code=True`, with and without the package."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from tiny import tiny_config
from transformers import AutoConfig, AutoModel, AutoProcessor

from transformers_ma2mba import Ma2mbaConfig, Ma2mbaForVideoQA, Ma2mbaProcessor, add_shim
from transformers_ma2mba.checkpoints.shim import SHIM_NAME


@pytest.fixture
def folder(tmp_path, checkpoint):
    """A checkpoint with the shim."""
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    add_shim(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def run_python(code: str, cache) -> list[str]:
    """Runs code in a fresh interpreter, and returns the lines that begin with ">".

    Copies of remote code stay in `cache`.
    """
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "PYTHONIOENCODING": "utf-8"}
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=300, env=environment
    )
    assert finished.returncode == 0, finished.stderr
    # Libraries print warnings of their own.
    return [line.removeprefix("> ") for line in finished.stdout.splitlines() if line.startswith("> ")]


def test_the_classes_load_without_importing_the_package(folder, tmp_path):
    """The processor comes first, because it loads without the configuration."""
    code = f"""
import sys
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoVideoProcessor
assert "transformers_ma2mba" not in sys.modules
for auto_class in (AutoProcessor, AutoConfig, AutoModel, AutoVideoProcessor):
    loaded = auto_class.from_pretrained({str(folder)!r}, trust_remote_code=True)
    print(">", type(loaded).__module__, type(loaded).__name__)
    loaded.save_pretrained({str(tmp_path / "again")!r})
"""
    assert run_python(code, tmp_path / "cache") == [
        "transformers_ma2mba.processing_ma2mba Ma2mbaProcessor",
        "transformers_ma2mba.configuration_ma2mba Ma2mbaConfig",
        "transformers_ma2mba.modeling_ma2mba Ma2mbaForVideoQA",
        "transformers_ma2mba.video_processing_ma2mba Ma2mbaVideoProcessor",
    ]
    # What is saved elsewhere neither needs the shim nor carries any other code.
    assert not list((tmp_path / "again").glob("*.py"))
    for name in ("config.json", "processor_config.json"):
        assert "auto_map" not in (tmp_path / "again" / name).read_text()


def test_the_pipeline_answers_without_importing_the_package(folder, tmp_path):
    code = f"""
import numpy, transformers
qa = transformers.pipeline("video-question-answering", model={str(folder)!r}, trust_remote_code=True)
print(">", sorted(qa(video=numpy.zeros((2, 32, 32, 3), numpy.uint8), question="Why?", max_new_tokens=3)))
"""
    assert run_python(code, tmp_path / "cache")[-1] == "['answer', 'score']"


def test_a_missing_package_is_named(folder, tmp_path):
    code = f"""
import sys, transformers
sys.modules["transformers_ma2mba"] = None  # as if it were not installed
for auto_class in (transformers.AutoConfig, transformers.AutoModel, transformers.AutoProcessor):
    try:
        auto_class.from_pretrained({str(folder)!r}, trust_remote_code=True)
    except ImportError as error:
        print(">", error)
"""
    assert run_python(code, tmp_path / "cache") == 3 * [
        "This checkpoint is a Video-Ma²mba, which Transformers loads with the package transformers_ma2mba: run "
        "`pip install .` in a clone of that package, and load the checkpoint again."
    ]


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_the_shim_changes_nothing_where_the_package_is_imported(folder, checkpoint, trust_remote_code):
    options = {} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(folder, **options)
    assert type(config) is Ma2mbaConfig
    assert config.to_json_string() == AutoConfig.from_pretrained(checkpoint).to_json_string()
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
