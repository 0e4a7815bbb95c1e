"""Train a Ma²mba checkpoint on videos with the stock Trainer.

    accelerate launch examples/train.py --model_name_or_path CHECKPOINT --train_file train.json \
        --validation_file validation.json --output_dir trained --eval_strategy epoch
    accelerate launch examples/train.py recipe.yaml --output_dir trained

Data files are lists in the LLaVA-Video format: rows of `video` (a path, relative to the list's folder) and
`conversations`. All options of `transformers.TrainingArguments` work. A recipe, such as those in `examples/recipes`,
holds options by name; options on the command line override it.

A run that was killed, even while it saved, continues with `--resume_from_checkpoint last`: from the last whole
checkpoint in `--output_dir`, to the same weights. A loss or gradient that is not finite stops the run and names the
films it came from. TensorBoard shows the run: `tensorboard --logdir trained`.

For rows of any length, from clips to films of hours, give `--tokens_per_batch`. With a frozen vision tower,
`--keep_features` encodes each film once. `--lora` trains adapters, and `--load_in_4bit` has the weights under them in
4 bits.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from adapters import AdapterArguments, add_adapters, loading_options
from transformers import (
    AutoModel,
    AutoProcessor,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks, is_tensorboard_available

from transformers_ma2mba import (
    DataCollatorForVideoQA,
    FrozenVisionFeatures,
    StopAtNonFinite,
    TrainingMeter,
    batches_by_tokens,
    last_whole_checkpoint,
    parameter_groups,
)


@dataclass
class Arguments(AdapterArguments):
    """Options beside those of `TrainingArguments`."""

    model_name_or_path: str = field(metadata={"help": "The checkpoint to start from."})
    train_file: str = field(metadata={"help": "A JSON list in the LLaVA-Video format."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, to measure accuracy on."})
    video_folder: str | None = field(
        default=None, metadata={"help": "The folder of relative paths (default: the list's)."}
    )
    keep_frames: bool = field(default=False, metadata={"help": "Keep decoded frames in memory, for small data sets."})
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "Names of modules to freeze, such as `vision_tower`."}
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower (default: learning_rate)."}
    )
    keep_features: str | None = field(
        default=None,
        metadata={"help": "A folder that keeps the frozen vision tower's features of each film, or `memory`."},
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "Train on batches of at most this many tokens, in place of per_device_train_batch_size."},
    )


class EncodeFilms(TrainerCallback):
    """Encodes all films once the model has its final weights, data type and device, before worker processes start."""

    def __init__(self, features: FrozenVisionFeatures, paths: list[str]):
        self.features, self.paths = features, paths

    def on_train_begin(self, args, state, control, **kwargs):
        """Encode the films that are not kept yet."""
        self.features.prepare(self.paths)


def parse_arguments(words: list[str]) -> tuple[Arguments, TrainingArguments]:
    """Parse a command line that may begin with a recipe, a YAML file of options; later options override it.

    Raises:
        ValueError: if the recipe is not a mapping.
    """
    if words and words[0].endswith((".yaml", ".yml")):
        recipe = yaml.safe_load(Path(words[0]).read_text())
        if not isinstance(recipe, dict):
            raise ValueError(f"{words[0]} must hold options as `name: value`, got {recipe!r}.")
        options = [(name, value) for name, value in recipe.items() if value is not None]
        words = [word for name, value in options for word in (f"--{name}", *option_words(value))] + words[1:]
    if not any(word.partition("=")[0] == "--report_to" for word in words):
        words = ["--report_to", default_reporter(), *words]
    return HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses(words)


def default_reporter() -> str:
    """Return TensorBoard where it is installed."""
    if is_tensorboard_available():
        return "tensorboard"
    print("TensorBoard is not installed, so that this run is logged to the terminal and trainer_state.json only.")
    return "none"


def option_words(value) -> list[str]:
    """Return an option's value as words of a command line."""
    if isinstance(value, list):
        return [str(item) for item in value]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]


def load_rows(path: str | None, folder: str | None) -> list[dict] | None:
    """Return the rows of a list, their paths relative to `folder` or else to the list's own folder."""
    if path is None:
        return None
    start = Path(path).parent if folder is None else Path(folder)

    def resolve(paths):
        if isinstance(paths, list):
            return [resolve(path) for path in paths]
        return str(start / paths) if isinstance(paths, str) and "://" not in paths else paths

    rows = json.loads(Path(path).read_text())
    return [{key: resolve(row[key]) if key in ("video", "image") else row[key] for key in row} for row in rows]


def freeze(model, names: list[str]):
    """Freeze the modules of these names.

    Raises:
        ValueError: if there is no module of a name.
    """
    modules = dict(model.named_modules())
    for name in names:
        found = [path for path in modules if name in (path, path.rpartition(".")[2])]
        if not found:
            known = sorted({path.rpartition(".")[2] for path in modules if not path[-1:].isdecimal()} - {""})
            raise ValueError(f"--freeze {name}: the model has no such module; it has {', '.join(known)}.")
        for path in found:
            modules[path].requires_grad_(False)


def grouped_optimizer(model, training_args: TrainingArguments, vision_learning_rate: float | None):
    """Return the optimizer's class and its options, with the model's groups of parameters among them.

    Raises:
        ValueError: if `vision_learning_rate` is given and the optimizer, such as GaLore or LOMO, makes its own groups.
    """
    optimizer, options = Trainer.get_optimizer_cls_and_kwargs(training_args, model)
    if not isinstance(optimizer, type) or {"params", "model", "optimizer_dict"} & options.keys():
        if vision_learning_rate is not None:
            raise ValueError(f"--vision_learning_rate has no effect on --optim {training_args.optim.value}.")
        return optimizer, options
    return optimizer, {**options, "params": parameter_groups(model, training_args.weight_decay, vision_learning_rate)}


def checkpoint_to_resume(training_args: TrainingArguments) -> str | None:
    """Return the checkpoint to go on from; None starts anew."""
    if training_args.resume_from_checkpoint != "last":
        return training_args.resume_from_checkpoint
    checkpoint = last_whole_checkpoint(training_args.output_dir, training_args.world_size)
    if training_args.process_index == 0:
        start = f"goes on from {checkpoint}" if checkpoint else "starts anew, as no checkpoint there is whole"
        print(f"The run in {training_args.output_dir} {start}.", flush=True)
    return checkpoint


def videos_of(rows: list[dict] | None) -> list[str]:
    """Return the paths of all videos of a list."""
    videos = [row.get("video") or [] for row in rows or []]
    return [path for paths in videos for path in (paths if isinstance(paths, list) else [paths])]


def answer_accuracy(prediction) -> dict[str, float]:
    """Return the share of answers whose tokens, with the end token, are all the most likely ones.

    Greedy decoding gets these answers right, given the right answers to earlier questions.
    """
    right = []
    for predicted, labels in zip(prediction.predictions, prediction.label_ids, strict=True):
        # Only supervised tokens are predicted. An answer is a run of them.
        positions = np.flatnonzero(labels[1:] != -100)
        matches = labels[1:][positions] == predicted[: len(positions)]
        answers = np.split(matches, np.flatnonzero(np.diff(positions) > 1) + 1)
        right += [answer.all() for answer in answers]
    return {"accuracy": float(np.mean(right))}


def main():
    args, training_args = parse_arguments(sys.argv[1:])
    training_args.remove_unused_columns = False  # the collator needs the paths
    training_args.dataloader_pin_memory &= not training_args.use_cpu
    set_seed(training_args.seed)

    model = AutoModel.from_pretrained(args.model_name_or_path, **loading_options(args, training_args.device))
    processor = AutoProcessor.from_pretrained(args.model_name_or_path)
    freeze(model, args.freeze)
    model = add_adapters(model, args, args.freeze)

    train_rows, validation_rows = (
        load_rows(path, args.video_folder) for path in (args.train_file, args.validation_file)
    )
    batches, features = train_rows, None
    if args.tokens_per_batch is not None:
        batches = batches_by_tokens(train_rows, processor, args.tokens_per_batch, seed=training_args.seed)
        training_args.per_device_train_batch_size = 1  # each item is a batch already
    if args.keep_features is not None:
        folder = None if args.keep_features == "memory" else args.keep_features
        features = FrozenVisionFeatures(model, processor, folder)

    # The meter's values reach the callbacks after it only, and the Trainer would put its reporters first.
    reporters = [reporter() for reporter in get_reporting_integration_callbacks(training_args.report_to)]
    training_args.report_to = []
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=batches,
        eval_dataset=validation_rows,
        data_collator=DataCollatorForVideoQA(processor, keep_frames=args.keep_frames, vision_features=features),
        processing_class=processor,
        compute_metrics=answer_accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        optimizer_cls_and_kwargs=grouped_optimizer(model, training_args, args.vision_learning_rate),
        callbacks=[StopAtNonFinite(), TrainingMeter(), *reporters],
    )
    if features is not None:
        trainer.add_callback(EncodeFilms(features, videos_of(train_rows) + videos_of(validation_rows)))
    try:
        trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_args))
    except FloatingPointError as error:
        sys.exit(str(error))
    trainer.save_model()
    trainer.save_state()
    if args.validation_file:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
