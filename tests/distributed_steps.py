"""Three training steps under each of several distributed schemes; test_distributed.py starts this with torchrun.

A batch has two samples, one for each of two processes. Both samples have the same number of supervised tokens, so the
mean loss over processes equals the mean over the batch. The samples differ in all else: one process may have more
cells or more frames than the other, or no frames at all. A run is named by a scheme and one of

    an order    small cells in that order, four layers, a few dozen tokens
    default     the default plan, eight layers, lengths drawn between 40 and 2,000 tokens
    differ      different intervals in the two processes, then a plain step in one of them; returns the error messages

and after that perhaps by

    frozen      only Mamba-2 is trained
    kept        the vision tower is frozen, and one of the two processes has its features in place of frames
    silent      one of the two processes has no supervised tokens, and its loss is 0
"""

import argparse
import random
import sys
from collections import Counter
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from double_precision import compute_in_double
from tiny import VOCABULARY, pad_left, random_pixels, tiny_config, tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from transformers_ma2mba.gradient_checkpointing import loss_in_pieces

LAYER_INTERVAL = {"layer-major": 2, "sequence-major": 1}
FRAMES = [(5, 2), (0, 4), (3, 7)]  # in the two samples of each step
TEXT = [(9, 21), (14, 6), (30, 2)]  # tokens before the frames
DRAWN = [tuple(round(40 * 50 ** random.Random(f"{step} {rank}").random()) for rank in (0, 1)) for step in range(3)]
ANSWER = 4


def build(order: str | None, frozen: str | None = None, default=False):
    """Build the model in training mode.

    Args:
        order: an order of the grid, "default", "differ", or None for no checkpointing.
        frozen: "frozen", "kept", "silent" or None, see above.
        default: whether the model has eight layers instead of four, for "default" and "differ".
    """
    config = tiny_config(text={"num_hidden_layers": 8 if default else 4}, frames_per_vision_pass=2)
    model = tiny_model(config, dtype=torch.float64).train()
    modules = (model.model.vision_tower, model.model.multi_modal_projector, model.get_input_embeddings())
    for module in modules[: {"frozen": 3, "kept": 1}.get(frozen, 0)]:
        module.requires_grad_(False)
    if order == "default":
        model.gradient_checkpointing_enable()
    elif order == "differ":
        options = {"layer_interval": 2 + 2 * dist.get_rank(), "sequence_interval": 8}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    elif order is not None:
        options = {"layer_interval": LAYER_INTERVAL[order], "sequence_interval": 8, "order": order}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


def optimizer_of(model):
    # The gradients of the biases of attention keys are zero up to rounding. Adam would scale them up to whole steps; a
    # larger epsilon prevents this.
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)


def sample(config, step, rank, frozen=None) -> dict:
    generator = torch.Generator().manual_seed(10 * step + rank)
    lengths = DRAWN if config.text_config.num_hidden_layers == 8 else TEXT
    text = torch.randint(2, 300, (lengths[step][rank] + ANSWER,), generator=generator)
    frames = FRAMES[step][rank]
    placeholders = torch.full((frames * config.tokens_per_frame,), config.video_token_id)
    input_ids = torch.cat([text[:-ANSWER], placeholders, text[-ANSWER:]])
    labels = input_ids.clone()
    labels[: None if frozen == "silent" and rank == step % 2 else -ANSWER] = -100
    inputs = {"input_ids": input_ids[None], "labels": labels[None]}
    if frames:
        inputs["pixel_values_videos"] = random_pixels(frames, seed=10 * step + rank)
    return inputs


def with_kept_features(inputs: dict) -> dict:
    """The inputs with features of the vision tower in place of frames; each picture occurs once."""
    pixels = inputs.pop("pixel_values_videos", None)
    if pixels is not None:
        with torch.no_grad():
            features = build(None).model.get_vision_features(pixels)  # the weights are those of each new model
        inputs |= {"vision_features_videos": features, "picture_indices_videos": torch.arange(len(pixels))}
    return inputs


def batch(config, step, frozen=None) -> dict:
    """Both samples, padded on the left."""
    samples = [sample(config, step, rank, frozen) for rank in (0, 1)]
    return {
        "input_ids": pad_left([inputs["input_ids"] for inputs in samples], 1),
        "labels": pad_left([inputs["labels"] for inputs in samples], -100),
        "attention_mask": pad_left([torch.ones_like(inputs["input_ids"]) for inputs in samples], 0),
        "pixel_values_videos": torch.cat([inputs.get("pixel_values_videos", torch.empty(0)) for inputs in samples]).to(
            torch.uint8
        ),
    }


def one_process(frozen=None, default=False) -> dict:
    """Losses and weights of plain training steps on whole batches in one process."""
    model = build(None, frozen, default)
    optimizer = optimizer_of(model)
    losses = []
    for step in range(len(FRAMES)):
        loss = model(**batch(model.config, step, frozen)).loss
        if frozen == "silent":
            loss = loss / 2  # the mean over the processes
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "weights": model.state_dict()}


def train(model, config, frozen, backward, step_optimizer) -> dict:
    """Losses averaged over the processes, and the number of gradients that each parameter received in each step."""
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    losses, arrivals = [], [Counter(dict.fromkeys(names.values(), 0)) for _ in FRAMES]
    step = 0

    def count(parameter):
        arrivals[step][names[parameter]] += 1

    hooks = [parameter.register_post_accumulate_grad_hook(count) for parameter in names]
    for step in range(len(FRAMES)):  # noqa: B007, `count` reads it
        inputs = sample(config, step, dist.get_rank(), frozen)
        if frozen == "kept" and dist.get_rank() == step % 2:
            inputs = with_kept_features(inputs)
        loss = model(**inputs).loss
        backward(loss)
        step_optimizer()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())
    for hook in hooks:
        hook.remove()
    return {"losses": losses, "arrivals": arrivals}


def run_torch(scheme, order, frozen) -> dict:
    """DDP, or FSDP2 with every block sharded separately, as accelerate does."""
    model = build(order, frozen, default=order in ("default", "differ"))
    wrapped = model
    if scheme == "ddp":
        # Trainer sets this for a checkpointed model. A missing gradient is an error then.
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in list(model.modules()):
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(model)

    def step_optimizer():
        optimizer.step()
        optimizer.zero_grad()

    if order == "differ":
        return disagreement(wrapped, model)
    results = train(wrapped, model.config, frozen, torch.Tensor.backward, step_optimizer)
    weights = model.state_dict()
    if scheme == "fsdp2":
        weights = {name: tensor.full_tensor() for name, tensor in weights.items()}
    return results | {"weights": weights}


def prepared_by_deepspeed(model, stage, overlap=False):
    import deepspeed

    # On a CPU, DeepSpeed would compile its own all-reduce for minutes. Without it, DeepSpeed uses Gloo's.
    deepspeed.ops.__compatible_ops__ = {}
    # ZeRO-3 refuses a float64 model on processors that support float16, and accepts it on all others.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: False
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # the default is 1.0
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,  # otherwise such small parameters are not sharded
            "reduce_bucket_size": 5000,  # otherwise all gradients fit into one bucket, in any order
            "overlap_comm": overlap,
        },
    }
    return deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)[0]


def run_zero(scheme, order, frozen) -> dict:
    import deepspeed

    stage = int(scheme.removeprefix("zero").removesuffix("-overlap"))
    model = build(order, frozen, default=order in ("default", "differ"))
    engine = prepared_by_deepspeed(model, stage, scheme.endswith("overlap"))
    if order == "differ":
        results = disagreement(engine, model)
        engine.destroy()
        return results
    results = train(engine, model.config, frozen, engine.backward, engine.step)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    engine.destroy()
    return results | {"weights": weights}


def disagreement(wrapped, model) -> dict:
    """Error messages of both processes: with different intervals, and with a plain step in one process."""
    inputs = sample(model.config, 0, dist.get_rank())
    messages = []
    for options in ({}, {"output_hidden_states": dist.get_rank() == 1}):
        try:
            wrapped(**inputs, **options)
            messages.append(None)
        except RuntimeError as error:
            messages.append(str(error))
        model.gradient_checkpointing_enable({"layer_interval": 2, "sequence_interval": 8})
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, messages)
    return {"messages": gathered}


def run_too_late() -> dict:
    """The error if checkpointing is enabled after DeepSpeed has prepared the model."""
    model = build(None)
    engine = prepared_by_deepspeed(model, stage=3)
    try:
        model.gradient_checkpointing_enable()
        return {"error": None}
    except RuntimeError as error:
        return {"error": str(error)}
    finally:
        engine.destroy()


def run(scheme, order=None, frozen=None) -> dict:
    if scheme == "too-late":
        return run_too_late()
    return (run_zero if scheme.startswith("zero") else run_torch)(scheme, order, frozen)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_file", required=True)
    parser.add_argument("runs", nargs="+", help="scheme:order, or scheme:order:frozen, :kept or :silent")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        compute_in_double(patch)
        # The loss takes three of the four supervised positions at a time.
        patch.setattr(loss_in_pieces, "_BYTES_OF_A_PIECE", 3 * VOCABULARY * loss_in_pieces._BYTES_OF_A_LOGIT)
        for name in arguments.runs:
            print(f"{name}, process {dist.get_rank()}", file=sys.stderr, flush=True)
            results[name] = run(*name.split(":"))
    if dist.get_rank() == 0:
        torch.save(results, arguments.output_file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
