"""The paper's three stages in small: `make stages` on a few films, from published layouts to answers."""

import json
import os
import subprocess
import sys

import make_stages
import make_tiny_model
import pytest
import torch
import train
from safetensors.torch import load_file
from tiny import EXAMPLES, ROOT
from transformers import pipeline

from transformers_ma2mba.command_line import main as command

RECIPES = EXAMPLES / "recipes"
SIZES = dict(num_pictures=12, num_segmented=4, num_questioned=8, num_validation=1, num_test=1)
# The model that each stage starts from, its data, and the parts that it trains.
STAGES = {
    "stage1": ("built", "stage1.json", {"multi_modal_projector"}),
    "stage1_5": ("stage1", "stage1_5/segments.jsonl", {"vision_tower", "multi_modal_projector", "language_model"}),
    "stage2": ("stage1_5", "stage2", {"vision_tower", "multi_modal_projector", "language_model"}),
}


def call(patch, script, *arguments):
    patch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    script.main()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small data for all stages, and a model built from a language model and an encoder in published layouts."""
    folder = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        sizes = [f"--{name}={value}" for name, value in SIZES.items()]
        call(patch, make_stages, "--output_dir", folder / "data", *sizes)
        train_file = folder / "data" / "validation.json"
        call(patch, make_tiny_model, "--train_file", train_file, "--output_dir", folder / "whole")
    for layout, output in (("original", "mamba2"), ("vision", "encoder")):
        command(["export", str(folder / "whole"), "--layout", layout, "--output", str(folder / output)])
    parts = ["--language_model", str(folder / "mamba2"), "--vision_model", str(folder / "encoder")]
    command(["build", *parts, "--output", str(folder / "built")])
    return folder


def options(data, output, stage) -> list[str]:
    start, files, _ = STAGES[stage]
    start = data / "built" if start == "built" else output / start
    return [
        str(RECIPES / f"tiny_{stage}.yaml"),
        f"--model_name_or_path={start}",
        f"--train_file={data / 'data' / files}",
        f"--output_dir={output / stage}",
        "--max_steps=3",
        "--logging_steps=1",
        "--tokens_per_batch=300" if stage != "stage1" else "--per_device_train_batch_size=2",
    ]


def train_here(data, output, stage):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *options(data, output, stage)])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            train.main()
        finally:
            torch.set_num_threads(threads)


def train_in_two_processes(data, output, stage):
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    launch += ["--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no", str(EXAMPLES / "train.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [sys.executable, *launch, *options(data, output, stage)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]


@pytest.mark.parametrize("run", [train_here, train_in_two_processes], ids=["one process", "two processes"])
def test_three_stages_train_their_parts_and_the_model_answers(data, tmp_path, run):
    before = load_file(data / "built" / "model.safetensors")
    for stage, (_, _, trained) in STAGES.items():
        run(data, tmp_path, stage)
        after = load_file(tmp_path / stage / "model.safetensors")
        changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
        assert changed == trained, stage
        history = json.loads((tmp_path / stage / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert len(losses) == 3 and all(0 < loss < 20 for loss in losses), stage
        before = after
    qa = pipeline("video-question-answering", model=str(tmp_path / "stage2"))
    [film] = sorted((data / "data" / "test").glob("*.mp4"))
    answer = qa(video=str(film), question="Which shape appears?", candidates=["circle", "square"])
    assert {entry["answer"] for entry in answer} == {"circle", "square"}


def test_recipes_differ_from_the_paper_s_in_size_only():
    """The tiny recipes have the options of the paper's, with other values where a toy needs them."""
    for stage in STAGES:
        tiny, paper = (
            train.parse_arguments([str(RECIPES / f"{name}.yaml"), *required()]) for name in (f"tiny_{stage}", stage)
        )
        assert tiny[0].freeze == paper[0].freeze
        assert tiny[0].interleave == paper[0].interleave == (stage == "stage1_5")
        assert (tiny[0].vision_learning_rate is None) == (paper[0].vision_learning_rate is None)
        for name in ("lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta2", "max_grad_norm"):
            assert getattr(tiny[1], name) == getattr(paper[1], name), (stage, name)


def required() -> list[str]:
    return ["--model_name_or_path=m", "--train_file=t.json", "--output_dir=o", "--use_cpu", "--bf16=false"]
