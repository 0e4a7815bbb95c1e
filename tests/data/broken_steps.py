"""Training and evaluation with broken samples by the stock Trainer, in one process or several.

test_broken_steps.py starts this with torchrun, and calls `train` for the same in one process.
"""

import sys
import warnings
from pathlib import Path

import torch
from tiny import tiny_config, tiny_model, tiny_processor
from transformers import Trainer, TrainingArguments

from transformers_ma2mba import BrokenSamples, DataCollatorForVideoQA

# Each step takes four rows: two processes with two micro-batches, or one process with two that are twice as large.
# 1: a row is broken in one of the processes; 2: all; 3: all of one process.
TRAINED = ["good", "broken", "good", "good", *["broken"] * 4, "broken", "good", "broken", "good"]
EVALUATED = ["good", "broken", "good", "good", "good", "good", "broken", "broken"]


def rows_of(kinds: list[str]) -> list[dict]:
    """Good rows see the film or have only text, and their answers differ in length."""
    rows = []
    for number, kind in enumerate(kinds):
        question = {"from": "human", "value": "Who opens the door?"}
        row = {"id": f"{kind} {number}", "conversations": [question, {"from": "gpt", "value": "red green " * number}]}
        if kind == "broken" or number % 3:
            row |= {"video": f"{kind}.mp4", "start": number / 4}
        rows.append(row)
    return rows


def train(folder: Path, output: Path, micro_batch: int, checkpointed: bool) -> dict:
    """Train three steps and evaluate."""
    config = tiny_config()
    model, processor = tiny_model(config), tiny_processor(config)
    broken_samples = BrokenSamples(output / "broken.jsonl")
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        activation_checkpointing=checkpointed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows_of(TRAINED),
        eval_dataset=rows_of(EVALUATED),
        data_collator=DataCollatorForVideoQA(processor, folder, broken_samples=broken_samples),
        compute_metrics=lambda prediction: {"supervised": int((prediction.label_ids != -100).sum())},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sample ", category=UserWarning)
        trainer.train()
        supervised = trainer.evaluate()["eval_supervised"]
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "supervised": supervised,
        "num_broken": len(broken_samples),
        "rank": arguments.process_index,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, output = map(Path, sys.argv[1:3])
    results = {kind: train(folder, output / kind, 1, kind == "ma-gc") for kind in ("plain", "ma-gc")}
    torch.save(results, output / f"results_{results['plain']['rank']}.pt")
    torch.distributed.destroy_process_group()
