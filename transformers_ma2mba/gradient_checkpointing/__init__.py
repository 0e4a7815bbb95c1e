"""MA-GC, multi-axis gradient checkpointing (arXiv:2411.19460, §3.2 and §3.3): enable, disable, plan."""

from .captured_tensors import CapturedTensors
from .loss_in_pieces import can_be_in_pieces, causal_lm_loss
from .memory_size import format_memory_size, parse_memory_size
from .multi_axis import (
    checkpointing_options,
    disable_multi_axis_checkpointing,
    enable_multi_axis_checkpointing,
    is_multi_axis_checkpointed,
    largest_plan,
)
from .plan import CheckpointPlan, plan_checkpoints
from .sharded_modules import has_forward_hooks, is_sharded, max_over_processes, processes_in_step
from .training_memory import OPTIMIZERS, TrainingMemory, estimate_training_memory
