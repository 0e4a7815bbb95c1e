"""A check that a resumed run goes on with the data and the rates of its checkpoint."""

import math

from transformers import TrainerCallback
from transformers.trainer_utils import has_length


class CheckResumedRun(TrainerCallback):
    """Stops a resumed run that would train on other rows, or at other rates, than its options say.

    The Trainer finds the place in the data by counting steps. With another list, batch size, accumulation or number
    of processes, that place is another one: rows are left out, or come twice. It also takes the learning rates and the
    weight decay from the checkpoint, whatever the options say. Give this to any Trainer as one of its callbacks.

    Several processes may become one, or the reverse, as long as a step has as many rows as before.

    Args:
        groups: the groups of parameters given to the optimizer, as from [`parameter_groups`], whose rates and decay
            are checked. Without them only the place in the data is.
        learning_rate: the rate of groups without one of their own.
    """

    def __init__(self, groups: list[dict] | None = None, learning_rate: float | None = None):
        # The optimizer adds to the groups that it is given.
        self._asked = [(group.get("lr", learning_rate), group.get("weight_decay")) for group in groups or []]

    def on_train_begin(self, args, state, control, optimizer=None, train_dataloader=None, **kwargs):
        """Compare the options with the checkpoint.

        Raises:
            ValueError: if they differ. The message names both values.
        """
        if not 0 < state.global_step < state.max_steps:
            return
        if has_length(train_dataloader) and not args.ignore_data_skip:
            _check_place(state, len(train_dataloader), args.gradient_accumulation_steps)
        for (rate, decay), group in zip(self._asked, getattr(optimizer, "param_groups", []), strict=False):
            _check_value("learning rate", rate, group.get("initial_lr"), state.global_step)
            _check_value("weight decay", decay, group.get("weight_decay"), state.global_step)


def _check_place(state, num_batches: int, accumulation: int):
    epochs, steps = divmod(state.global_step, max(math.ceil(num_batches / accumulation), 1))
    expected = epochs + steps * accumulation / max(num_batches, 1)
    if not math.isclose(state.epoch, expected, rel_tol=1e-9):
        raise ValueError(
            f"The checkpoint of step {state.global_step} was saved after {state.epoch:.6g} epochs, but {expected:.6g} "
            f"epochs are as many steps of this run. The list, the batch size, the accumulation or the number of "
            f"processes has changed: restore it, or start a new run from the checkpoint's weights."
        )


def _check_value(name: str, asked: float | None, restored: float | None, step: int):
    if asked is not None and restored is not None and asked != restored:
        raise ValueError(
            f"The checkpoint of step {step} has the {name} {restored}, which would replace the {asked} of this run: "
            f"give the same value, or start a new run from the checkpoint's weights."
        )
