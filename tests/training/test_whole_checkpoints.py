"""Checkpoints of killed runs: which one to go on from. tests/examples/test_kills.py kills real runs."""

import json
import logging
import os
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from short_training import rows_about, short_trainer
from tiny import tiny_config, tiny_model

from transformers_ma2mba import last_whole_checkpoint

NEEDED = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An output folder with checkpoints of steps 2 and 4."""
    path = tmp_path_factory.mktemp("saved")
    short_trainer(path, rows_about("")[3:] * 4, optim="adamw_torch", save_strategy="steps", save_steps=2).train()
    return path


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def warned(caplog):
    """Says what has been warned of."""
    caplog.set_level(logging.WARNING)
    return lambda: [record.message for record in caplog.records if "is not whole" in record.message]


def test_the_newest_by_its_number(folder, warned):
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-10")
    state = json.loads((folder / "checkpoint-10" / "trainer_state.json").read_text())
    (folder / "checkpoint-10" / "trainer_state.json").write_text(json.dumps({**state, "global_step": 10}))
    (folder / "checkpoint-last").mkdir()
    (folder / "checkpoint-99").write_text("a file")
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-10")
    assert not warned()


@pytest.mark.parametrize("name", NEEDED)
def test_a_checkpoint_without_a_file_is_passed_by_and_named(folder, name, warned):
    (folder / "checkpoint-4" / name).unlink()
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")
    (warning,) = warned()
    assert f"{folder / 'checkpoint-4'} is not whole: " in warning
    lacking = {"model.safetensors": "no file of the weights", "optimizer.pt": "no file of the optimizer state"}
    lacking["rng_state.pth"] = "rng_state_0.pth is missing"
    assert lacking.get(name, f"{name} is missing") in warning


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
@pytest.mark.parametrize("name", [*NEEDED, "training_args.bin"])
def test_a_checkpoint_with_a_file_cut_short_is_passed_by_and_named(folder, name, share, warned):
    path = folder / "checkpoint-4" / name
    with path.open("r+b") as file:
        file.truncate(int(share * path.stat().st_size))
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")
    assert f"{name} cannot be read to its end" in warned()[0]


def test_nothing_whole(folder, tmp_path, warned):
    for name in ("checkpoint-2", "checkpoint-4"):
        (folder / name / "trainer_state.json").write_text('{"global_step": 3}')
    assert last_whole_checkpoint(folder) is None
    assert [warning.count("trainer_state.json is of step 3") for warning in warned()] == [1, 1]
    (tmp_path / "empty").mkdir()
    assert last_whole_checkpoint(tmp_path / "empty") is None
    assert last_whole_checkpoint(tmp_path / "missing") is None


def test_random_states_of_all_processes(folder, warned):
    rng = folder / "checkpoint-4" / "rng_state.pth"
    assert last_whole_checkpoint(folder, world_size=2) == str(folder / "checkpoint-4")  # a run of one process
    shutil.copy(rng, folder / "checkpoint-4" / "rng_state_1.pth")
    rng.rename(folder / "checkpoint-4" / "rng_state_0.pth")
    assert last_whole_checkpoint(folder, world_size=2) == str(folder / "checkpoint-4")
    assert last_whole_checkpoint(folder, world_size=1) == str(folder / "checkpoint-4")
    assert not warned()
    assert last_whole_checkpoint(folder, world_size=3) == str(folder / "checkpoint-2")
    assert "rng_state_2.pth is missing, one of 3 for 3 processes" in warned()[0]


def test_weights_in_several_files(folder, warned):
    newest = folder / "checkpoint-4"
    (newest / "model.safetensors").unlink()
    tiny_model(tiny_config()).save_pretrained(newest, max_shard_size="100kB")
    shards = sorted(newest.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert last_whole_checkpoint(folder) == str(newest)
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-1])
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")
    shards[1].unlink()
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")
    assert f"{shards[1].name} cannot be read to its end" in warned()[0]
    assert f"{shards[1].name} is missing" in warned()[1]


def test_adapters(tmp_path, warned):
    model = get_peft_model(tiny_model(tiny_config()), LoraConfig(target_modules=["in_proj"]))
    model.add_adapter("other", LoraConfig(target_modules=["out_proj"]))
    rows = rows_about("")[3:]
    short_trainer(tmp_path, rows, model, save_strategy="steps", save_steps=2, max_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert last_whole_checkpoint(tmp_path) == str(checkpoint)
    assert not (checkpoint / "model.safetensors").exists()
    (checkpoint / "adapter_model.safetensors").unlink()
    assert last_whole_checkpoint(tmp_path) == str(checkpoint)  # the weights of the other adapter are there
    shutil.rmtree(checkpoint / "other")
    assert last_whole_checkpoint(tmp_path) is None


def test_files_of_torch_distributed_checkpoint(folder, warned):
    """FSDP writes a folder for weights, and one for the optimizer."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    newest = folder / "checkpoint-4"
    for old, new in (("model.safetensors", "pytorch_model_fsdp_0"), ("optimizer.pt", "optimizer_0")):
        (newest / old).unlink()
        save({"a": torch.ones(100), "b": 3}, storage_writer=FileSystemWriter(newest / new), no_dist=True)
    assert last_whole_checkpoint(folder) == str(newest)
    (part,) = newest.glob("optimizer_0/*.distcp")
    os.truncate(part, part.stat().st_size - 1)
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")
    part.unlink()
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")
    (newest / "optimizer_0" / ".metadata").unlink()
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")
    assert all("optimizer_0 cannot be read to its end" in warning for warning in warned())


@pytest.mark.parametrize("stage", [1, 3])
def test_files_of_deepspeed(folder, stage, warned):
    newest, tag = folder / "checkpoint-4", folder / "checkpoint-4" / "global_step4"
    tag.mkdir()
    shards = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1)]
    names = shards if stage == 3 else ["mp_rank_00_model_states.pt"]
    names += [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
    for name in names:
        torch.save({}, tag / name)
    (newest / "optimizer.pt").unlink()
    (newest / "latest").write_text("global_step4")
    assert last_whole_checkpoint(folder, world_size=2) == str(newest)
    for name in names:
        (tag / name).rename(tag / "elsewhere")
        assert last_whole_checkpoint(folder, world_size=2) == str(folder / "checkpoint-2")
        (tag / "elsewhere").rename(tag / name)
    os.truncate(tag / names[-1], 10)
    assert last_whole_checkpoint(folder, world_size=2) == str(folder / "checkpoint-2")
    (newest / "latest").write_text("")
    assert last_whole_checkpoint(folder, world_size=2) == str(folder / "checkpoint-2")
    assert len(warned()) == len(names) + 2
