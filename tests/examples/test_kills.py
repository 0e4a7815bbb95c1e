"""examples/train.py killed at random moments: it goes on from the last whole checkpoint as if nothing had happened."""

import json
import os
import subprocess
import sys

import killed_training
import pytest
import torch
from safetensors.torch import load_file
from tiny import EXAMPLES, ROOT


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of [`killed_training`]."""
    path = tmp_path_factory.mktemp("killed")
    folders = [ROOT, ROOT / "tests", EXAMPLES, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, killed_training.__file__, str(path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    logs = "".join(log.read_text()[-3000:] for log in path.glob("*/log.txt"))
    assert run.returncode == 0, run.stderr[-5000:] + logs
    return path


def results(folder) -> tuple[list, dict[str, torch.Tensor]]:
    """Losses, gradient norms and rates of all steps, and the final weights."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    names = ("step", "loss", "grad_norm", "learning_rate")
    return [[entry[name] for name in names] for entry in history if "loss" in entry], load_file(
        folder / "model.safetensors"
    )


@pytest.mark.parametrize("kind", killed_training.KINDS)
def test_killed_runs_equal_an_undisturbed_one(kind, killed):
    steps, weights = results(killed / kind / "undisturbed")
    assert len(steps) == steps[-1][0] > 20
    chains = json.loads((killed / "report.json").read_text())[kind]
    for number in range(len(chains)):
        actual_steps, actual_weights = results(killed / kind / str(number))
        assert actual_steps == steps
        assert all(torch.equal(actual_weights[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("kind", killed_training.KINDS)
def test_kills_were_where_they_should_be(kind, killed):
    kills = sum(json.loads((killed / "report.json").read_text())[kind], [])
    for where, number in killed_training.KILLS[kind].items():
        assert kills.count(where) >= number


def test_unfinished_checkpoints_were_met(killed):
    log = (killed / "rows" / "log.txt").read_text()
    assert "is not whole: trainer_state.json is missing. It is passed by." in log
    assert f"The run in {killed / 'rows' / '0'} goes on from " in log
    assert f"The run in {killed / 'rows' / '0'} starts anew, as no checkpoint there is whole." in log
