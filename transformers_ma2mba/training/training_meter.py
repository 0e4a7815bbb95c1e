"""What a training run does: its speed, its memory, and the plan of its checkpoints."""

import sys
from time import perf_counter

import torch
from torch import nn
from transformers import TrainerCallback

from ..gradient_checkpointing import largest_plan

try:
    import resource
except ImportError:  # Windows
    resource = None


class TrainingMeter(TrainerCallback):
    """Adds speed, memory and the plan of MA-GC to the Trainer's logs, and to its `log_history`.

    Callbacks see the logs in their order, so that this one must come before those that report them:

        reporters = [callback() for callback in get_reporting_integration_callbacks("tensorboard")]
        Trainer(..., args=TrainingArguments(..., report_to="none"), callbacks=[TrainingMeter(), *reporters])

    The values cover the steps since the last log, on all processes:

    - `tokens_per_second`, without padding, and `frames_per_second`, which counts images, too. The time of evaluation
      and of saving is left out, and that of reading films is not.
    - `peak_memory_gib`: the most memory of tensors on a CUDA device so far, or else of the whole process, of the
      process with most.
    - `plan`: MA-GC's plan as text, whenever a batch has been larger than all before.
    """

    def __init__(self):
        self._hook, self._tokens, self._frames, self._seconds, self._mark, self._plan = None, 0, 0, 0.0, 0.0, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Start to count the model's inputs."""
        self.on_train_end(args, state, control)
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._tokens, self._frames, self._seconds, self._mark, self._plan = 0, 0, 0.0, perf_counter(), None

    def on_step_end(self, args, state, control, **kwargs):
        """Add the time of the step and of the wait for its batch."""
        now = perf_counter()
        self._seconds, self._mark = self._seconds + now - self._mark, now

    def on_evaluate(self, args, state, control, **kwargs):
        """Leave out the time since the step."""
        self._mark = perf_counter()

    def on_save(self, args, state, control, **kwargs):
        """Leave out the time since the step."""
        self._mark = perf_counter()

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        """Add the values to the logs of training steps."""
        if "loss" in logs and self._seconds > 0:
            values = self._values(args.device)
            plan = largest_plan(model)
            if plan is not None and plan != self._plan:
                self._plan, values["plan"] = plan, f"```\n{plan}\n```"  # TensorBoard reads Markdown
            logs.update(values)
            state.log_history[-1].update(values)
            self._tokens, self._frames, self._seconds = 0, 0, 0.0
        self._mark = perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        """Stop counting."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _count(self, model: nn.Module, args: tuple, kwargs: dict):
        if not model.training:
            return
        mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
        if mask is not None:
            self._tokens = self._tokens + mask.sum()  # on its device, which need not be waited for
        elif ids is not None:
            self._tokens = self._tokens + ids.numel()
        for name in ("pixel_values", "pixel_values_videos", "picture_indices_videos"):
            if kwargs.get(name) is not None:
                self._frames += len(kwargs[name])

    def _values(self, device: torch.device) -> dict[str, float]:
        sums, most = [float(self._tokens), float(self._frames)], [self._seconds, _peak_memory(device)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            sums, most = torch.tensor(sums, device=device), torch.tensor(most, device=device)
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            sums, most = sums.tolist(), most.tolist()
        (tokens, frames), (seconds, memory) = sums, most
        speeds = {"tokens_per_second": tokens / seconds, "frames_per_second": frames / seconds}
        return {**{name: round(speed, 3) for name, speed in speeds.items()}, "peak_memory_gib": memory}


def _peak_memory(device: torch.device) -> float:
    """The most memory so far in GiB; 0 where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
