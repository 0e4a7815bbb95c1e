"""Checkpointed training steps in two processes, under DDP, FSDP2 and DeepSpeed's ZeRO.

Losses and weights equal those of plain steps in one process, and each parameter receives its gradient once per step.
"""

import functools
import os
import subprocess
import sys

import distributed_steps
import pytest
import torch
from double_precision import compute_in_double
from tiny import ROOT
from torch.testing import assert_close

# Absolute tolerances; losses are around 7, and three steps change weights by up to 3e-2. Computation is in float64,
# but ZeRO keeps float32 copies of gradients and weights.
EXACT = {"losses": 1e-12, "weights": 1e-11}
FLOAT32 = {"losses": 2e-6, "weights": 1e-5}
SESSIONS = {
    "torch": [
        "ddp:layer-major",
        "ddp:sequence-major",
        "fsdp2:layer-major",
        "fsdp2:sequence-major",
        "fsdp2:layer-major:frozen",
        "ddp:layer-major:kept",
        "fsdp2:sequence-major:kept",
        "ddp:layer-major:silent",
        "fsdp2:layer-major:silent",
        "ddp:default",
        "fsdp2:default",
        "fsdp2:differ",
    ],
    "deepspeed": [
        "zero1:layer-major",
        "zero2:sequence-major",
        "zero3:layer-major",
        "zero3:sequence-major",
        "zero3:layer-major:frozen",
        "zero3:layer-major:kept",
        "zero3:layer-major:silent",
        "zero1:default",
        "zero1-overlap:default",
        "zero2:default",
        "zero2-overlap:default",
        "zero3:default",
        "zero3:differ",
        "too-late",
    ],
}

TRAINED = ["layer-major", "sequence-major", "frozen", "kept", "silent", "default"]


def launch(*arguments):
    """Run distributed_steps.py in two processes. The error contains their output if they fail."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=localhost:0", distributed_steps.__file__, *map(str, arguments)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=420)
    except subprocess.TimeoutExpired:
        process.terminate()  # unlike kill, this lets torchrun end its own processes
        output, _ = process.communicate(timeout=60)
        pytest.fail(f"Not done after 7 minutes:\n{output[-10000:]}")
    assert process.returncode == 0, output[-10000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A function from a run to its results.

    Runs of a session share its processes, because these take longer to start than to train.
    """

    @functools.cache
    def of_session(session):
        path = tmp_path_factory.mktemp("distributed") / "results.pt"
        launch("--output_file", path, *SESSIONS[session])
        return torch.load(path)

    return lambda run: next(of_session(session)[run] for session, runs in SESSIONS.items() if run in runs)


@pytest.fixture(scope="module")
def one_process():
    with pytest.MonkeyPatch.context() as patch:
        compute_in_double(patch)
        return {
            "": distributed_steps.one_process(),
            "frozen": distributed_steps.one_process("frozen"),
            "kept": distributed_steps.one_process("kept"),
            "silent": distributed_steps.one_process("silent"),
            "default": distributed_steps.one_process(default=True),
        }


@pytest.mark.parametrize("run", [run for runs in SESSIONS.values() for run in runs if run.split(":")[-1] in TRAINED])
def test_two_processes_equal_one_process(run, results, one_process):
    kind = run.split(":")[-1]
    actual, expected = results(run), one_process[kind if kind in one_process else ""]
    tolerance = FLOAT32 if run.startswith("zero") else EXACT
    assert actual["losses"] == pytest.approx(expected["losses"], rel=0, abs=tolerance["losses"])
    assert actual["weights"].keys() == expected["weights"].keys()
    assert_close(actual["weights"], dict(expected["weights"]), rtol=0, atol=tolerance["weights"])
    for arrivals in actual["arrivals"]:
        assert arrivals and set(arrivals.values()) == {1}, {name: n for name, n in arrivals.items() if n != 1}


@pytest.mark.parametrize("scheme", ["fsdp2", "zero3"])
def test_every_process_reports_differing_settings(scheme, results):
    for messages in results(f"{scheme}:differ")["messages"]:
        for message in messages:
            assert "must checkpoint each step alike" in message
    intervals, ways = results(f"{scheme}:differ")["messages"][1]
    assert "layer_interval=4, sequence_interval=8" in intervals and "runs outside of the grid" in ways


def test_enabling_after_deepspeed_initialize_is_refused(results):
    assert "enable it before deepspeed.initialize" in results("too-late")["error"]
