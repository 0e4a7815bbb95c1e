"""A stop where no batch has an answer to learn from."""

import torch
from torch import nn
from transformers import TrainerCallback

# A folder of videos that is not there breaks every sample; a few broken samples do not fill so many steps.
_MOST_STEPS = 100


class StopWithoutAnswers(TrainerCallback):
    """Stops a training whose batches have no supervised token, as where every sample is broken.

    Give it to any Trainer: `Trainer(..., callbacks=[StopWithoutAnswers(broken_samples)])`. It raises a `ValueError`
    on all processes if their first 100 steps, or all steps of a shorter first epoch or run, have no answer. Without it
    the Trainer goes on, with a loss of 0, and saves the model as it was.

    Args:
        broken_samples ([`BrokenSamples`], *optional*): its summary becomes a part of the message.
    """

    def __init__(self, broken_samples=None):
        self._broken_samples, self._hook = broken_samples, None
        self._answers, self._num_steps, self._is_resumed = False, 0, False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Start to look for labels among the model's inputs."""
        self._stop_looking()
        self._hook = model.register_forward_pre_hook(self._look, with_kwargs=True)
        self._answers, self._num_steps, self._is_resumed = False, 0, state.global_step > 0

    def on_step_end(self, args, state, control, **kwargs):
        """Stop looking at the first answer.

        Raises:
            ValueError: if there is none in 100 steps.
        """
        if self._hook is None:
            return
        self._num_steps += 1
        answers = torch.as_tensor(self._answers).to(args.device, torch.int32)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(answers, torch.distributed.ReduceOp.MAX)
        if answers.item():
            self._stop_looking()
        elif self._num_steps == _MOST_STEPS:
            self._stop()

    def on_epoch_end(self, args, state, control, **kwargs):
        """Judge a short epoch.

        Raises:
            ValueError: if all its steps had no answer; not if it was resumed, perhaps at its last step.
        """
        if self._hook is not None and self._num_steps and not self._is_resumed:
            self._stop()

    def on_train_end(self, args, state, control, **kwargs):
        """Stop looking."""
        self._stop_looking()

    def _look(self, model: nn.Module, args: tuple, kwargs: dict):
        if model.training:
            labels = kwargs.get("labels")
            self._answers = self._answers | (True if labels is None else (labels != -100).any())

    def _stop(self):
        self._stop_looking()
        summary = "" if self._broken_samples is None else f" {self._broken_samples.summary()}"
        raise ValueError(
            f"The samples of the first {self._num_steps} steps have no answer to learn from, so that training stops: "
            f"check the lists, and the folder of their videos.{summary}"
        )

    def _stop_looking(self):
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
