"""Train a Ma²mba checkpoint on videos with the stock Trainer.

    accelerate launch examples/train.py --model_name_or_path CHECKPOINT --train_file train.json \
        --validation_file validation.json --output_dir trained --eval_strategy epoch
    accelerate launch examples/train.py recipe.yaml --output_dir trained

`--train_file` takes lists in any format of `transformers_ma2mba.load_rows`: JSON, JSON Lines or Parquet files, folders
and patterns. Questions about one video are joined to one row, unless `--no_group` is given. A sample that cannot be
read is left out and named at the end; `--strict` stops instead. `--streaming` reads the lists during training.

All options of `transformers.TrainingArguments` work. A recipe, such as those in `examples/recipes`, holds options by
name; options on the command line override it.

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
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks, is_tensorboard_available

from transformers_ma2mba import (
    BrokenSamples,
    CheckResumedRun,
    DataCollatorForVideoQA,
    FrozenVisionFeatures,
    StopAtNonFinite,
    StopWithoutAnswers,
    TrainingMeter,
    batches_by_tokens,
    last_whole_checkpoint,
    load_rows,
    parameter_groups,
)


@dataclass
class Arguments(AdapterArguments):
    """Options beside those of `TrainingArguments`."""

    model_name_or_path: str = field(metadata={"help": "The checkpoint to start from."})
    train_file: list[str] = field(metadata={"help": "Lists of training data: files, folders or patterns."})
    validation_file: list[str] | None = field(default=None, metadata={"help": "Lists to measure accuracy on."})
    video_folder: str | None = field(
        default=None, metadata={"help": "The folder of relative paths (default: the list's, or its parent)."}
    )
    no_group: bool = field(default=False, metadata={"help": "Keep questions about one video in rows of their own."})
    interleave: bool = field(
        default=False, metadata={"help": "Join a video's segments to one row, each before its caption."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the lists during training; needs --max_steps."})
    strict: bool = field(default=False, metadata={"help": "Stop at a sample that cannot be read."})
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
    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows of a step on all processes: sets gradient_accumulation_steps. 0 does not."},
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "Train on batches of at most this many tokens, in place of per_device_train_batch_size."},
    )


class EncodeFilms(TrainerCallback):
    """Encodes all films once the model has its final weights, data type and device, before worker processes start."""

    def __init__(self, features: FrozenVisionFeatures, rows: list[dict], broken: BrokenSamples):
        self.features, self.rows, self.broken = features, rows, broken

    def on_train_begin(self, args, state, control, **kwargs):
        """Encode the films that are not kept yet."""
        self.features.prepare(self.rows, broken_samples=self.broken)


def parse_arguments(words: list[str]) -> tuple[Arguments, TrainingArguments]:
    """Parse a command line that may begin with a recipe, a YAML file of options; later options override it.

    Raises:
        ValueError: if the recipe is not a mapping, or the global batch is impossible.
    """
    if words and words[0].endswith((".yaml", ".yml")):
        recipe = yaml.safe_load(Path(words[0]).read_text())
        if not isinstance(recipe, dict):
            raise ValueError(f"{words[0]} must hold options as `name: value`, got {recipe!r}.")
        options = [(name, value) for name, value in recipe.items() if value is not None]
        words = [word for name, value in options for word in (f"--{name}", *option_words(value))] + words[1:]
    if not any(word.partition("=")[0] == "--report_to" for word in words):
        words = ["--report_to", default_reporter(), *words]
    parser = HfArgumentParser((Arguments, TrainingArguments))
    args, training_args = parser.parse_args_into_dataclasses(words)
    if args.global_batch_size:
        # DeepSpeed's configuration takes the number from the command line.
        words = [*words, f"--gradient_accumulation_steps={accumulation_steps(args, training_args)}"]
        args, training_args = parser.parse_args_into_dataclasses(words)
    return args, training_args


def accumulation_steps(args: Arguments, training_args: TrainingArguments) -> int:
    """Return the accumulation steps that give the global batch on this number of processes.

    Raises:
        ValueError: if no number of steps does, another one is given, or `--tokens_per_batch`, whose batches have no
            fixed number of rows.
    """
    if args.tokens_per_batch is not None:
        raise ValueError("--tokens_per_batch has no fixed number of rows: give --global_batch_size 0 with it.")
    rows = training_args.train_batch_size * training_args.world_size
    steps, rest = divmod(args.global_batch_size, rows)
    if rest or steps < 1:
        raise ValueError(
            f"--global_batch_size {args.global_batch_size} must be a multiple of {rows} rows: "
            f"{training_args.train_batch_size} on each of {training_args.world_size} processes. Set "
            f"--per_device_train_batch_size."
        )
    if training_args.gradient_accumulation_steps not in (1, steps):
        raise ValueError(
            f"--gradient_accumulation_steps {training_args.gradient_accumulation_steps} contradicts "
            f"--global_batch_size {args.global_batch_size}, which needs {steps}: give --global_batch_size 0 with it."
        )
    return steps


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


def check_streaming(args: Arguments, training_args: TrainingArguments):
    """Prepare the arguments for rows that are read during training.

    Raises:
        ValueError: if another option needs all rows, or the number of steps is missing.
    """
    if not args.streaming:
        return
    for name in ("tokens_per_batch", "keep_features"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} needs all rows before training: leave out --streaming.")
    if training_args.max_steps <= 0:
        raise ValueError("--streaming needs --max_steps, because the number of rows is unknown.")
    # Each process reads its own rows, and their batches as they are; Accelerate would cut those of one process.
    training_args.accelerator_config.dispatch_batches = False
    training_args.accelerator_config.split_batches = False


def training_rows(args: Arguments, training_args: TrainingArguments, broken: BrokenSamples):
    """Return the rows to train on."""
    options = dict(folder=args.video_folder, group=not args.no_group, interleave=args.interleave, broken=broken)
    if not args.streaming:
        with training_args.main_process_first(desc="reading the lists"):
            return load_rows(args.train_file, **options)
    # The lists may give the processes different numbers of rows. None of them may come to an end before the others.
    rows = load_rows(args.train_file, streaming=True, **options).repeat(None)
    return rows.shuffle(seed=training_args.seed, buffer_size=1000)


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


def checkpoint_step(folder: Path) -> int:
    """Return the step of a checkpoint by its name; -1 if it has another name."""
    step = folder.name.removeprefix("checkpoint-")
    return int(step) if step.isdecimal() else -1


def is_finished(checkpoint: str | None, training_args: TrainingArguments) -> bool:
    """Whether a checkpoint is of the last step of the run."""
    if checkpoint is None:
        return False
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    if training_args.max_steps > 0:
        return state.global_step >= training_args.max_steps
    return state.epoch >= training_args.num_train_epochs


def check_output_folder(training_args: TrainingArguments):
    """Make sure that the output folder has no checkpoint of another run that this one would be mixed up with.

    Raises:
        ValueError: if it has checkpoints, and none is to be resumed, or one of earlier steps.
    """
    resumed = training_args.resume_from_checkpoint
    first = checkpoint_step(Path(resumed)) if resumed else -1
    others = [path for path in Path(training_args.output_dir).glob("checkpoint-*") if checkpoint_step(path) > first]
    if others:
        raise ValueError(
            f"{max(others, key=checkpoint_step)} is of an earlier run, and would be taken for this one's: go on with "
            f"that run by --resume_from_checkpoint last, give another --output_dir, or remove the checkpoint."
        )


def checkpoint_to_resume(training_args: TrainingArguments) -> str | None:
    """Return the checkpoint to go on from; None starts anew."""
    if training_args.resume_from_checkpoint != "last":
        check_output_folder(training_args)
        return training_args.resume_from_checkpoint
    checkpoint = last_whole_checkpoint(training_args.output_dir, training_args.world_size)
    if training_args.process_index == 0:
        start = f"goes on from {checkpoint}" if checkpoint else "starts anew, as no checkpoint there is whole"
        print(f"The run in {training_args.output_dir} {start}.", flush=True)
    return checkpoint


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
        right += [answer.all() for answer in answers if len(answer)]  # a broken sample has none
    return {"accuracy": float(np.mean(right)) if right else 0.0}


def main():
    args, training_args = parse_arguments(sys.argv[1:])
    training_args.remove_unused_columns = False  # the collator needs the paths
    training_args.dataloader_pin_memory &= not training_args.use_cpu
    check_streaming(args, training_args)
    checkpoint = checkpoint_to_resume(training_args)
    set_seed(training_args.seed)

    model = AutoModel.from_pretrained(args.model_name_or_path, **loading_options(args, training_args.device))
    processor = AutoProcessor.from_pretrained(args.model_name_or_path)
    freeze(model, args.freeze)
    model = add_adapters(model, args, args.freeze)

    broken = BrokenSamples(Path(training_args.output_dir) / "broken_samples.jsonl", args.strict)
    rows, validation_rows, features = training_rows(args, training_args, broken), None, None
    if args.validation_file:
        validation_rows = load_rows(args.validation_file, args.video_folder, broken=broken)
    batches = rows
    if args.tokens_per_batch is not None:
        batches = batches_by_tokens(
            rows, processor, args.tokens_per_batch, seed=training_args.seed, broken_samples=broken
        )
        training_args.per_device_train_batch_size = 1  # each item is a batch already
    if is_finished(checkpoint, training_args):
        # The Trainer would make one more step within an epoch, and makes none of no epochs.
        batches, training_args.max_steps, training_args.num_train_epochs = [{}], -1, 0
    if args.keep_features is not None:
        folder = None if args.keep_features == "memory" else args.keep_features
        features = FrozenVisionFeatures(model, processor, folder)

    optimizer, options = grouped_optimizer(model, training_args, args.vision_learning_rate)
    groups = options["params"] if isinstance(options.get("params"), list) else None
    # The meter's values reach the callbacks after it only, and the Trainer would put its reporters first.
    reporters = [reporter() for reporter in get_reporting_integration_callbacks(training_args.report_to)]
    training_args.report_to = []
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=batches,
        eval_dataset=validation_rows,
        data_collator=DataCollatorForVideoQA(
            processor, keep_frames=args.keep_frames, vision_features=features, broken_samples=broken
        ),
        processing_class=processor,
        compute_metrics=answer_accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        optimizer_cls_and_kwargs=(optimizer, options),
        callbacks=[
            CheckResumedRun(groups, options.get("lr")),
            StopAtNonFinite(),
            StopWithoutAnswers(broken),
            TrainingMeter(),
            *reporters,
        ],
    )
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and "optimizer" in plugin.deepspeed_config:
        raise ValueError(
            "DeepSpeed's configuration has an `optimizer`, which would replace that of the options: remove it."
        )
    if features is not None:
        trainer.add_callback(EncodeFilms(features, [*rows, *(validation_rows or [])], broken))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except FloatingPointError as error:
        sys.exit(str(error))
    trainer.save_model()
    trainer.save_state()
    if args.validation_file:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training_args.process_index == 0:
        print(broken.summary())


if __name__ == "__main__":
    main()
