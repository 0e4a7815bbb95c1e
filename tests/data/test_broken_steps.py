"""Broken samples in steps of two processes: each takes part in each step, also with nothing to learn."""

import os
import subprocess
import sys

import broken_steps
import pytest
import torch
from tiny import ROOT
from torch.testing import assert_close
from video_files import write_index_video

KINDS = ["plain", "ma-gc"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("films")
    write_index_video(path / "good.mp4", 24, fps=4, preset="ultrafast")
    (path / "broken.mp4").write_bytes(b"no film")
    return path


@pytest.fixture(scope="module")
def in_two_processes(folder, tmp_path_factory):
    """The results of both processes."""
    output = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=localhost:0", broken_steps.__file__, folder, output]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, (run.stdout + run.stderr)[-10000:]
    return [torch.load(output / f"results_{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one_process(kind, in_two_processes, folder, tmp_path):
    one = broken_steps.train(folder, tmp_path, micro_batch=2, checkpointed=kind == "ma-gc")
    assert one["losses"][1] == 0 and one["norms"][1] == 0
    assert one["losses"][0] > 1 and one["losses"][2] > 1
    for two in (results[kind] for results in in_two_processes):
        assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
        assert_close(two["weights"], one["weights"], rtol=0, atol=1e-5)
        assert two["supervised"] == one["supervised"] > 0
        assert two["num_broken"] == one["num_broken"] == 7
