"""Multi-axis gradient checkpointing (MA-GC) of a model: its switch, its settings, and a plan for each pass.

[`enable_multi_axis_checkpointing`] takes any stock Mamba-2. `Ma2mbaForVideoQA.gradient_checkpointing_enable` calls it
for the Mamba-2 inside the model.
"""

import zlib
from dataclasses import dataclass, field, fields, replace

import torch
from torch import nn
from transformers import Mamba2ForCausalLM, Mamba2Model, PreTrainedModel

from ..mamba2 import hold, release
from .mamba2_in_grid import MultiAxisMamba2ForCausalLM, MultiAxisMamba2Model
from .memory_model import TrainingStep, trained_sizes
from .plan import CheckpointPlan, MultiAxisOptions, plan_step
from .sharded_modules import gather_at_once, gather_piecemeal, is_sharded, max_over_processes, processes_in_step
from .swapped_class import is_passed_by, restore_class, swap_class

_USABLE = 0.85  # share of the free memory; the rest is for fragmentation and the parts beside the language model


def _step_of(model: Mamba2Model, inputs: torch.Tensor, fused: bool, whole_output: bool) -> TrainingStep:
    """Describe the training step of one pass; arguments as for [`_Settings.plan`]."""
    kind, from_ids = inputs.device.type, inputs.ndim == 2
    dtype = (model.embeddings.weight if from_ids else inputs).dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return TrainingStep(
        batch_size=inputs.shape[0],
        sequence_length=inputs.shape[1],
        dtype=dtype,
        parameter_dtype=model.norm_f.weight.dtype,
        fused=fused,
        from_ids=from_ids,
        trained=trained_sizes(model.layers, model.embeddings),
        whole_output=whole_output,
        accumulating=any(p.is_leaf and p.grad is not None for p in model.layers.parameters()),
        sharded=any(map(is_sharded, model.layers)),
        device=kind,
    )


@dataclass
class _Settings:
    """A model's options of MA-GC, and the plans made so far.

    Attributes:
        options: the options that the user gave.
        plans: plans by training step.
        gathered_at_once: layers that this module told their sharding to gather at once.
        passes: number of training passes so far, which shows whether a subclass's forward method calls `super()`.
        largest: the plan for the most tokens so far.
    """

    options: MultiAxisOptions
    plans: dict[TrainingStep, CheckpointPlan] = field(default_factory=dict)
    gathered_at_once: list = field(default_factory=list)
    passes: int = 0
    largest: CheckpointPlan | None = None

    def plan(
        self, model: Mamba2Model, inputs: torch.Tensor, fused: bool = False, whole_output: bool = True
    ) -> CheckpointPlan:
        """Choose the plan for one pass.

        Each kind of training step gets a plan once. If less memory is free than that plan takes, this pass gets a
        smaller one. Processes that must make the same calls in the same order agree on one plan: the plan for the
        largest of their batches, within the least free memory of any of them.

        Args:
            model: the model in the grid.
            inputs: `(batch_size, sequence_length)` token ids, or `(batch_size, sequence_length, hidden_size)`
                embeddings.
            fused: whether mamba-ssm's kernels run the layers.
            whole_output: whether the output is used at all positions, or at a few of them.

        Raises:
            ValueError: if no plan fits the budget.
            RuntimeError: if such processes have different options.
        """
        step, free = _step_of(model, inputs, fused, whole_output), _free_bytes(model)
        groups = processes_in_step(model)
        if groups:
            step, free = self.agree(groups, inputs.device, step, free)
        if step not in self.plans:
            if len(self.plans) == 256:  # few lengths repeat, so that old plans are seldom used again
                self.plans.clear()
            self.plans[step] = plan_step(model.config, step, self.options)
        plan = self.plans[step]
        if self.options.memory_budget is None and free is not None and plan.device_bytes > free:
            try:
                plan = plan_step(model.config, step, replace(self.options, memory_budget=free))
            except ValueError:  # no plan fits, and the smallest has the best chance
                plan = plan_step(model.config, step, replace(self.options, memory_budget="minimal"))
        if self.largest is None or plan.num_tokens > self.largest.num_tokens:
            self.largest = plan
        return plan

    def agree(self, groups: list, device: torch.device, step: TrainingStep | None, free: int | None):
        """Agree with other processes on the largest batch and the least free memory, and so on the same plan.

        Args:
            groups: groups of processes that must make the same calls in the same order.
            device: the device for the exchange.
            step: this process's training step; None for a pass outside of the grid.
            free: free bytes on this process's device; None if it is not a CUDA device.

        Returns:
            The training step and the free bytes for all processes.

        Raises:
            RuntimeError: if their plans would differ.
        """
        kind = None if step is None else (step.dtype, step.fused, step.from_ids, step.device)
        digest = zlib.crc32(repr((self.options, kind)).encode())
        sizes = [0, 0] if step is None else [step.batch_size, step.sequence_length]
        numbers = [*sizes, -(free or 0), digest, -digest]
        batch_size, sequence_length, less, highest, lowest = max_over_processes(numbers, groups, device)
        if highest != -lowest:
            raise RuntimeError(
                f"Processes that share a model's shards, or sum its gradients in the order of their arrival, must "
                f"checkpoint each step alike, but they disagree. This process has {self.options} and "
                f"{'runs outside of the grid' if step is None else kind}. Give all processes the same options and "
                f"devices, and output_hidden_states to all of them or to none."
            )
        if step is None:
            return None, free
        # Processes may differ in the used positions and in existing gradients: the plan assumes the larger case.
        step = replace(
            step, batch_size=batch_size, sequence_length=sequence_length, whole_output=True, accumulating=True
        )
        return step, None if free is None else -less


def _free_bytes(model: nn.Module) -> int | None:
    """Bytes that activations may take on the model's CUDA device, beside gradients to come; None on other devices."""
    device = model.norm_f.weight.device
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    # PyTorch can reuse the memory that it has reserved, but may be limited to a fraction of the device.
    free = min(free + reserved, torch.cuda.get_per_process_memory_fraction(device) * total) - allocated
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    free -= sum(parameter.nbytes for parameter in trained if parameter.grad is None)
    return max(int(_USABLE * free), 1)


def checkpointing_options(kwargs: dict | None, every_n_layers: int = 1, offload: bool = False) -> dict:
    """Translate the arguments of `gradient_checkpointing_enable` for [`enable_multi_axis_checkpointing`].

    Args:
        kwargs: `gradient_checkpointing_kwargs`; their `every_n_layers` and `offload` win over the arguments below.
        every_n_layers: option of Transformers' own checkpointing, which must be 1 here.
        offload: whether checkpoints wait for backward in host memory.

    Returns:
        Keyword arguments for [`enable_multi_axis_checkpointing`].

    Raises:
        ValueError: if a key is unknown, or `every_n_layers` is not 1.
    """
    options = dict(kwargs or {})
    # Trainer and PEFT set this option of torch.utils.checkpoint by themselves; it has no meaning here.
    options.pop("use_reentrant", None)
    every_n_layers = options.pop("every_n_layers", every_n_layers)
    if every_n_layers != 1:
        raise ValueError(
            f"every_n_layers={every_n_layers!r} has no meaning for multi-axis gradient checkpointing, which restores "
            f"every layer: set layer_interval and sequence_interval, or a memory_budget."
        )
    options.setdefault("offload", offload)
    known = [option.name for option in fields(MultiAxisOptions)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"gradient_checkpointing_kwargs does not know {', '.join(map(repr, unknown))}: "
            f"it takes {', '.join(known)}."
        )
    return options


def enable_multi_axis_checkpointing(
    model: nn.Module,
    layer_interval: int | str = MultiAxisOptions.layer_interval,
    sequence_interval: int | str = MultiAxisOptions.sequence_interval,
    memory_budget: str | int | None = MultiAxisOptions.memory_budget,
    offload: bool = MultiAxisOptions.offload,
    order: str = MultiAxisOptions.order,
) -> nn.Module:
    """Make a model train with multi-axis gradient checkpointing (MA-GC); weights, names and outputs stay the same.

    MA-GC applies to forward passes in training mode with gradients enabled. A pass with `output_hidden_states` runs
    without it, because its output keeps the hidden states of all layers. A second call changes the options.

    In such a pass with `labels`, a `Mamba2ForCausalLM` computes its loss exactly, but a piece of positions at a time.
    Its `logits` are then None: at 2^19 tokens they would take 105 GB. Leave out the labels to get logits.

    Args:
        model: a `Mamba2Model`, or any model with one inside: `Mamba2ForCausalLM`, `Ma2mbaForVideoQA`, a `PeftModel`.
        layer_interval: number of layers in a cell, as for [`plan_checkpoints`].
        sequence_interval: number of tokens in a cell, as for [`plan_checkpoints`].
        memory_budget: device memory for activations, as for [`plan_checkpoints`]. If the plan for None needs more than
            is free on a CUDA device, the fastest plan that fits the free memory takes its place.
        offload: whether checkpoints wait for backward in host memory.
        order: order of the grid, as for [`plan_checkpoints`].

    Returns:
        The model.

    Raises:
        ValueError: if the model has no stock Mamba-2 inside, or an option is out of its range.
    """
    settings = _Settings(MultiAxisOptions(layer_interval, sequence_interval, memory_budget, offload, order))
    trunk = _mamba2_of(model)
    settings.gathered_at_once = gather_at_once(trunk.layers)
    if is_multi_axis_checkpointed(trunk):
        settings.gathered_at_once += trunk._multi_axis_checkpointing.gathered_at_once
    hold(trunk)
    trunk._multi_axis_checkpointing = settings
    swap_class(trunk, MultiAxisMamba2Model)
    if is_passed_by(trunk):
        disable_multi_axis_checkpointing(trunk)
        raise ValueError(
            f"The forward of this {type(trunk).__name__} has been replaced on the instance, so that it would bypass "
            f"multi-axis gradient checkpointing: enable checkpointing first, and replace the forward after."
        )
    for module in _causal_lms_in(model):
        swap_class(module, MultiAxisMamba2ForCausalLM)
    return model


def disable_multi_axis_checkpointing(model: nn.Module) -> nn.Module:
    """Restore a model's plain forward pass, and return the model."""
    trunk = _mamba2_of(model)
    release(trunk)
    if is_multi_axis_checkpointed(trunk):
        gather_piecemeal(trunk._multi_axis_checkpointing.gathered_at_once)
        del trunk._multi_axis_checkpointing
        restore_class(trunk)
        for module in _causal_lms_in(model):
            restore_class(module)
    return model


def is_multi_axis_checkpointed(model: nn.Module) -> bool:
    """Tell whether multi-axis gradient checkpointing is enabled in a model."""
    return any("_multi_axis_checkpointing" in vars(module) for module in model.modules())


def largest_plan(model: nn.Module) -> CheckpointPlan | None:
    """Return the plan for the most tokens that a model has been trained on so far; None without MA-GC or training."""
    for module in model.modules():
        if "_multi_axis_checkpointing" in vars(module):
            return module._multi_axis_checkpointing.largest
    return None


def _causal_lms_in(model: nn.Module) -> list[Mamba2ForCausalLM]:
    return [module for module in model.modules() if isinstance(module, Mamba2ForCausalLM)]


def _mamba2_of(model: nn.Module) -> Mamba2Model:
    trunks = [module for module in model.modules() if isinstance(module, Mamba2Model)]
    if len(trunks) == 1:
        return trunks[0]
    name = type(model).__name__
    families = {module.config.model_type for module in model.modules() if isinstance(module, PreTrainedModel)}
    for family in ("mamba", "falcon_mamba"):
        if family in families:
            raise ValueError(
                f"{name} cannot be checkpointed along the sequence: Transformers' {family!r} layers start every pass "
                f"of more than one token from an empty state, so a sequence cannot be cut. Use a Mamba-2 model."
            )
    raise ValueError(
        f"Multi-axis gradient checkpointing needs a model with one Mamba2Model inside, whose layers carry a state "
        f"along the sequence; {name} has {len(trunks)}."
    )
