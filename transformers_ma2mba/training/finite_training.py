"""A stop at the first loss or gradient that is not finite, with the names of the films that it came from."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback

_KEY = "files_of_batch"


class StopAtNonFinite(TrainerCallback):
    """Stops training before a loss or gradient that is not finite reaches the weights, or a checkpoint.

    Give it to any Trainer: `Trainer(..., callbacks=[StopAtNonFinite()])`. It raises a `FloatingPointError` that names
    the step and the files of its batches. Without it the Trainer goes on, and by default logs such a loss as the
    average of the earlier ones (`logging_nan_inf_filter`).

    A loss stops the process that has it before its backward pass, and the launcher then ends the others. Gradients are
    summed over processes, so that all processes stop, and each one names the batches of all. Gradients that a loss
    scaler finds too large for float16 are no error, because it skips their step, unless they are at a scale of 1, too.

    The names are those of the rows' videos and images. A collator that the Trainer calls with such rows, or with lists
    of them, need not know of this.
    """

    def __init__(self):
        self._files, self._step, self._remove = [], 0, []

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        """Watch the model's loss, and let the collator name the files of each batch."""
        self._stop_watching()
        hooks = [
            model.register_forward_pre_hook(self._take_files, with_kwargs=True),
            model.register_forward_hook(self._check_loss),
        ]
        self._remove = [hook.remove for hook in hooks]
        # A dispatcher sends one process's batches to the others, tensors only.
        # Accelerate's wrapper has the user's loader, which need not be one of PyTorch's.
        loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
        if not isinstance(train_dataloader, DataLoaderDispatcher) and hasattr(loader, "collate_fn"):
            collate, loader.collate_fn = loader.collate_fn, _WithFiles(loader.collate_fn)
            self._remove.append(lambda: setattr(loader, "collate_fn", collate))

    def on_step_begin(self, args, state, control, **kwargs):
        """Forget the files of the last step."""
        self._files, self._step = [], state.global_step + 1

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Check the gradients.

        Raises:
            FloatingPointError: if they are not finite, on all processes.
        """
        if getattr(optimizer, "scaler", None) is None and not _gradients_are_finite(model, optimizer, args.device):
            files = gather_object([self._files])
            raise FloatingPointError(
                f"The gradients of step {self._step} are not finite, although its losses are: training stops and "
                f"saves nothing more. {_sentence(files)}"
            )

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Check that a loss scaler still gets gradients that are finite.

        Raises:
            FloatingPointError: if it has skipped a step at a scale of 1, on all processes.
        """
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None and optimizer.step_was_skipped and scaler.get_scale() < 1:
            raise FloatingPointError(
                f"The gradients of step {self._step} are not finite in float16, even without a loss scale: training "
                f"stops and saves nothing more. {_sentence(gather_object([self._files]))}"
            )

    def on_train_end(self, args, state, control, **kwargs):
        """Leave the model and the data loader as they were."""
        self._stop_watching()

    def _stop_watching(self):
        while self._remove:
            self._remove.pop()()

    def _take_files(self, model: nn.Module, args: tuple, kwargs: dict):
        files = kwargs.pop(_KEY, None)
        if files is not None:
            self._files.append(files)
        return args, kwargs

    def _check_loss(self, model: nn.Module, args: tuple, output):
        loss = output.get("loss") if isinstance(output, Mapping) else output[0]
        if model.training and loss is not None and not loss.isfinite().all():
            raise FloatingPointError(
                f"The loss of step {self._step} is {loss.detach().float().mean().item()}: training stops and saves "
                f"nothing more. {_sentence([self._files[-1:]])}"
            )


@dataclass
class _WithFiles:
    """A collator whose batches say which files they come from; worker processes get it, too."""

    collate: Callable

    def __call__(self, rows: list) -> dict:
        batch = self.collate(rows)
        rows = [row for item in rows for row in (item if isinstance(item, list) else [item])]
        return {**batch, _KEY: list(dict.fromkeys(file for row in rows for file in _files_of(row)))}


def _files_of(row) -> list[str]:
    """The videos and images of a row, or else its name."""
    if not isinstance(row, Mapping):
        return []
    paths = [row.get("video") or [], row.get("image") or []]
    files = [file for some in paths for file in (some if isinstance(some, (list, tuple)) else [some])]
    names = [row[key] for key in ("id", "source") if row.get(key) is not None]
    return [os.fspath(file) if isinstance(file, os.PathLike) else str(file) for file in files or names[:1]]


def _sentence(files_of_processes: list[list[list[str]]]) -> str:
    """Name the files of the batches of each process."""
    files = [", ".join(file for batch in batches for file in batch) for batches in files_of_processes]
    if not any(files):
        return "The files of its batch are unknown."
    if len(files) == 1:
        return f"Its files: {files[0]}."
    return " ".join(f"Files of process {rank}: {names or 'none'}." for rank, names in enumerate(files))


def _gradients_are_finite(model: nn.Module, optimizer, device: torch.device) -> bool:
    """Whether all gradients of all processes are finite; they are summed and clipped already."""
    inner = getattr(optimizer, "optimizer", None)
    if hasattr(inner, "_global_grad_norm"):  # DeepSpeed's, which has made its step or left it out
        # A norm of -1 stands for one that is not finite. Only float16 may leave out a step.
        norm = 0.0 if inner._global_grad_norm is None else float(inner._global_grad_norm)
        return getattr(inner, "dtype", None) == torch.float16 or (not inner.overflow and 0 <= norm < torch.inf)
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    shards = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads]
    shards = [shard for shard in shards if shard.numel()]
    largest = torch.nn.utils.get_total_norm(shards, torch.inf) if shards else torch.zeros(())
    broken = (~largest.isfinite()).to(device, torch.int32)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(broken, torch.distributed.ReduceOp.MAX)
    return not broken.item()
