"""Memory of a training step on one GPU: weights, gradients and optimizer, language model, vision tower and host."""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig

from ..mamba2 import Mamba2Shape
from .memory_model import TrainedSizes, TrainingStep, floating_dtype, is_count
from .memory_size import parse_memory_size
from .plan import CheckpointPlan, MultiAxisOptions, longest_sequence, plan_step, smallest_plan

OPTIMIZERS = {
    "adamw": "AdamW: two moments in float32, and a float32 copy of half-precision weights",
    "none": "no optimizer state",
}


@dataclass(frozen=True)
class TrainingMemory:
    """Expected memory of one training step, in bytes.

    Attributes:
        tokens: number of tokens of each sample.
        frames: number of video frames of each sample.
        frame_rate: frames per second of film; None without a vision tower.
        parameters: number of parameters, without adapters.
        trained_parameters: number of trained parameters.
        device: bytes on the device, by part. Language model and vision tower reach their peaks at different times.
        device_before_activations: bytes of weights, gradients and optimizer state.
        device_total: bytes on the device at the step's peak.
        host: bytes in host memory, by part.
        plan: the plan of multi-axis gradient checkpointing.
        memory_budget: memory of the whole device; None without a budget.
        fits: whether the step fits the budget; None without a budget.
        longest_tokens: number of tokens of the longest sample that fits the budget; None without a budget, or if the
            length does not limit the memory.
        longest_seconds: seconds of film in that sample; None also without a vision tower.
        bytes_with_offload: least bytes on the device with `offload`, if the step does not fit without.
    """

    tokens: int
    frames: int
    frame_rate: float | None
    parameters: int
    trained_parameters: int
    device: dict[str, int]
    device_before_activations: int
    device_total: int
    host: dict[str, int]
    plan: CheckpointPlan
    memory_budget: int | None = None
    fits: bool | None = None
    longest_tokens: int | None = None
    longest_seconds: float | None = None
    bytes_with_offload: int | None = None


def estimate_training_memory(
    config: PreTrainedConfig,
    *,
    seconds: float | None = None,
    tokens: int | None = None,
    fps: float | None = None,
    text_tokens: int = 256,
    batch_size: int = 1,
    dtype: torch.dtype | str = torch.bfloat16,
    optimizer: str = "adamw",
    freeze_vision: bool = False,
    lora_rank: int | None = None,
    load_in_4bit: bool = False,
    offload: bool = False,
    fused: bool = False,
    memory_budget: int | str | None = None,
) -> TrainingMemory:
    """Estimate the memory of one training step with multi-axis gradient checkpointing.

    Weights, gradients and optimizer state are whole on the device, and gradients have the type of the weights. The
    vision tower's backward begins when the language model's has ended, so that only the larger of the two counts.

    Args:
        config: a `Ma2mbaConfig` or a `Mamba2Config`.
        seconds: length of the film in each sample; needs a vision tower.
        tokens: number of tokens of each sample, instead of `seconds`.
        fps: frames per second of film; None means the configuration's `frame_rate`.
        text_tokens: number of tokens beside the film.
        batch_size: number of samples.
        dtype: type of weights and activations, a torch dtype or its name.
        optimizer: a key of `OPTIMIZERS`.
        freeze_vision: whether the vision tower is frozen, and without adapters.
        lora_rank: rank of adapters in float32 on all linear layers but the head, trained in place of all weights.
        load_in_4bit: whether these layers' weights are in 4 bits, as `examples/train.py` loads them, and all others in
            float32, as `prepare_model_for_kbit_training` converts them.
        offload: whether checkpoints wait for backward in host memory.
        fused: whether mamba-ssm's kernels run the layers.
        memory_budget: memory of the whole device, a size such as `"80GiB"` or a number of bytes.

    Raises:
        ValueError: if an argument is out of its range, or the model has no vision tower for `seconds`.
    """
    _check_training(optimizer, lora_rank, load_in_4bit)
    dtype = floating_dtype("dtype", dtype)
    budget = None if memory_budget is None else parse_memory_size(memory_budget)
    tokens, frames, frame_rate = _sample_length(config, seconds, tokens, fps, text_tokens)
    weights = _weigh(config, dtype, freeze_vision, lora_rank, load_in_4bit)
    trained_itemsize = dtype.itemsize if lora_rank is None else 4
    optimizer_bytes = 8 + 4 * (trained_itemsize < 4) if optimizer == "adamw" else 0  # per trained parameter
    device = {
        **{f"weights: {part}": size for part, size in weights.nbytes.items()},
        "gradients": weights.trained * trained_itemsize,
        "optimizer state": weights.trained * optimizer_bytes,
    }
    constant = sum(device.values())
    vision = _vision_bytes(config, batch_size * frames, dtype, freeze_vision) if frames else 0
    # When the vision tower's backward begins, only the gradient of the embeddings is left of the language model.
    width = getattr(config, "text_config", config).hidden_size
    token_bytes = batch_size * width * dtype.itemsize if vision and not offload else 0
    vision_peak = vision + tokens * token_bytes

    from_ids = frame_rate is None
    step = TrainingStep(
        tokens,
        batch_size=batch_size,
        dtype=dtype,
        parameter_dtype=torch.float32 if load_in_4bit else dtype,
        fused=fused,
        from_ids=from_ids,
        trained=None if lora_rank is None else _adapters_of_a_layer(config, lora_rank),
        whole_output=from_ids,
    )
    options = MultiAxisOptions(offload=offload)
    limits = {}
    if budget is None:
        plan = plan_step(config, step, options)
    else:
        room = budget - constant
        plan = smallest_plan(config, step, options)
        fits = max(plan.device_bytes, vision_peak) <= room
        if fits:
            plan = plan_step(config, step, replace(options, memory_budget=room))
        elif not offload:
            offloaded = smallest_plan(config, step, replace(options, offload=True))
            limits["bytes_with_offload"] = constant + max(offloaded.device_bytes, vision)
        longest = 0
        if room > vision:
            longest = longest_sequence(config, step, replace(options, memory_budget=room))
        if longest and token_bytes:
            longest = min(longest, (room - vision) // token_bytes)
        limits |= {"memory_budget": budget, "fits": fits, "longest_tokens": longest}
        if frame_rate is not None:
            film_tokens = max((longest or 0) - text_tokens, 0)
            limits["longest_seconds"] = longest and film_tokens // config.tokens_per_frame / frame_rate
    device |= {"activations of the language model (MA-GC)": plan.device_bytes, "vision tower": vision}
    host = {"checkpoints": plan.host_bytes}
    if frame_rate is not None:
        host["pixels (uint8)"] = batch_size * frames * 3 * config.vision_config.image_size**2
    return TrainingMemory(
        tokens=tokens,
        frames=frames,
        frame_rate=frame_rate,
        parameters=weights.count,
        trained_parameters=weights.trained,
        device=device,
        device_before_activations=constant,
        device_total=constant + max(plan.device_bytes, vision_peak),
        host=host,
        plan=plan,
        **limits,
    )


def _check_training(optimizer: str, lora_rank: int | None, load_in_4bit: bool):
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be {' or '.join(map(repr, OPTIMIZERS))}; got {optimizer!r}.")
    if lora_rank is not None and not is_count(lora_rank):
        raise ValueError(f"lora_rank must be a whole number above 0; got {lora_rank!r}.")
    if load_in_4bit and lora_rank is None:
        raise ValueError("Weights in 4 bits cannot be trained: give a lora_rank, too.")


def _sample_length(config, seconds, tokens, fps, text_tokens) -> tuple[int, int, float | None]:
    """Compute a sample's tokens, its frames and the frame rate; the rate is None without a vision tower."""
    if text_tokens < 0:
        raise ValueError(f"text_tokens cannot be negative; got {text_tokens}.")
    if (seconds is None) == (tokens is None):
        raise ValueError("Give either seconds or tokens, and not both.")
    if not hasattr(config, "vision_config"):
        if tokens is None:
            raise ValueError("This model has no vision tower: give the length in tokens instead of seconds.")
        return tokens, 0, None
    frame_rate = fps or config.frame_rate
    if tokens is not None:
        return tokens, tokens // config.tokens_per_frame, frame_rate
    frames = math.ceil(seconds * frame_rate)
    return frames * config.tokens_per_frame + text_tokens, frames, frame_rate


@dataclass(frozen=True)
class _Weights:
    """A model's weights.

    Attributes:
        count: number of parameters, without adapters.
        nbytes: bytes by part.
        trained: number of trained parameters.
    """

    count: int
    nbytes: dict[str, int]
    trained: int


def _weigh(config, dtype: torch.dtype, freeze_vision: bool, lora_rank: int | None, load_in_4bit: bool) -> _Weights:
    """Weigh a model's parameters by part, and its adapters, without allocating them."""
    # AutoModel has Ma2mbaForVideoQA; a stock Mamba-2 is trained with its head, which AutoModel leaves out.
    auto_class = AutoModel if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto_class.from_config(config)
    linear = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not model.get_output_embeddings()
    }
    count, nbytes, trained = 0, {"language model": 0}, 0
    for name, parameter in model.named_parameters():
        in_tower = "vision_tower." in name
        part = "vision tower and projector" if in_tower or "multi_modal_projector." in name else "language model"
        if load_in_4bit:
            size = _bytes_in_4bit(parameter.numel()) if name in linear else 4 * parameter.numel()
        else:
            size = dtype.itemsize * parameter.numel()
        count, nbytes[part] = count + parameter.numel(), nbytes.get(part, 0) + size
        if parameter.requires_grad and not (freeze_vision and in_tower):  # nothing else would have a gradient
            if lora_rank is None:
                trained += parameter.numel()
            elif name in linear:
                trained += lora_rank * (linear[name].in_features + linear[name].out_features)
    if lora_rank is not None:
        nbytes["adapters"] = 4 * trained
    if load_in_4bit:  # a layer's weight is dequantized for each of its products
        largest = max(module.weight.numel() for module in linear.values())
        nbytes["one of them, dequantized"] = dtype.itemsize * largest
    return _Weights(count, nbytes, trained)


def _bytes_in_4bit(count: int) -> int:
    """Bytes of a weight in bitsandbytes' 4 bits, with a byte for each 64 values and a float for 256 such bytes."""
    scales = math.ceil(count / 64)
    return math.ceil(count / 2) + scales + 4 * math.ceil(scales / 256)


def _adapters_of_a_layer(config, rank: int) -> TrainedSizes:
    """Sizes of the adapters in float32 on both projections of a Mamba-2 layer."""
    shape = Mamba2Shape.of(config)
    count = rank * (shape.width + shape.projected + shape.inner + shape.width)
    return TrainedSizes(
        layer_bytes=4 * count, half_bytes=0, norms=False, in_proj_itemsize=4, out_proj_itemsize=4, embeddings=False
    )


def _vision_bytes(config, num_frames: int, dtype: torch.dtype, frozen: bool) -> int:
    """Memory of a piece of frames in the vision tower, with attention that keeps no matrix of scores.

    For each patch of a frame in each layer, autograd keeps 8 tensors as wide as the residual (the inputs and outputs
    of both norms, queries, keys, values, attention's output) and 3 as wide as the MLP. A frozen tower keeps them for
    one layer at a time.
    """
    vision = config.vision_config
    # The layers above the one whose features are used run too, but autograd keeps nothing of them.
    layers = 1 if frozen else max(config.vision_feature_layer % (vision.num_hidden_layers + 1), 1)
    patches = min(config.frames_per_vision_pass, num_frames) * (config.patches_per_side**2 + 1)
    return patches * layers * (8 * vision.hidden_size + 3 * vision.intermediate_size) * dtype.itemsize
