"""Training runs that are killed at random moments and go on; tests/examples/test_kills.py starts this.

    python killed_training.py FOLDER

This process imports everything once, and forks a process for each run of examples/train.py. A run tells through a pipe
what it does: `s` after a step, `b` and `e` around a save, `r` in the middle of deleting an old checkpoint, where it
waits for its end. FOLDER/KIND/undisturbed has a run without kills; FOLDER/KIND/0, 1, ... have runs that were killed
and went on until they were done; FOLDER/report.json says where the kills were.
"""

import gc
import importlib
import json
import os
import random
import select
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import train
import transformers.trainer
from short_training import rows_about
from tiny import tiny_config, tiny_model, tiny_processor
from transformers import Trainer, TrainerCallback
from video_files import write_index_video

KINDS = {"rows": [], "tokens": ["--tokens_per_batch=120"]}
# Kills at a random moment, in a save, and in the deletion of an old checkpoint.
KILLS = {"rows": {"moment": 10, "save": 10, "rotation": 2}, "tokens": {"moment": 2, "save": 2}}


def prepare(folder: Path):
    """Write a model with dropout, and rows about a film."""
    config = tiny_config(vision={"attention_dropout": 0.1})
    tiny_model(config).save_pretrained(folder / "model")
    tiny_processor(config).save_pretrained(folder / "model")
    write_index_video(folder / "film.mp4", 24, fps=4, preset="ultrafast")
    (folder / "rows.json").write_text(json.dumps(rows_about(folder / "film.mp4") * 3))


def arguments(folder: Path, kind: str, output_dir: Path) -> list[str]:
    options = dict(model_name_or_path=folder / "model", train_file=folder / "rows.json", output_dir=output_dir)
    options |= dict(num_train_epochs=2, per_device_train_batch_size=1, learning_rate=1e-3, logging_steps=1)
    options |= dict(save_strategy="steps", save_steps=2, save_total_limit=2, resume_from_checkpoint="last")
    options |= dict(use_cpu=True, keep_frames=True, activation_checkpointing=True, disable_tqdm=True, no_group=True)
    return [f"--{name}={value}" for name, value in options.items()] + KINDS[kind]


class Signals(TrainerCallback):
    """Tells of each step, each save, and of the deletion of a file of an old checkpoint.

    Args:
        pipe: its end for writing.
        removals: number of the deleted file at which the process waits for its end; 0 for none.
    """

    def __init__(self, pipe: int, removals: int):
        self.pipe, self.removals, self.rotates = pipe, removals, False

    def on_step_end(self, args, state, control, **kwargs):
        os.write(self.pipe, b"s")

    def install(self):
        begin, save, rotate = Trainer.train, Trainer._save_checkpoint, transformers.trainer.rotate_checkpoints

        def train_with_signals(trainer, *args, **kwargs):
            trainer.add_callback(self)
            return begin(trainer, *args, **kwargs)

        def save_with_signals(*args, **kwargs):
            os.write(self.pipe, b"b")
            save(*args, **kwargs)
            os.write(self.pipe, b"e")

        def rotate_with_signals(*args, **kwargs):
            self.rotates = True
            rotate(*args, **kwargs)
            self.rotates = False

        Trainer.train, Trainer._save_checkpoint = train_with_signals, save_with_signals
        transformers.trainer.rotate_checkpoints = rotate_with_signals
        sys.addaudithook(self.on_audit)

    def on_audit(self, event, args):
        if event == "os.remove" and self.rotates:
            self.removals -= 1
            if self.removals == 0:
                os.write(self.pipe, b"r")
                signal.pause()


def train_in_child(words: list[str], log: Path, pipe: int, removals: int):
    """Run examples/train.py in a forked process, which ends here."""
    status = 1
    try:
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        Signals(pipe, removals).install()
        sys.argv = ["train.py", *words]
        train.main()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


class Run:
    """A forked run and what it has told so far."""

    def __init__(self, words: list[str], log: Path, removals: int = 0):
        self.pipe, end = os.pipe()
        self.told, self.ended = b"", False
        self.process = os.fork()
        if self.process == 0:
            train_in_child(words, log, end, removals)
        os.close(end)

    def listen(self, seconds: float | None = None) -> bytes:
        """Wait for the next signal, at most so long; nothing comes after the end of the process."""
        signals = b""
        if not self.ended and select.select([self.pipe], [], [], seconds)[0]:
            signals = os.read(self.pipe, 1)
            self.ended = not signals
        self.told += signals
        return signals

    def wait_for(self, what: bytes, number: int) -> bool:
        """Wait for the number-th signal of a kind; False if the process ends before."""
        while self.told.count(what) < number and not self.ended:
            self.listen()
        return not self.ended

    def wait(self, seconds: float, until: bytes = b""):
        """Wait so long, or until a signal comes."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.ended:
            if until and self.listen(left) == until:
                return

    def kill(self) -> str:
        """Kill the process, and return where it was: "moment", "save" or "rotation"; "end" if it was done."""
        os.kill(self.process, signal.SIGKILL)
        _, status = os.waitpid(self.process, 0)
        while self.listen():
            pass
        os.close(self.pipe)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the run failed"
            return "end"
        if self.told.endswith(b"r"):
            return "rotation"
        return "save" if self.told.count(b"b") > self.told.count(b"e") else "moment"

    def finish(self) -> float:
        """Let the process end, and return how long a save took."""
        begin, times = None, []
        while signals := self.listen():
            if signals == b"b":
                begin = time.monotonic()
            elif signals == b"e":
                times.append(time.monotonic() - begin)
        assert self.kill() == "end"
        return sum(times) / len(times)


def kill_at_random(generator: random.Random, words: list[str], log: Path, where: str, seconds_of_save: float) -> str:
    """Start a run, kill it about there, and return where it was."""
    run = Run(words, log, removals=generator.randint(1, 10) if where == "rotation" else 0)
    if where == "rotation":
        run.wait_for(b"r", 1)
    elif where == "save":
        if run.wait_for(b"b", generator.randint(1, 2)):
            run.wait(generator.random() * seconds_of_save, until=b"e")
    elif run.wait_for(b"s", generator.randint(0, 5)):
        run.wait(generator.random() * 0.1, until=b"b")
    return run.kill()


def chains(folder: Path, kind: str, seed: int) -> list[list[str]]:
    """Kill runs of one kind as often as KILLS says; where the kills of each chain of runs were."""
    generator, log = random.Random(seed), folder / kind / "log.txt"
    log.parent.mkdir()
    seconds_of_save = Run(arguments(folder, kind, folder / kind / "undisturbed"), log).finish()
    missing, kills = dict(KILLS[kind]), [[]]
    while sum(missing.values()):
        where = generator.choice([where for where, number in missing.items() for _ in range(number)])
        words = arguments(folder, kind, folder / kind / str(len(kills) - 1))
        killed = kill_at_random(generator, words, log, where, seconds_of_save)
        if killed == "end":
            kills.append([])
        else:
            kills[-1].append(killed)
            missing[killed] = max(0, missing[killed] - 1)
        assert len(sum(kills, [])) < 100, "no kill hits its aim"
    Run(arguments(folder, kind, folder / kind / str(len(kills) - 1)), log).finish()
    return kills


def main(folder: str):
    torch.set_num_threads(1)
    folder = Path(folder)
    prepare(folder)
    # Each run would import them again.
    for name in ("bitsandbytes", "datasets", "deepspeed", "torch.utils.tensorboard"):
        importlib.import_module(name)
    gc.freeze()  # what a fork shares needs no collection
    report = {kind: chains(folder, kind, seed) for seed, kind in enumerate(KINDS)}
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
