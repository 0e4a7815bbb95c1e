"""Training that has nothing to learn from."""

import pytest
from short_training import rows_about, short_trainer

from transformers_ma2mba import BrokenSamples, StopWithoutAnswers
from transformers_ma2mba.training import answered_training


def trainer_on(rows, output_dir, **options):
    broken = BrokenSamples()
    trainer = short_trainer(output_dir, rows, None, {"callbacks": [StopWithoutAnswers(broken)]}, **options)
    trainer.data_collator.broken_samples = broken
    return trainer


@pytest.mark.parametrize("options", [{}, {"max_steps": -1, "num_train_epochs": 2}, {"max_steps": 1}])
@pytest.mark.filterwarnings("ignore:Sample .* is left out")
def test_a_wrong_folder_stops_training(options, tmp_path):
    trainer = trainer_on(rows_about("nowhere.mp4")[:2], tmp_path, **options)
    with pytest.raises(ValueError, match=r"(?s)have no answer to learn from.*row 0: There is no file .*nowhere.mp4"):
        trainer.train()
    assert trainer.state.global_step <= 2 and not trainer.model._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:Sample .* is left out")
def test_many_steps_without_an_answer_stop_an_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(answered_training, "_MOST_STEPS", 3)
    broken, (*_, good) = rows_about("nowhere.mp4")[:3], rows_about("")
    with pytest.raises(ValueError, match="first 3 steps"):
        trainer_on([*broken, good], tmp_path).train()
    trainer = trainer_on([*broken[:2], good, broken[2]], tmp_path)
    trainer.train()
    assert trainer.state.global_step == 4 and not trainer.model._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:Sample .* is left out")
def test_a_run_that_is_resumed_may_end_on_a_broken_sample(tmp_path):
    broken, (*_, good) = rows_about("nowhere.mp4")[:1], rows_about("")
    rows = [good, good, good, *broken]
    trainer_on(rows, tmp_path, save_strategy="steps", save_steps=3).train()
    trainer = trainer_on(rows, tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.state.global_step == 4
