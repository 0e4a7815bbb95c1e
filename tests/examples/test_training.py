"""examples/train.py with the stock Trainer, through `accelerate launch` and by itself, on films of make_videos.py."""

import json
import os
import re
import shutil
import subprocess
import sys

import make_tiny_model
import numpy as np
import pytest
import torch
import train
from safetensors.torch import load_file
from tiny import EXAMPLES, ROOT, tiny_config, tiny_model
from torch.testing import assert_close
from transformers import AutoModel, AutoProcessor, TrainerCallback, pipeline

from transformers_ma2mba import FrozenVisionFeatures

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}


def run(*command) -> subprocess.CompletedProcess:
    """Run Python with a command in a process of its own."""
    command = [sys.executable, *map(str, command)]
    finished = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-5000:]
    assert "deprecated" not in finished.stderr.lower(), finished.stderr
    assert "DeprecationWarning" not in finished.stderr and "FutureWarning" not in finished.stderr
    return finished


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Twelve films of 8 seconds to train on, six to validate with, and an untrained model."""
    path = tmp_path_factory.mktemp("demo")
    options = dict(num_train=12, num_train_minutes=1, num_train_hours=4, num_validation=6, num_long=1, num_hours=1)
    options |= dict(min_seconds=8, max_seconds=8, max_hours_seconds=90)
    run(EXAMPLES / "make_videos.py", "--output_dir", path, *(f"--{name}={value}" for name, value in options.items()))
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--train_file", f"{path}/train.json", "--output_dir", f"{path}/untrained"]
        patch.setattr(sys, "argv", ["make_tiny_model.py", *arguments])
        make_tiny_model.main()
    return path


def arguments(demo, output_dir, **options) -> list[str]:
    """Return options for four steps of four films each.

    The optimizer is plain gradient descent, because Adam magnifies the smallest difference in rounding.
    """
    options = {
        "model_name_or_path": demo / "untrained",
        "train_file": demo / "train.json",
        "validation_file": demo / "validation.json",
        "output_dir": output_dir,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "optim": "sgd",
        "learning_rate": 0.05,
        "report_to": "none",
        "use_cpu": True,
        **options,
    }
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.fixture(scope="module")
def launched(demo):
    """A checkpoint that one process has trained."""
    launch = ["-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--cpu"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", EXAMPLES / "train.py"]
    run(*launch, *arguments(demo, demo / "launched"))
    return demo / "launched"


def train_here(patch, *arguments):
    """Train in this process, where a deprecation is an error, with one thread, as a launched process has."""
    patch.setattr(sys, "argv", ["train.py", *arguments])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train.main()
    finally:
        torch.set_num_threads(threads)


def logged(folder, name) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [float(entry[name]) for entry in history if name in entry]


def test_one_process_logs_loss_and_accuracy(demo, launched):
    losses = logged(launched, "loss")
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.3
    assert len(logged(launched, "eval_loss")) >= 1
    assert (
        logged(launched, "eval_accuracy")[-1]
        == json.loads((launched / "eval_results.json").read_text())["eval_accuracy"]
    )
    before, after = load_file(demo / "untrained" / "model.safetensors"), load_file(launched / "model.safetensors")
    assert before.keys() == after.keys()
    trained = {name for name in before if not torch.equal(before[name], after[name])}
    parts = {"model.vision_tower", "model.multi_modal_projector", "model.language_model"}
    assert {".".join(name.split(".")[:2]) for name in trained} == parts


def test_pipeline_loads_the_trained_checkpoint(demo, launched):
    row = json.loads((demo / "validation.json").read_text())[0]
    qa = pipeline("video-question-answering", model=str(launched))
    ranked = qa(video=str(demo / row["video"]), question=row["conversations"][2]["value"], candidates=["red", "blue"])
    assert sum(entry["score"] for entry in ranked) == pytest.approx(1)


def test_resumed_run_with_kept_frames_gives_the_same_weights(demo, launched, monkeypatch):
    shutil.copytree(launched / "checkpoint-2", demo / "resumed" / "checkpoint-2")
    options = {"resume_from_checkpoint": "last", "keep_frames": True}
    train_here(monkeypatch, *arguments(demo, demo / "resumed", **options))
    assert logged(demo / "resumed", "loss") == logged(launched, "loss")
    resumed, expected = (load_file(folder / "model.safetensors") for folder in (demo / "resumed", launched))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_finished_run_is_not_trained_further(demo, launched, monkeypatch):
    """Its last step is within an epoch. A run that is killed in its final save goes on from here."""
    shutil.copytree(launched / "checkpoint-4", demo / "finished" / "checkpoint-4")
    options = {"resume_from_checkpoint": "last", "lr_scheduler_type": "constant"}
    train_here(monkeypatch, *arguments(demo, demo / "finished", **options))
    assert json.loads((demo / "finished" / "trainer_state.json").read_text())["global_step"] == 4
    resumed, expected = (load_file(folder / "model.safetensors") for folder in (demo / "finished", launched))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert logged(demo / "finished", "eval_accuracy")[-1] == logged(launched, "eval_accuracy")[-1]


def test_runs_are_not_mixed(demo, launched, monkeypatch):
    """`last` would take the newest checkpoint of the other run."""
    before = sorted(launched.rglob("*"))
    for options in ({}, {"resume_from_checkpoint": launched / "checkpoint-2"}):
        with pytest.raises(ValueError, match="checkpoint-4 is of an earlier run, and would be taken for this one's"):
            train_here(monkeypatch, *arguments(demo, launched, **options))
    assert sorted(launched.rglob("*")) == before


def test_a_resumed_run_has_the_options_of_its_checkpoint(demo, launched, monkeypatch):
    shutil.copytree(launched / "checkpoint-2", demo / "changed" / "checkpoint-2")
    for name, value, message in (
        ("per_device_train_batch_size", 2, "saved after 0.666667 epochs, but 0.333333 epochs"),
        ("learning_rate", 0.5, "learning rate 0.05, which would replace the 0.5 of this run"),
    ):
        options = {"resume_from_checkpoint": "last", name: value}
        with pytest.raises(ValueError, match=message):
            train_here(monkeypatch, *arguments(demo, demo / "changed", **options))


def test_two_processes_give_the_loss_and_weights_of_one(demo, launched):
    """Both runs have the same films in a step; losses and weights differ by rounding only."""
    # `accelerate launch --cpu` always starts one process. With --multi_gpu it starts two, which find no GPU and use
    # gloo.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", EXAMPLES / "train.py"]
    run(*launch, *arguments(demo, demo / "two", per_device_train_batch_size=2))
    assert logged(demo / "two", "loss") == pytest.approx(logged(launched, "loss"), abs=1e-4)
    assert logged(demo / "two", "eval_loss") == pytest.approx(logged(launched, "eval_loss"), abs=1e-4)
    assert logged(demo / "two", "eval_accuracy") == logged(launched, "eval_accuracy")
    two, one = (load_file(folder / "model.safetensors") for folder in (demo / "two", launched))
    for name, weight in one.items():
        assert_close(two[name], weight, rtol=0, atol=2e-6)  # a step changes weights by up to 1e-2


def test_frozen_modules_keep_their_weights(demo, monkeypatch):
    options = {"freeze": "vision_tower", "max_steps": 1, "eval_strategy": "no"}
    train_here(monkeypatch, *arguments(demo, demo / "frozen", **options))
    before, after = (load_file(demo / name / "model.safetensors") for name in ("untrained", "frozen"))
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"multi_modal_projector", "language_model"}


def test_freeze_takes_names_of_modules_only(demo):
    model = AutoModel.from_pretrained(demo / "untrained")
    with pytest.raises(ValueError, match="--freeze vision_towr: .* has .*language_model.*, vision_tower"):
        train.freeze(model, ["lm_head", "vision_towr"])
    train.freeze(model, ["model.vision_tower", "multi_modal_projector"])
    trained = {name.split(".")[1] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"language_model"}


def test_vision_tower_has_its_own_rate(demo, monkeypatch):
    options = dict(eval_strategy="no", max_steps=2, vision_learning_rate=0, save_steps=1, max_grad_norm=0)
    train_here(monkeypatch, *arguments(demo, demo / "rates", **options))
    before, after = (load_file(demo / name / "model.safetensors") for name in ("untrained", "rates"))
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"multi_modal_projector", "language_model"}
    # An optimizer such as GaLore brings groups of its own.
    monkeypatch.setattr(train.Trainer, "get_optimizer_cls_and_kwargs", lambda *_: (torch.optim.SGD, {"params": []}))
    with pytest.raises(ValueError, match="--vision_learning_rate has no effect on --optim sgd"):
        train_here(monkeypatch, *arguments(demo, demo / "no_rates", **options))


def test_a_broken_model_ends_with_a_sentence(demo, monkeypatch):
    model = AutoModel.from_pretrained(demo / "untrained")
    model.model.multi_modal_projector.linear_1.weight.data[0, 0] = torch.nan
    model.save_pretrained(demo / "broken")
    AutoProcessor.from_pretrained(demo / "untrained").save_pretrained(demo / "broken")
    options = dict(model_name_or_path=demo / "broken", per_device_train_batch_size=1, eval_strategy="no")
    with pytest.raises(SystemExit) as end:
        train_here(monkeypatch, *arguments(demo, demo / "stopped", **options))
    assert re.fullmatch(
        rf"The loss of step 1 is nan: training stops and saves nothing more. Its files: {demo}/train/\d+.mp4.",
        end.value.code,
    )
    assert not (demo / "stopped" / "model.safetensors").exists()


def test_tensorboard_is_the_default(demo, monkeypatch, capsys):
    words = [word for word in arguments(demo, demo / "board", max_steps=1) if "report_to" not in word]
    train_here(monkeypatch, *words)
    assert list((demo / "board" / "runs").glob("*/events*"))
    checkpoint = json.loads((demo / "board" / "trainer_state.json").read_text())
    assert "tokens_per_second" in checkpoint["log_history"][0]
    monkeypatch.setattr(train, "is_tensorboard_available", lambda: False)
    assert train.parse_arguments(words)[1].report_to == []
    assert "TensorBoard is not installed" in capsys.readouterr().out
    assert train.parse_arguments([*words, "--report_to", "none"])[1].report_to == []
    assert "TensorBoard" not in capsys.readouterr().out


def test_broken_samples_are_left_out_and_named(demo, monkeypatch, capsys):
    rows = json.loads((demo / "train.json").read_text())[:4]
    (demo / "cut.mp4").write_bytes((demo / rows[1]["video"]).read_bytes()[:500])
    rows[1]["video"], rows[2]["video"] = "cut.mp4", "missing.mp4"
    rows.append({"video": rows[0]["video"], "conversations": "Who?"})
    (demo / "broken.json").write_text(json.dumps(rows))
    options = dict(train_file=demo / "broken.json", validation_file=demo / "broken.json", max_steps=8)
    options |= dict(per_device_train_batch_size=1, eval_strategy="no", save_strategy="no")
    with pytest.warns(UserWarning, match="is left out"):
        train_here(monkeypatch, *arguments(demo, demo / "left_out", **options))
    printed = capsys.readouterr().out
    assert "3 broken samples were left out:" in printed and "broken.json, row 5" in printed
    entries = (demo / "left_out" / "broken_samples.jsonl").read_text().splitlines()
    assert len(entries) == 3 and sum("cut.mp4" in entry for entry in entries) == 1
    assert json.loads((demo / "left_out" / "eval_results.json").read_text())["eval_accuracy"] < 1
    with pytest.raises(ValueError, match="broken.json, row 5"):
        train_here(monkeypatch, *arguments(demo, demo / "strict", **options, strict=True))


def test_lists_may_be_streamed(demo, monkeypatch):
    """Each of two processes has a list of its own, and neither of them comes to its end."""
    rows = json.loads((demo / "train.json").read_text())
    for name, some in (("short", rows[:2]), ("long", rows[2:8])):
        (demo / f"{name}.json").write_text(json.dumps(some))
    words = [word for word in arguments(demo, demo / "streamed", streaming=True) if "train_file" not in word]
    words += ["--train_file", f"{demo}/short.json", f"{demo}/long.json", "--eval_strategy=no"]
    train_here(monkeypatch, *words)
    assert len(logged(demo / "streamed", "loss")) == 4
    args, training_args = train.parse_arguments(words)
    train.check_streaming(args, training_args)
    config = training_args.accelerator_config
    assert config.dispatch_batches is False and config.split_batches is False
    streamed = train.training_rows(args, training_args, None)
    videos = [{row["video"][0] for row, _ in zip(streamed.shard(2, i), range(30), strict=False)} for i in (0, 1)]
    assert sorted(map(len, videos)) == [2, 6] and not videos[0] & videos[1]


def test_streaming_needs_a_number_of_steps_and_no_more(demo):
    words = arguments(demo, demo / "streamed", streaming=True)
    with pytest.raises(ValueError, match="--streaming needs --max_steps"):
        train.check_streaming(*train.parse_arguments([*words, "--max_steps=-1"]))
    for option in ("tokens_per_batch=100", "keep_features=memory"):
        with pytest.raises(ValueError, match=f"--{option.partition('=')[0]} needs all rows"):
            train.check_streaming(*train.parse_arguments([*words, f"--{option}"]))


def test_rows_are_grouped_or_interleaved(tmp_path):
    def turns(value):
        return [{"from": "human", "value": "What?"}, {"from": "gpt", "value": value}]

    rows = [{"video": "a.mp4", "start": i, "end": i + 1, "conversations": turns(f"{i}")} for i in (1, 0)]
    rows += [{"video": "b.mp4", "conversations": turns(value)} for value in ("red", "blue")]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    words = ["--model_name_or_path=a", f"--train_file={tmp_path / 'list.json'}", f"--output_dir={tmp_path}"]

    def load(*options):
        return train.training_rows(*train.parse_arguments([*words, *options]), None)

    assert len(load()) == 3 and len(load("--no_group")) == 4
    assert sorted(len(row["video"]) for row in load("--interleave")) == [1, 2]


def test_films_of_any_length_train_in_batches_of_tokens(demo, monkeypatch):
    """Kept features, in memory or in a folder, give the weights that frames give."""
    options = dict(train_file=demo / "train_hours.json", freeze="vision_tower", tokens_per_batch=300, max_steps=3)
    options |= dict(eval_strategy="no", per_device_eval_batch_size=2)
    trained = {}
    for name, kept in (
        ("frames", {}),
        ("memory", {"keep_features": "memory"}),
        ("folder", {"keep_features": demo / "f"}),
    ):
        train_here(monkeypatch, *arguments(demo, demo / f"films_{name}", **options, **kept))
        trained[name] = load_file(demo / f"films_{name}" / "model.safetensors")
    assert len(list((demo / "f").iterdir())) == 4 + 6  # films to train on, and clips to validate with
    before = load_file(demo / "untrained" / "model.safetensors")
    for name, weight in trained["frames"].items():
        changed = not torch.equal(weight, before[name])
        assert changed == ("vision_tower" not in name)
        for other in ("memory", "folder"):
            assert_close(trained[other][name], weight, rtol=0, atol=2e-6)


def test_films_are_encoded_before_worker_processes_start(demo, monkeypatch):
    """Each worker would encode the films again, and forget them after each epoch."""
    encoded, encode = [], FrozenVisionFeatures._encode

    def encode_once(features, path):
        assert features.model.dtype == torch.bfloat16
        encoded.append(path)
        return encode(features, path)

    class Cast(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.bfloat16()  # stands for DeepSpeed, which does so after the Trainer is made

    class CastingTrainer(train.Trainer):
        def __init__(self, *args, callbacks, **kwargs):
            super().__init__(*args, callbacks=[Cast(), *callbacks], **kwargs)

    monkeypatch.setattr(FrozenVisionFeatures, "_encode", encode_once)
    monkeypatch.setattr(train, "Trainer", CastingTrainer)
    options = dict(train_file=demo / "train_hours.json", freeze="vision_tower", tokens_per_batch=300, max_steps=1)
    options |= dict(eval_strategy="no", keep_features="memory", dataloader_num_workers=1)
    train_here(monkeypatch, *arguments(demo, demo / "workers", **options))
    assert len(encoded) == len(set(encoded)) == 4 + 6


def test_accuracy_counts_answers_with_a_right_end():
    """Of three answers in two conversations, the second has a wrong end."""

    class Prediction:
        # The first position predicts the second. The collator pads on the left, the Trainer on the right.
        label_ids = np.array(
            [[-100, -100, 5, 6, 0, -100, 7, 0, -100], [-100, -100, -100, -100, 8, 0, -100, -100, -100]]
        )
        predictions = np.array([[5, 6, 0, 7, 9, -100], [8, 0, 0, 0, 0, -100]])

    assert train.answer_accuracy(Prediction) == {"accuracy": pytest.approx(2 / 3)}


def test_command_line_overrides_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model_name_or_path: a model\ntrain_file: list.json\nfreeze: [vision_tower, lm_head]\nlearning_rate: 1e-3\n"
        "use_cpu: true\nsave_strategy: 'no'\nactivation_checkpointing_kwargs: {offload: true}\neval_strategy:\n"
    )
    args, training_args = train.parse_arguments([str(recipe), "--train_file", "other.json", "--max_steps=3"])
    assert (args.model_name_or_path, args.train_file) == ("a model", ["other.json"])
    assert args.freeze == ["vision_tower", "lm_head"]
    assert (training_args.learning_rate, training_args.max_steps, training_args.use_cpu) == (1e-3, 3, True)
    assert training_args.activation_checkpointing_kwargs == {"offload": True}
    assert training_args.save_strategy == training_args.eval_strategy == "no"


def test_recipe_must_hold_options(tmp_path):
    (tmp_path / "recipe.yml").write_text("- learning_rate\n")
    with pytest.raises(ValueError, match="must hold options as `name: value`, got \\['learning_rate'\\]"):
        train.parse_arguments([str(tmp_path / "recipe.yml")])
    (tmp_path / "recipe.yml").write_text("learning_speed: 1\n")
    with pytest.raises(ValueError, match="learning_speed"):
        train.parse_arguments([str(tmp_path / "recipe.yml"), "--model_name_or_path=a", "--train_file=b"])


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("demo_clips", {"keep_frames": True, "activation_checkpointing": False, "learning_rate": 1e-3}),
        ("demo_minutes", {"freeze": ["vision_tower"], "tokens_per_batch": 8192, "activation_checkpointing": False}),
        ("demo_hours", {"freeze": ["vision_tower"], "tokens_per_batch": 8192, "activation_checkpointing": True}),
        ("demo_day", {"freeze": ["vision_tower"], "tokens_per_batch": 87000, "activation_checkpointing": True}),
    ],
)
def test_recipe_of_the_demo(recipe, expected):
    paths = {"model_name_or_path": "a", "train_file": "b", "output_dir": "c"}
    words = [f"--{name}={value}" for name, value in paths.items()]
    parsed = train.parse_arguments([str(EXAMPLES / "recipes" / f"{recipe}.yaml"), *words])
    values = {name: value for part in parsed for name, value in vars(part).items()}
    expected = {"use_cpu": True, **expected}
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("stage", "parts", "rates", "global_batch"),
    [
        ("stage1", {"multi_modal_projector"}, [1e-3], 512),
        ("stage1_5", {"multi_modal_projector", "language_model", "vision_tower"}, [4e-5, 4e-6], 32),
        ("stage2", {"multi_modal_projector", "language_model", "vision_tower"}, [4e-5, 4e-6], 32),
    ],
)
def test_recipe_of_the_paper(stage, parts, rates, global_batch, monkeypatch):
    """Table 6."""
    words = ["--model_name_or_path=a", "--train_file=b", "--output_dir=c", "--use_cpu"]
    args, training_args = train.parse_arguments([str(EXAMPLES / "recipes" / f"{stage}.yaml"), *words])
    model = tiny_model(tiny_config())
    train.freeze(model, args.freeze)
    assert {name.split(".")[1] for name, parameter in model.named_parameters() if parameter.requires_grad} == parts
    optimizer, options = train.grouped_optimizer(model, training_args, args.vision_learning_rate)
    groups = options["params"]
    assert issubclass(optimizer, torch.optim.AdamW) and options["betas"] == (0.9, 0.95)
    assert list(dict.fromkeys(group.get("lr", options["lr"]) for group in groups)) == rates
    assert {group["weight_decay"] for group in groups} == {0.05, 0.0}
    for world_size in (1, 8, 16, 32):  # one GPU, the paper's, and several machines
        monkeypatch.setattr(train.TrainingArguments, "world_size", world_size)
        _, training_args = train.parse_arguments([str(EXAMPLES / "recipes" / f"{stage}.yaml"), *words])
        rows = world_size * training_args.train_batch_size * training_args.gradient_accumulation_steps
        assert rows == global_batch
    assert (training_args.num_train_epochs, training_args.max_grad_norm) == (1, 1.0)
    assert (training_args.lr_scheduler_type, training_args.get_warmup_steps(1000)) == ("cosine", 100)
    assert training_args.bf16 and training_args.activation_checkpointing
    assert args.interleave == (stage == "stage1_5") and not args.no_group


def test_global_batch_must_be_possible(monkeypatch):
    words = ["--model_name_or_path=a", "--train_file=b", "--output_dir=c", "--use_cpu", "--global_batch_size=32"]
    monkeypatch.setattr(train.TrainingArguments, "world_size", 3)
    with pytest.raises(ValueError, match="32 must be a multiple of 24 rows: 8 on each of 3 processes"):
        train.parse_arguments(words)
    with pytest.raises(ValueError, match="--global_batch_size 0 with it"):
        train.parse_arguments([*words, "--tokens_per_batch=100"])
    monkeypatch.setattr(train.TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="steps 4 contradicts --global_batch_size 32, which needs 2"):
        train.parse_arguments([*words, "--gradient_accumulation_steps=4"])
    words += ["--gradient_accumulation_steps=4", "--global_batch_size=0"]
    assert train.parse_arguments(words)[1].gradient_accumulation_steps == 4


def test_stage_1_leaves_a_head_of_its_own_alone():
    """Table 6: only the projector is trained, also where the head does not share the embeddings' weight."""
    config = tiny_config()
    config.tie_word_embeddings = False
    model = tiny_model(config)
    words = ["--model_name_or_path=a", "--train_file=b", "--output_dir=c", "--use_cpu"]
    train.freeze(model, train.parse_arguments([str(EXAMPLES / "recipes" / "stage1.yaml"), *words])[0].freeze)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("multi_modal_projector" in name for name in trained)


@pytest.mark.parametrize("path", sorted((EXAMPLES / "recipes").glob("stage*.yaml")), ids=lambda path: path.stem)
def test_values_of_the_paper_have_their_source(path):
    lines = path.read_text().partition("# Not in the paper.")[0].splitlines()
    values = [line for line in lines if line and not line.startswith("#")]
    assert all("Table 6" in line or "§" in line for line in values)
