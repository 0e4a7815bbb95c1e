"""Trains a Ma²mba checkpoint on videos with the stock Trainer.

    accelerate launch examples/train.py --model_name_or_path CHECKPOINT --train_file train.json \
        --validation_file validation.json --output_dir trained --eval_strategy epoch

Files are lists in the LLaVA-Video format: rows of `video` (a path, from the list's folder on) and `conversations`.
All options of `transformers.TrainingArguments` work; `--resume_from_checkpoint last` goes on where the run in
`--output_dir` was stopped, and a path goes on from there.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import AutoModel, AutoProcessor, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from transformers_ma2mba import DataCollatorForVideoQA


@dataclass
class Arguments:
    model_name_or_path: str = field(metadata={"help": "The checkpoint to start from."})
    train_file: str = field(metadata={"help": "A JSON list in the LLaVA-Video format."})
    validation_file: str | None = field(default=None, metadata={"help": "Another, to measure accuracy on."})
    video_folder: str | None = field(default=None, metadata={"help": "Where video paths start; the list's folder."})
    keep_frames: bool = field(default=False, metadata={"help": "Keep decoded frames in memory; for small data sets."})
    freeze: list[str] = field(default_factory=list, metadata={"help": "Modules to freeze, `vision_tower` for one."})


def load_rows(path: str | None, folder: str | None) -> list[dict] | None:
    """The rows of a list, with paths that start from `folder` or from where the list is."""
    if path is None:
        return None
    start = Path(path).parent if folder is None else Path(folder)

    def whole(paths):
        if isinstance(paths, list):
            return [whole(path) for path in paths]
        return paths if "://" in paths else str(start / paths)

    rows = json.loads(Path(path).read_text())
    return [{key: whole(row[key]) if key in ("video", "image") else row[key] for key in row} for row in rows]


def answer_accuracy(prediction) -> dict[str, float]:
    """The share of answers whose tokens are all the most likely ones, their end included: those that greedy decoding
    gets right, given the right answers to earlier questions."""
    right = []
    for predicted, labels in zip(prediction.predictions, prediction.label_ids, strict=True):
        # Predictions are of supervised tokens alone; answers are runs of them.
        positions = np.flatnonzero(labels[1:] != -100)
        matches = labels[1:][positions] == predicted[: len(positions)]
        answers = np.split(matches, np.flatnonzero(np.diff(positions) > 1) + 1)
        right += [answer.all() for answer in answers]
    return {"accuracy": float(np.mean(right))}


def main():
    args, training_args = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    training_args.remove_unused_columns = False  # the collator needs the paths
    training_args.dataloader_pin_memory &= not training_args.use_cpu
    set_seed(training_args.seed)

    model = AutoModel.from_pretrained(args.model_name_or_path)
    processor = AutoProcessor.from_pretrained(args.model_name_or_path)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in args.freeze:
            module.requires_grad_(False)

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=load_rows(args.train_file, args.video_folder),
        eval_dataset=load_rows(args.validation_file, args.video_folder),
        data_collator=DataCollatorForVideoQA(processor, keep_frames=args.keep_frames),
        processing_class=processor,
        compute_metrics=answer_accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint == "last":
        checkpoint = get_last_checkpoint(training_args.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    if args.validation_file:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
