"""The last checkpoint of a run that may have been killed at any moment, inside a save too."""

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

logger = logging.get_logger(__name__)

# File names of the Trainer, Accelerate (FSDP) and PEFT. DeepSpeed's lie in a folder that the file `latest` names.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
_SHARDED_WEIGHTS = tuple(f"{name}.index.json" for name in _WEIGHTS[:2])
_FSDP_WEIGHTS = ("pytorch_model_fsdp.bin", "pytorch_model_fsdp_0")
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0")


class _Unfinished(Exception):
    """Says what a checkpoint lacks."""


def last_whole_checkpoint(output_dir: str | os.PathLike, world_size: int = 1) -> str | None:
    """Find the newest whole checkpoint in the Trainer's output folder.

    A checkpoint is whole if the Trainer can go on from it as if it had never stopped: its state, and weights,
    optimizer, schedule and the random states of all processes, with no file cut short. A killed run may leave others
    behind, from inside a save or from the deletion of an old checkpoint. Those newer than the last whole one are named
    in a warning. Nothing is changed or deleted.

    Where processes have been initialised, all must call this: the first one looks, and all get its answer.

    Args:
        output_dir: the Trainer's `output_dir`, on a disk that all processes see.
        world_size: the number of processes of the run.

    Returns:
        The path of the checkpoint, for `trainer.train(resume_from_checkpoint=...)`, or None.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        found = [_newest(Path(output_dir), world_size) if torch.distributed.get_rank() == 0 else None]
        return broadcast_object_list(found)[0]
    return _newest(Path(output_dir), world_size)


def _newest(output_dir: Path, world_size: int) -> str | None:
    steps = {path: path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*") if path.is_dir()}
    steps = {path: int(step) for path, step in steps.items() if step.isdecimal()}
    for path in sorted(steps, key=steps.get, reverse=True):
        try:
            _check(path, steps[path], world_size)
            return str(path)
        except _Unfinished as lack:
            logger.warning(f"{path} is not whole: {lack}. It is passed by.")
    return None


def _check(folder: Path, step: int, world_size: int):
    state = _json(folder / "trainer_state.json")
    if state.get("global_step") != step:
        raise _Unfinished(f"trainer_state.json is of step {state.get('global_step')}")
    deepspeed = (folder / "latest").is_file()
    if deepspeed:
        _check_deepspeed(folder, world_size)
    else:
        _first(folder, _OPTIMIZERS, "optimizer state")
        _first(folder, ["scheduler.pt"], "state of the schedule")
        _check_weights(folder)
    _check_random_states(folder, world_size)
    for path in sorted(folder.rglob("*")):
        _check_file(path)


def _check_weights(folder: Path):
    adapters = [f"{path.parent.name}/{path.name}" for path in folder.glob("*/adapter_model.*")]
    name = _first(folder, (*_FSDP_WEIGHTS, *_SHARDED_WEIGHTS, *_WEIGHTS, *adapters), "weights")
    if name in _SHARDED_WEIGHTS:
        for shard in sorted(set(_json(folder / name).get("weight_map", {}).values())):
            _first(folder, [shard], "weights")


def _check_deepspeed(folder: Path, world_size: int):
    tag = (folder / "latest").read_text().strip()
    names = {path.name.removeprefix("bf16_") for path in folder.joinpath(tag).glob("*.pt")} if tag else set()
    if "mp_rank_00_model_states.pt" not in names:  # ZeRO-3, whose weights are shards
        _needs(names, [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world_size)], tag)
    _needs(names, [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world_size)], tag)


def _check_random_states(folder: Path, world_size: int):
    names = {path.name for path in folder.glob("rng_state*.pth")}
    if "rng_state.pth" not in names:  # one process has written it, and its other files before
        _needs(names, [f"rng_state_{rank}.pth" for rank in range(world_size)])


def _needs(names: set[str], needed: list[str], tag: str = ""):
    missing = [name for name in needed if name not in names]
    if missing:
        raise _Unfinished(
            f"{os.path.join(tag, missing[0])} is missing, one of {len(needed)} for {len(needed)} processes"
        )


def _first(folder: Path, names, what: str) -> str:
    for name in names:
        if (folder / name).exists():
            return name
    raise _Unfinished(f"{names[0]} is missing" if len(names) == 1 else f"there is no file of the {what}")


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise _Unfinished(f"{path.name} is missing") from None
    except ValueError:
        raise _Unfinished(f"{path.name} cannot be read to its end") from None
    if not isinstance(content, dict):
        raise _Unfinished(f"{path.name} is not a JSON object")
    return content


def _check_file(path: Path):
    """Check that a file has its end, by its header or its directory; the values in between are not read."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path):
                pass
        elif path.name == "optimizer_0" or path.name == "pytorch_model_fsdp_0":
            for name, size in _distributed_files(path):
                if (path / name).stat().st_size < size:
                    raise ValueError(name)
    except (OSError, ValueError, EOFError, SafetensorError, zipfile.BadZipFile):
        raise _Unfinished(f"{path.name} cannot be read to its end") from None


def _distributed_files(folder: Path) -> Iterator[tuple[str, int]]:
    """The files of a folder of torch.distributed.checkpoint and the least bytes of each, by its metadata."""
    from torch.distributed.checkpoint import FileSystemReader

    for place in FileSystemReader(folder).read_metadata().storage_data.values():
        yield place.relative_path, place.offset + place.length
