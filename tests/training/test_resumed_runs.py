"""A resumed run has the data and the rates of its checkpoint, or stops."""

import pytest
import torch
from short_training import rows_about, short_trainer
from tiny import tiny_config, tiny_model

from transformers_ma2mba import CheckResumedRun, parameter_groups

NUM_ROWS = 6


def train(folder, checkpoint=None, num_rows=NUM_ROWS, rates=(0.1, 0.01), decay=0.0, **options):
    """Train on short rows, and resume if there is a checkpoint."""
    model = tiny_model(tiny_config()).train()
    groups = parameter_groups(model, decay, vision_learning_rate=rates[1])
    check = CheckResumedRun(groups, learning_rate=rates[0])
    arguments = {
        "callbacks": [check],
        "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": rates[0], "params": groups}),
    }
    options = dict(max_steps=-1, num_train_epochs=2, save_strategy="steps", save_steps=1) | options
    trainer = short_trainer(folder, [rows_about("")[3]] * num_rows, model, arguments, **options)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints of all of its six steps of two batches of one row."""
    path = tmp_path_factory.mktemp("run")
    train(path, gradient_accumulation_steps=2)
    return path


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (2, dict(num_rows=NUM_ROWS + 2)),
        (3, dict(num_rows=NUM_ROWS + 2)),
        (2, dict(gradient_accumulation_steps=1)),
        (2, dict(per_device_train_batch_size=2)),
    ],
)
def test_another_place_in_the_data_is_an_error(run, tmp_path, step, options):
    options = {"gradient_accumulation_steps": 2, **options}
    with pytest.raises(ValueError, match=f"The checkpoint of step {step} was saved after .* epochs, but .* processes"):
        train(tmp_path, run / f"checkpoint-{step}", **options)
    train(tmp_path, run / f"checkpoint-{step}", ignore_data_skip=True, **options)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_the_same_rows_in_a_step_are_no_error(run, tmp_path, step):
    """Two batches of a row are a batch of two, as are the batches of two processes."""
    trainer = train(tmp_path, run / f"checkpoint-{step}", per_device_train_batch_size=2)
    assert trainer.state.global_step == 6 and trainer.state.epoch == 2
    train(tmp_path, run / f"checkpoint-{step}", gradient_accumulation_steps=2, num_train_epochs=3)


def test_a_last_step_with_fewer_batches_is_no_error(tmp_path):
    train(tmp_path, num_rows=5, gradient_accumulation_steps=2)
    for step in range(1, 7):
        train(tmp_path / "resumed", tmp_path / f"checkpoint-{step}", num_rows=5, gradient_accumulation_steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rates=(0.2, 0.01)), "learning rate 0.1, which would replace the 0.2 of this run"),
        (dict(rates=(0.1, 0.02)), "learning rate 0.01, which would replace the 0.02 of this run"),
        (dict(decay=0.3), "weight decay 0.0, which would replace the 0.3 of this run"),
    ],
)
def test_rates_that_the_checkpoint_would_replace_are_errors(run, tmp_path, options, message):
    with pytest.raises(ValueError, match=f"The checkpoint of step 2 has the {message}"):
        train(tmp_path, run / "checkpoint-2", gradient_accumulation_steps=2, **options)
