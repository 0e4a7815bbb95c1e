"""A loss or a gradient that is not finite stops training, and names its files."""

import os
import re
import subprocess
import sys

import broken_training
import pytest
import torch
from broken_training import Break, rows_named
from short_training import rows_about, short_trainer
from tiny import ROOT, tiny_config, tiny_model
from transformers import TrainerCallback

from transformers_ma2mba import StopAtNonFinite


def break_training(tmp_path, what, rows, model=None, **options):
    """Train until the second of two batches of step 2 breaks, and return the error."""
    callbacks = {"callbacks": [Break(what, process=0), StopAtNonFinite()]}
    options = dict(save_strategy="steps", save_steps=1, gradient_accumulation_steps=2, max_steps=3) | options
    trainer = short_trainer(tmp_path, rows, model, callbacks, **options)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    return str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loss_names_the_step_and_the_files_of_its_batch(tmp_path, film, workers):
    rows = rows_about(film)
    rows[3]["image"] = ["a.png", "b.png"]  # the batch that breaks; it is decoded by nobody

    def collate(rows):
        return trainer_collate([{**row, "image": None} for row in rows])

    callbacks = {"callbacks": [Break("loss", process=0), StopAtNonFinite()]}
    options = dict(gradient_accumulation_steps=2, max_steps=2, dataloader_num_workers=workers)
    trainer = short_trainer(tmp_path, rows, None, callbacks, **options)
    trainer_collate, trainer.data_collator = trainer.data_collator, collate
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert str(error.value) == (
        "The loss of step 2 is nan: training stops and saves nothing more. Its files: a.png, b.png."
    )


def test_gradients_name_the_files_of_all_batches_of_the_step(tmp_path):
    message = break_training(tmp_path, "gradients", rows_named(8))
    assert message == (
        "The gradients of step 2 are not finite, although its losses are: training stops and saves nothing more. "
        "Its files: name2, name3."
    )


def test_a_batch_is_a_list_of_rows(tmp_path):
    rows = [rows_named(8)[i : i + 2] for i in (0, 2, 4, 6)]
    assert break_training(tmp_path, "loss", rows).endswith("Its files: name6, name7.")


def test_weights_do_not_get_the_gradients(tmp_path):
    model = tiny_model(tiny_config()).train()
    break_training(tmp_path, "gradients", rows_named(8), model, max_grad_norm=0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_finite_training_stays_the_same(tmp_path, film):
    """Losses, the collator and the model's inputs are those of a Trainer without the callback."""
    runs = {}
    for name, callbacks in (("plain", []), ("watched", [StopAtNonFinite()])):
        options = {"callbacks": callbacks, "eval_dataset": rows_about(film)}
        trainer = short_trainer(tmp_path, rows_about(film), None, options, eval_strategy="epoch")
        trainer.train()
        assert not trainer.model._forward_pre_hooks and not trainer.model._forward_hooks
        runs[name] = [
            entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry
        ]
    assert runs["plain"] == runs["watched"] and len(runs["plain"]) == 5


class Scaled(TrainerCallback):
    """Makes the first steps' gradients too large, as a loss scaler may, and tells whether a step followed."""

    def __init__(self, num_broken=1):
        self.num_broken, self.skipped = num_broken, []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        optimizer.__setstate__(optimizer.__getstate__())  # as at its creation with a scaler
        model.get_input_embeddings().weight.register_hook(
            lambda g: g + torch.inf if state.global_step < self.num_broken else g
        )

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        optimizer.scaler.scale(torch.ones(()))  # a scaler makes no step before its first loss

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.skipped.append(optimizer.step_was_skipped)


def test_a_step_that_a_loss_scaler_skips_is_no_error(tmp_path):
    scaled = Scaled()
    short_trainer(tmp_path, rows_named(2), None, {"callbacks": [scaled, StopAtNonFinite()]}, max_steps=2).train()
    assert scaled.skipped == [True, False]


def test_steps_that_a_loss_scaler_skips_at_any_scale_are_an_error(tmp_path):
    """Its scale goes from 2 over 1 to 0.5; the run would end without a step."""
    scaled = Scaled(num_broken=4)
    trainer = short_trainer(tmp_path, rows_named(4), None, {"callbacks": [scaled, StopAtNonFinite()]}, max_steps=4)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert scaled.skipped == [True, True]
    assert str(error.value) == (
        "The gradients of step 2 are not finite in float16, even without a loss scale: training stops and saves "
        "nothing more. Its files: name1."
    )


def test_a_data_loader_of_another_kind(tmp_path):
    """It has no collator to name the files of its batches."""
    trainer = short_trainer(tmp_path, rows_named(2), None, {"callbacks": [StopAtNonFinite()]}, max_steps=2)

    class Loader(list):
        """Batches that are made already."""

    loader = Loader(trainer.data_collator([row]) for row in rows_named(2))
    trainer.get_train_dataloader = lambda: loader
    trainer.train()
    assert trainer.state.global_step == 2
    trainer.model.get_input_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="step 1 is nan.* The files of its batch are unknown"):
        trainer.train()


def test_two_processes(tmp_path):
    """Process 0 has rows 0, 2, ... and process 1 has rows 1, 3, ...; each step takes two of each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=localhost:0", broken_training.__file__, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode != 0  # process 0 waits for process 1, until the launcher ends it
    for rank in (0, 1):
        assert (
            f"[{rank}] The gradients of step 2 are not finite, although its losses are: training stops and saves "
            f"nothing more. Files of process 0: name4, name6. Files of process 1: name5, name7."
        ) in run.stderr
    errors = re.findall(r"^\[rank.\]: FloatingPointError: (.*)", run.stderr, re.MULTILINE)
    assert errors == ["The loss of step 2 is nan: training stops and saves nothing more. Its files: name7."]
    for what in ("gradients", "loss"):
        assert [path.name for path in (tmp_path / what).glob("checkpoint-*")] == ["checkpoint-1"]
