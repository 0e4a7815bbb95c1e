"""examples/accelerate: each file's scheme trains examples/train.py on two CPU processes, as one process does."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import train_three_times
import yaml
from tiny import EXAMPLES, ROOT, tiny_config, tiny_model, tiny_processor
from torch.testing import assert_close
from video_files import write_index_video

from transformers_ma2mba import Ma2mbaForVideoQA, last_whole_checkpoint

CONFIGS = EXAMPLES / "accelerate"
SECONDS = [5, 140, 90, 8, 70, 200, 12, 6]  # of film; a pair of them is in the two processes at a time
STEPS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model of eight layers, and rows of different lengths, each with as many answers."""
    path = tmp_path_factory.mktemp("accelerate")
    config = tiny_config(text={"num_hidden_layers": 8}, frames_per_vision_pass=100)
    tiny_model(config).save_pretrained(path / "model")
    tiny_processor(config).save_pretrained(path / "model")
    rows = []
    for number, seconds in enumerate(SECONDS):
        write_index_video(path / f"{number}.mp4", seconds, fps=1, preset="ultrafast")
        turns = [{"from": "human", "value": "Who opens the door?"}, {"from": "gpt", "value": f"word{number}"}]
        rows.append({"video": f"{number}.mp4", "conversations": turns})
    (path / "rows.json").write_text(json.dumps(rows))
    return path


def on_cpus(name: str, folder) -> dict:
    """Write a config's CPU form and return the config: two processes, in full precision, on this machine."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    changes = {"mixed_precision": "no", "num_processes": 2, "main_process_port": 0}
    if config["num_machines"] > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            changes |= {"main_process_ip": "127.0.0.1", "main_process_port": free.getsockname()[1]}
    if config["num_processes"] == 1:
        changes |= {"num_processes": 1, "use_cpu": True}
    assert changes.keys() - {"main_process_ip", "main_process_port"} <= config.keys()
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**config, **changes}))
    return config


def launch(name: str, data, *words, machine_rank: int = 0) -> subprocess.Popen:
    """Start the config's CPU form."""
    batch_size = 1 if name != "one_gpu" else 2
    options = dict(model_name_or_path=data / "model", train_file=data / "rows.json", output_dir=data / name)
    options |= dict(per_device_train_batch_size=batch_size, global_batch_size=4, max_steps=STEPS)  # two batches
    options |= dict(learning_rate=1e-2, vision_learning_rate=2e-3, weight_decay=0.1, save_steps=1)
    options |= dict(logging_steps=1, train_sampling_strategy="sequential", activation_checkpointing=True)
    options |= dict(adam_epsilon=1e-3)  # with less, Adam magnifies the smallest difference in rounding
    options |= dict(report_to="none", disable_tqdm=True, dataloader_pin_memory=False)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", data / f"{name}.yaml"]
    command += ["--machine_rank", machine_rank, train_three_times.__file__]
    command += [f"--{option}={value}" for option, value in options.items()] + list(words)
    folders = [ROOT / "tests" / "on_cpus", ROOT, ROOT / "tests", os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    environment |= {"ACCELERATE_TORCH_DEVICE": "cpu", "PYTHONPATH": os.pathsep.join(map(str, folders))}
    return subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def trained(data):
    """A function from a config's name to the folder of its run."""

    def train(name):
        if not (data / f"{name}_stopped" / "output.txt").exists():
            machines = on_cpus(name, data)["num_machines"]
            processes = [launch(name, data, machine_rank=rank) for rank in range(machines)]
            try:
                outputs = [process.communicate(timeout=300)[0] for process in processes]
            finally:
                for process in processes:
                    process.terminate()
            for process, output in zip(processes, outputs, strict=True):
                assert process.returncode == 0, output[-8000:]
                assert "FutureWarning" not in output and "deprecat" not in output.lower(), output
            (data / f"{name}_stopped" / "output.txt").write_text("".join(outputs))
        return data / name

    return train


def losses(folder) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def weights(folder) -> dict[str, torch.Tensor]:
    """The weights of a saved model. Under ZeRO-3, Transformers saves them by names that only it reads back."""
    return Ma2mbaForVideoQA.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("name", ["zero1", "zero3", "fsdp2", "two_nodes"])
def test_two_processes_train_like_one(name, trained):
    """Losses are about 8, and weights change by up to 3e-2; both differ by rounding in float32."""
    folder, expected = trained(name), trained("one_gpu")
    before, one = weights(expected.parent / "model"), weights(expected)
    changes = {
        part: max((one[n] - before[n]).abs().max() for n in one if part in n) for part in ("vision", "language")
    }
    assert changes["language"] > 3 * changes["vision"] > 1e-4
    for run in (folder, folder.with_name(f"{name}_resumed")):
        assert losses(run) == pytest.approx(losses(expected), rel=0, abs=1e-4)
        two = weights(run)
        assert two.keys() == one.keys()
        for key, weight in one.items():
            assert_close(two[key], weight, rtol=0, atol=3e-5, msg=lambda message, key=key: f"{key}: {message}")


@pytest.mark.parametrize("name", ["one_gpu", "zero1", "zero3", "fsdp2", "two_nodes"])
def test_resumed_runs_equal_the_first(name, trained):
    folder = trained(name)
    resumed = folder.with_name(f"{name}_resumed")
    assert losses(resumed) == losses(folder) and len(losses(folder)) == STEPS
    first, second = weights(folder), weights(resumed)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["one_gpu", "zero1", "zero3", "fsdp2", "two_nodes"])
def test_checkpoints_are_whole_until_a_file_is_missing(name, trained, tmp_path):
    folder, processes = trained(name), 1 if name == "one_gpu" else 2
    newest = folder / f"checkpoint-{STEPS}"
    assert last_whole_checkpoint(folder, processes) == str(newest)
    needed = [path for path in newest.rglob("*") if path.suffix in (".pt", ".pth") or path.name == "optimizer.bin"]
    if (newest / "latest").exists():
        needed.remove(newest / "scheduler.pt")  # DeepSpeed may have a schedule of its own
    assert len(needed) >= 2 + processes
    for path in [*needed, newest / "trainer_state.json"]:
        path.rename(tmp_path / "away")
        assert last_whole_checkpoint(folder, processes) == str(folder / f"checkpoint-{STEPS - 1}"), path
        (tmp_path / "away").rename(path)


@pytest.mark.parametrize("name", ["one_gpu", "zero1", "zero3", "fsdp2", "two_nodes"])
def test_a_gradient_that_is_not_finite_stops_all_processes(name, trained):
    """The first step has two batches of each process."""
    stopped = trained(name).with_name(f"{name}_stopped")
    files = [[0, 1, 2, 3]] if name == "one_gpu" else [[0, 2], [1, 3]]
    named = [", ".join(str(stopped.parent / f"{number}.mp4") for number in numbers) for numbers in files]
    sentence = f"Its files: {named[0]}."
    if len(named) == 2:
        sentence = f"Files of process 0: {named[0]}. Files of process 1: {named[1]}."
    for rank in range(len(named)):
        assert (
            f"Process {rank} stopped: The gradients of step 1 are not finite, although its losses are: training stops "
            f"and saves nothing more. {sentence}\n"
        ) in (stopped / "output.txt").read_text()
    assert not list(stopped.glob("checkpoint-*"))


@pytest.mark.parametrize("path", sorted(CONFIGS.iterdir()), ids=lambda path: path.stem)
def test_configs_are_for_half_precision_on_gpus(path):
    config = yaml.safe_load(path.read_text())
    assert config["mixed_precision"] == "bf16" and config["use_cpu"] is False
    assert config["num_processes"] == {"one_gpu": 1, "two_nodes": 16}.get(path.stem, 8)
