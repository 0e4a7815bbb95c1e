"""Training in which one of two processes meets a number that is not finite; test_finite_training.py starts it.

    torchrun --nproc_per_node=2 broken_training.py FOLDER

Each step has two batches of one row in each process. In step 2, process 1 has the broken number. In a first training
it is a gradient, which stops both processes; in a second one it is a loss.
"""

import os
import sys

import torch
from short_training import rows_about, short_trainer
from tiny import tiny_config, tiny_model
from transformers import TrainerCallback

from transformers_ma2mba import StopAtNonFinite

BROKEN_STEP = 2


class Break(TrainerCallback):
    """Breaks the second batch of one step, in one process."""

    def __init__(self, what: str, process: int):
        self.what, self.process, self.breaks, self.batch = what, process, False, 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.process_index == self.process:
            model.register_forward_hook(self.change_loss)
            model.get_input_embeddings().weight.register_hook(self.change_gradient)

    def on_step_begin(self, args, state, control, **kwargs):
        self.breaks, self.batch = state.global_step + 1 == BROKEN_STEP, 0

    def on_substep_end(self, args, state, control, **kwargs):
        self.batch += 1

    def change_loss(self, model, args, output):
        if self.what == "loss" and self.breaks and self.batch == 1:
            output.loss = output.loss * torch.nan

    def change_gradient(self, gradient):
        return gradient + torch.inf if self.what == "gradients" and self.breaks else gradient


def rows_named(number: int) -> list[dict]:
    """Rows without films; their names tell them apart."""
    return [{**rows_about("")[3], "id": f"name{i}"} for i in range(number)]


def train(what: str, folder: str):
    callbacks = {"callbacks": [Break(what, process=1), StopAtNonFinite()]}
    options = dict(save_strategy="steps", save_steps=1, gradient_accumulation_steps=2)
    short_trainer(folder, rows_named(16), tiny_model(tiny_config()).train(), callbacks, **options).train()


def main(folder: str):
    torch.set_num_threads(1)
    try:
        train("gradients", f"{folder}/gradients")
    except FloatingPointError as error:
        print(f"[{os.environ['RANK']}] {error}", file=sys.stderr, flush=True)
    train("loss", f"{folder}/loss")


if __name__ == "__main__":
    main(*sys.argv[1:])
