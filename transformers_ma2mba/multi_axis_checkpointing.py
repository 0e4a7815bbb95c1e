"""Multi-axis gradient checkpointing for a model: switched on and off, its settings, and the plan for each pass.

[`enable_multi_axis_checkpointing`] is for any stock Mamba-2, and what `Ma2mbaForVideoQA.gradient_checkpointing_enable`
does to the one inside.
"""

import zlib
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import Mamba2ForCausalLM, Mamba2Model, PreTrainedModel

from .checkpoint_plan import CheckpointPlan, check_interval, check_memory_budget, plan_checkpoints
from .kernel_choice import hold, release
from .memory_model import TrainedSizes, trained_sizes
from .multi_axis_mamba2 import MultiAxisMamba2ForCausalLM, MultiAxisMamba2Model
from .sharded_modules import gather_at_once, gather_piecemeal, is_sharded, max_over_processes, processes_in_step
from .swapped_class import is_passed_by, restore_class, swap_class

_USABLE = 0.85  # of what is free: the rest is for fragments, and for what is beside the language model


@dataclass(frozen=True)
class _Pass:
    """What a plan is made for."""

    batch_size: int
    sequence_length: int
    dtype: torch.dtype
    fused: bool
    from_ids: bool
    whole_output: bool
    trained: TrainedSizes
    accumulating: bool
    sharded: bool
    device: str

    @classmethod
    def of(cls, model: Mamba2Model, inputs: torch.Tensor, fused: bool, whole_output: bool) -> "_Pass":
        """Arguments as for [`_Settings.plan`]."""
        kind, from_ids = inputs.device.type, inputs.ndim == 2
        dtype = (model.embeddings.weight if from_ids else inputs).dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return cls(
            *inputs.shape[:2],
            dtype,
            fused,
            from_ids,
            whole_output,
            trained=trained_sizes(model.layers, model.embeddings),
            accumulating=any(p.is_leaf and p.grad is not None for p in model.layers.parameters()),
            sharded=any(map(is_sharded, model.layers)),
            device=kind,
        )


@dataclass
class _Settings:
    """How a model is to be checkpointed, and the plans made of it for the lengths that have come by."""

    layer_interval: int | str = "auto"
    sequence_interval: int | str = "auto"
    memory_budget: str | int | None = None
    offload: bool = False
    order: str = "auto"
    plans: dict = field(default_factory=dict)
    gathered_at_once: list = field(default_factory=list)  # layers of which this was asked here
    passes: int = 0  # how many there have been in the grid

    def __post_init__(self):
        check_interval("layer_interval", self.layer_interval)
        check_interval("sequence_interval", self.sequence_interval)
        check_memory_budget(self.memory_budget)
        if not isinstance(self.offload, bool):
            raise ValueError(f"offload must be True or False, got {self.offload!r}.")
        if self.order not in ("auto", "layer-major", "sequence-major"):
            raise ValueError(f'order must be "layer-major", "sequence-major" or "auto", got {self.order!r}.')

    def plan(
        self, model: Mamba2Model, inputs: torch.Tensor, fused: bool = False, whole_output: bool = True
    ) -> CheckpointPlan:
        """The plan for one pass.

        It is made once for each length, unless less memory than it takes is free. Processes that must make the same
        calls in the same order make the plan of the longest of their batches, in the least that is free to any.

        Args:
            inputs: `(batch_size, sequence_length)` token ids, or `(batch_size, sequence_length, hidden_size)` rows.
            fused: whether mamba-ssm's kernels run the layers.
            whole_output: whether all rows are wanted, or a few of them.

        Raises:
            ValueError: if no plan fits the budget.
            RuntimeError: if such processes were given different settings.
        """
        wanted, free = _Pass.of(model, inputs, fused, whole_output), _free_bytes(model)
        groups = processes_in_step(model)
        if groups:
            wanted, free = self.agree(groups, inputs.device, wanted, free)
        if wanted not in self.plans:
            if len(self.plans) == 256:  # lengths hardly ever repeat: no need to remember them all
                self.plans.clear()
            self.plans[wanted] = self._plan(model, wanted, self.memory_budget)
        plan = self.plans[wanted]
        if self.memory_budget is None and free is not None and plan.device_bytes > free:
            try:
                plan = self._plan(model, wanted, free)
            except ValueError:  # too little for any: the smallest has the best chance
                plan = self._plan(model, wanted, "minimal")
        return plan

    def agree(self, groups: list, device: torch.device, wanted: _Pass | None, free: int | None):
        """The largest batch and the least free memory of the processes, which then make the same plan of them.
        `wanted` is None for a pass that goes the plain way.

        Raises:
            RuntimeError: if they would not make the same plan.
        """
        settings = (self.layer_interval, self.sequence_interval, self.memory_budget, self.offload, self.order)
        kind = None if wanted is None else (wanted.dtype, wanted.fused, wanted.from_ids, wanted.device)
        digest = zlib.crc32(repr((settings, kind)).encode())
        sizes = [0, 0] if wanted is None else [wanted.batch_size, wanted.sequence_length]
        numbers = [*sizes, -(free or 0), digest, -digest]
        batch_size, sequence_length, less, highest, lowest = max_over_processes(numbers, groups, device)
        if highest != -lowest:
            raise RuntimeError(
                f"Processes that share a model's shards, or add up its gradients in the order of their arrival, must "
                f"checkpoint each step alike, but they disagree. This one has {settings}, and "
                f"{'takes the plain way' if wanted is None else kind}: give all of them the same settings and "
                f"devices, and output_hidden_states to all or none."
            )
        if wanted is None:
            return None, free
        # Of what else counts, each process has its own view: one has rows that are wanted, another gradients already.
        wanted = replace(
            wanted, batch_size=batch_size, sequence_length=sequence_length, whole_output=True, accumulating=True
        )
        return wanted, None if free is None else -less

    def _plan(self, model, wanted: _Pass, memory_budget) -> CheckpointPlan:
        return plan_checkpoints(
            model.config,
            memory_budget=memory_budget,
            offload=self.offload,
            layer_interval=self.layer_interval,
            sequence_interval=self.sequence_interval,
            order=self.order,
            parameter_dtype=model.norm_f.weight.dtype,
            **vars(wanted),
        )


def _free_bytes(model: nn.Module) -> int | None:
    """What activations may take of the memory that is free on the model's CUDA device, gradients that are yet to come
    set aside; None on other devices."""
    device = model.norm_f.weight.device
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    # PyTorch can use again what it has reserved, and may have been told to leave some of the device to others.
    free = min(free + reserved, torch.cuda.get_per_process_memory_fraction(device) * total) - allocated
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    free -= sum(parameter.nbytes for parameter in trained if parameter.grad is None)
    return max(int(_USABLE * free), 1)


def checkpointing_options(kwargs: dict | None, every_n_layers: int = 1, offload: bool = False) -> dict:
    """What `gradient_checkpointing_enable` was given, as arguments of [`enable_multi_axis_checkpointing`].

    Raises:
        ValueError: if a key is unknown, or `every_n_layers`, which Transformers' own checkpointing knows, is not 1.
    """
    options = dict(kwargs or {})
    # Of torch.utils.checkpoint, and set by Trainer and PEFT on their own: without a meaning here.
    options.pop("use_reentrant", None)
    every_n_layers = options.pop("every_n_layers", every_n_layers)
    if every_n_layers != 1:
        raise ValueError(
            f"every_n_layers={every_n_layers!r} is not for multi-axis gradient checkpointing, which restores every "
            f"layer: set layer_interval and sequence_interval, or a memory_budget."
        )
    options.setdefault("offload", offload)
    known = ["layer_interval", "sequence_interval", "memory_budget", "offload", "order"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"gradient_checkpointing_kwargs does not know {', '.join(map(repr, unknown))}: "
            f"it takes {', '.join(known)}."
        )
    return options


def enable_multi_axis_checkpointing(
    model: nn.Module,
    layer_interval: int | str = "auto",
    sequence_interval: int | str = "auto",
    memory_budget: str | int | None = None,
    offload: bool = False,
    order: str = "auto",
) -> nn.Module:
    """Makes a model train with multi-axis gradient checkpointing; weights, names and outputs stay as they are.

    It holds for forward passes in training mode with gradients enabled; a pass that asks for `output_hidden_states`
    takes the plain way, since it is to keep them all. Calling it again changes the settings.

    With `labels`, such a pass of a `Mamba2ForCausalLM` takes the loss a piece of positions at a time, exactly, and its
    `logits` are None: at 2^19 tokens they would be 105 GB. Whoever needs them leaves out the labels.

    Args:
        model: a `Mamba2Model`, or any model with one inside: `Mamba2ForCausalLM`, `Ma2mbaForVideoQA`, a `PeftModel`.
        layer_interval: number of layers in a cell, or "auto".
        sequence_interval: number of tokens in a cell, or "auto".
        memory_budget: device memory for activations that "auto" may use: "20GiB", bytes, or "minimal" for the least.
            None is the least of the fastest plans or, if that is more than is free on a CUDA device, the fastest that
            fits there.
        offload: whether borders wait for backward in host memory.
        order: "layer-major" (the paper's Algorithms 1 and 2), "sequence-major", or "auto".

    Returns:
        The model.

    Raises:
        ValueError: if the model has no stock Mamba-2 inside, or an argument makes no sense.
    """
    settings = _Settings(layer_interval, sequence_interval, memory_budget, offload, order)
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
            f"The forward of this {type(trunk).__name__} has been replaced on the instance, which would pass by "
            f"multi-axis gradient checkpointing: enable it before whatever replaces the forward."
        )
    for module in _causal_lms_in(model):
        swap_class(module, MultiAxisMamba2ForCausalLM)
    return model


def disable_multi_axis_checkpointing(model: nn.Module) -> nn.Module:
    """Gives a model its plain forward pass back. Returns the model."""
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
    """Whether [`enable_multi_axis_checkpointing`] holds for a model."""
    return any("_multi_axis_checkpointing" in vars(module) for module in model.modules())


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
                f"of more than one token from an empty state, so a sequence cannot be cut. Mamba-2 models can."
            )
    raise ValueError(
        f"Multi-axis gradient checkpointing needs a model with one Mamba2Model inside, whose layers carry a state "
        f"along the sequence; {name} has {len(trunks)}."
    )
