"""examples/train.py with adapters, with and without weights in 4 bits."""

import json
import shutil
import sys

import pytest
import torch
import train
from adapters import AdapterArguments, add_adapters, loading_options
from quantization import why_not
from safetensors.torch import load_file
from tiny import random_frames, tiny_config, tiny_model
from transformers import AutoModel, pipeline
from video_step import CANDIDATES, QUESTION

four_bits = pytest.param(True, marks=pytest.mark.skipif(why_not() is not None, reason=str(why_not())), id="4 bits")


@pytest.fixture(scope="module")
def train_file(film, tmp_path_factory):
    """Four questions about one film."""
    path = tmp_path_factory.mktemp("rows") / "train.json"
    turns = [[{"from": "human", "value": f"{QUESTION} {n}"}, {"from": "gpt", "value": "red"}] for n in range(4)]
    path.write_text(json.dumps([{"video": str(film), "conversations": turn} for turn in turns]))
    return path


def train_here(patch, checkpoint, train_file, output_dir, **options):
    options = {
        "model_name_or_path": checkpoint,
        "train_file": train_file,
        "output_dir": output_dir,
        "per_device_train_batch_size": 1,
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 0.01,
        "report_to": "none",
        "use_cpu": True,
        "lora": True,
        "lora_rank": 4,
        **options,
    }
    patch.setattr(sys, "argv", ["train.py", *(f"--{name}={value}" for name, value in options.items())])
    train.main()
    return load_file(output_dir / "adapter_model.safetensors")


def answers(qa) -> list[dict]:
    return qa(video=random_frames(4), question=QUESTION, candidates=CANDIDATES)


@pytest.mark.parametrize("load_in_4bit", [False, four_bits])
def test_adapters_train_resume_and_load(load_in_4bit, checkpoint, train_file, tmp_path, monkeypatch, qa):
    options = dict(activation_checkpointing=True, load_in_4bit=load_in_4bit)
    whole = train_here(monkeypatch, checkpoint, train_file, tmp_path / "whole", **options)
    assert {name.split(".")[3] for name in whole} == {"vision_tower", "multi_modal_projector", "language_model"}
    assert not any("encoder.layers.2" in name for name in whole)  # nothing uses that layer
    assert all(tensor.count_nonzero() for tensor in whole.values())  # PEFT initialises half of them to zero
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    options["resume_from_checkpoint"] = "last"
    resumed = train_here(monkeypatch, checkpoint, train_file, tmp_path / "resumed", **options)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    trained = answers(pipeline("video-question-answering", model=str(tmp_path / "whole")))
    assert {entry["answer"]: entry["score"] for entry in trained}["red"] > {
        entry["answer"]: entry["score"] for entry in answers(qa)
    }["red"]


def test_targets_and_frozen_modules(checkpoint, train_file, tmp_path, monkeypatch):
    """Features of a frozen vision tower without adapters can be kept."""
    options = dict(freeze="vision_tower", keep_features="memory", max_steps=1)
    found = train_here(monkeypatch, checkpoint, train_file, tmp_path / "all", **options)
    assert {name.split(".")[3] for name in found} == {"multi_modal_projector", "language_model"}
    options |= dict(lora_targets="in_proj", lora_alpha=6)
    found = train_here(monkeypatch, checkpoint, train_file, tmp_path / "some", **options)
    assert {name.split(".")[-3] for name in found} == {"in_proj"}
    config = json.loads((tmp_path / "some" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6)


def test_the_folder_names_its_checkpoint_wherever_it_is_used(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    adapted = add_adapters(AutoModel.from_pretrained(checkpoint.name), AdapterArguments(lora=True), [])
    assert adapted.peft_config["default"].base_model_name_or_path == str(checkpoint)
    assert adapted.peft_config["default"].lora_alpha == 32


def test_options_that_make_no_sense(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="Weights in 4 bits cannot be trained: add --lora"):
        loading_options(AdapterArguments(load_in_4bit=True), torch.device("cpu"))
    adapted = add_adapters(AutoModel.from_pretrained(checkpoint), AdapterArguments(lora=True), [])
    adapted.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    for lora in (True, False):
        with pytest.raises(ValueError, match="has adapters already: merge them"):
            add_adapters(again, AdapterArguments(lora=lora), [])
    model = tiny_model(tiny_config())
    assert add_adapters(model, AdapterArguments(), []) is model and not hasattr(model, "peft_config")
