"""A few steps of the stock Trainer on one short film, for the tests of what is added to it."""

from tiny import tiny_config, tiny_model, tiny_processor
from transformers import Trainer, TrainingArguments

from transformers_ma2mba import DataCollatorForVideoQA

ANSWERS = ("red", "green", "blue", "yellow")


def rows_about(film) -> list[dict]:
    """Four rows of different lengths about a film, the last one without it."""
    question, rows = "Which colour is it?", []
    for number, answer in enumerate(ANSWERS):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}] * (number + 1)
        rows.append({"id": f"row {number}", "video": str(film), "conversations": turns})
    del rows[-1]["video"]
    return rows


def short_trainer(output_dir, rows, model=None, trainer_options=None, **options) -> Trainer:
    """A Trainer for four steps of one row each, in order, with plain gradient descent.

    Args:
        output_dir: its folder.
        rows: rows for the collator.
        model: a tiny model unless given.
        trainer_options: arguments of the Trainer.
        options: arguments of `TrainingArguments`.
    """
    processor = tiny_processor(tiny_config())
    defaults = dict(max_steps=4, per_device_train_batch_size=1, learning_rate=0.1, optim="sgd", logging_steps=1)
    defaults |= dict(save_strategy="no", train_sampling_strategy="sequential", use_cpu=True, disable_tqdm=True)
    defaults |= dict(remove_unused_columns=False, dataloader_pin_memory=False, report_to="none")
    return Trainer(
        model=tiny_model(tiny_config()).train() if model is None else model,
        args=TrainingArguments(str(output_dir), **{**defaults, **options}),
        train_dataset=rows,
        data_collator=DataCollatorForVideoQA(processor, keep_frames=True),
        processing_class=processor,
        **(trainer_options or {}),
    )
