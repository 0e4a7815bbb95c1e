"""Speed, memory and plans in the Trainer's logs, its history and TensorBoard's files."""

import pytest
from short_training import rows_about, short_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_config, tiny_model
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from transformers_ma2mba import TrainingMeter
from transformers_ma2mba.training import training_meter

VALUES = ["tokens_per_second", "frames_per_second", "peak_memory_gib"]


class Clock(TrainerCallback):
    """A clock by which batch and step take a second, and an evaluation or a save takes a hundred."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def on_step_begin(self, args, state, control, **kwargs):
        self.now += 1

    def on_evaluate(self, args, state, control, **kwargs):
        self.now += 100

    on_save = on_evaluate


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(training_meter, "perf_counter", clock)
    return clock


def test_speeds_leave_out_padding_and_pauses(tmp_path, film, clock):
    rows = [rows_about(film)[:2], rows_about(film)[2:], rows_about(film)[3:], rows_about(film)[:1]]
    callbacks = [clock, TrainingMeter()]
    options = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=2, save_total_limit=1)
    arguments = {"callbacks": callbacks, "eval_dataset": rows[:1]}
    trainer = short_trainer(tmp_path, rows, None, arguments, logging_steps=2, **options)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    tokens = [int(trainer.data_collator([batch])["attention_mask"].sum()) for batch in rows]
    assert tokens[0] < trainer.data_collator(rows[:1])["attention_mask"].numel()
    assert [entry["tokens_per_second"] for entry in logged] == [sum(tokens[:2]) / 2, sum(tokens[2:]) / 2]
    assert [entry["frames_per_second"] for entry in logged] == [(6 + 6 + 6) / 2, 6 / 2]
    assert all(0.1 < entry["peak_memory_gib"] < 100 for entry in logged)
    assert not trainer.model._forward_pre_hooks


def test_a_larger_batch_has_its_plan_logged(tmp_path):
    row = rows_about("")[3]
    rows = [row, [row, row], row, [row, row, row]]
    options = dict(activation_checkpointing=True)
    trainer = short_trainer(tmp_path, rows, None, {"callbacks": [TrainingMeter()]}, **options)
    trainer.train()
    logged = [entry.get("plan") for entry in trainer.state.log_history if "loss" in entry]
    assert logged[2] is None
    length = trainer.data_collator([row])["input_ids"].shape[1]
    for plan, batch_size in ((logged[0], 1), (logged[1], 2), (logged[3], 3)):
        assert plan.startswith(f"```\nMA-GC plan for {batch_size} x {length} tokens, 2 layers\n")


def test_tensorboard_has_all_values(tmp_path, film):
    model = tiny_model(tiny_config()).train()
    callbacks = [TrainingMeter(), TensorBoardCallback()]
    arguments = {"callbacks": callbacks, "eval_dataset": rows_about(film)[:1]}
    arguments["compute_metrics"] = lambda prediction: {"accuracy": 0.5}
    options = dict(activation_checkpointing=True, eval_strategy="steps", eval_steps=4)
    trainer = short_trainer(tmp_path, rows_about(film), model, arguments, **options)
    trainer.train()
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ["loss", "learning_rate", *VALUES]:
        scalars = events.Scalars(f"train/{name}")
        assert [(scalar.step, scalar.value) for scalar in scalars] == [
            (entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in history
        ]
    assert [scalar.value for scalar in events.Scalars("eval/accuracy")] == [0.5]
    (tag,) = [tag for tag in events.Tags()["tensors"] if "plan" in tag]
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
    assert texts == [entry["plan"] for entry in history if "plan" in entry] and texts
