"""MA-GC's plans for a job of the benchmarks, and the settings that a method stands for.

The package is imported only where it is needed, since the stock methods run in processes without it.
"""

import math

import torch
from transformers import Mamba2Config, Mamba2Model

from common.memory_use import USABLE, available_bytes

MEMORY_LIMIT = 79 * 2**30  # bytes that PyTorch may take of a GPU, as on one of 80 GB


def ma_gc_settings(job: dict) -> dict:
    """Return arguments of `enable_multi_axis_checkpointing` for the job's method, such as `MA-GC-offload-2.8GB`."""
    _, *words = job["method"].removeprefix("MA-GC").split("-")
    settings = {**job["ma_gc"], "offload": "offload" in words}
    budgets = [word for word in words if word != "offload"]
    return {**settings, "memory_budget": budgets[0]} if budgets else settings


def make_plan(job: dict, length: int, settings: dict):
    """Return the `CheckpointPlan` of the job's shape and device, for fused kernels if the GPU has them."""
    from transformers_ma2mba import plan_checkpoints
    from transformers_ma2mba.gradient_checkpointing.fused_layer import why_not_fused

    fused = job["device"] == "cuda" and why_not_fused([], torch.device("cuda")) is None
    options = {"dtype": job["dtype"], "fused": fused, "from_ids": job.get("step") == "tokens", "device": job["device"]}
    return plan_checkpoints(Mamba2Config.from_dict(job["shape"]), length, **options, **settings)


def plan_of(job: dict) -> dict | None:
    """Return MA-GC's plan for the job's method and length, or None for other methods."""
    if not job["method"].startswith("MA-GC"):
        return None
    plan = make_plan(job, job["length"], ma_gc_settings(job))
    names = ("order", "layer_interval", "sequence_interval", "state_interval", "device_bytes", "host_bytes")
    return {name: getattr(plan, name) for name in names}


def fitting_settings(job: dict, length: int) -> dict:
    """Return settings of MA-GC with offload, on top of the job's, whose plan fits the GPU and the host.

    The device must hold the weights and gradients, too. The fastest such plan is preferred, then the smallest, then
    those with longer segments, whose states take less of the host.

    Raises:
        ValueError: if no plan fits.
    """
    tries = [{}, {"memory_budget": "minimal"}]
    tries += [{"memory_budget": "minimal", "sequence_interval": 2**n} for n in range(14, 18)]
    with torch.device("meta"):
        model = Mamba2Model(Mamba2Config.from_dict(job["shape"]))
    weights = model.num_parameters() * getattr(torch, job["dtype"]).itemsize
    device = MEMORY_LIMIT if job["device"] == "cuda" else math.inf
    for one in tries:
        settings = {**job["ma_gc"], "offload": True, **one}
        plan = make_plan(job, length, settings)
        # Gradients count twice: those that are loaded, and those that backward adds to them.
        if 3 * weights + plan.device_bytes <= 0.97 * device and plan.host_bytes <= USABLE * available_bytes():
            return settings
    raise ValueError(f"no plan for {length:,} tokens fits; the last expects {plan.device_bytes / 1e9:.0f} GB")
