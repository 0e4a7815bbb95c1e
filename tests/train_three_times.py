"""Run examples/train.py, once more from the last checkpoint but one, and again with a broken gradient.

test_accelerate.py gives this to `accelerate launch`, because processes take longer to start than to train. The second
run finds the newest checkpoint unfinished; its folder is named like the first one's, with `_resumed` at its end. In
the third one, with `_stopped`, the last process has a gradient that is not finite, in its first batch.
"""

import os
import runpy
import shutil
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from tiny import EXAMPLES

from transformers_ma2mba import Ma2mbaForVideoQA


class BrokenGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def train(*words):
    AcceleratorState._reset_state()
    sys.argv += words
    runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")


def train_with_broken_gradient(*words):
    forward, state = Ma2mbaForVideoQA.forward, PartialState()

    def broken_forward(*args, **kwargs):
        output = forward(*args, **kwargs)
        if state.process_index == state.num_processes - 1:
            output.loss = BrokenGradient.apply(output.loss)
        return output

    Ma2mbaForVideoQA.forward = broken_forward
    try:
        train(*words)
    except SystemExit as end:
        # In one write, which another process's output cannot interrupt; print writes the end of the line on its own.
        os.write(sys.stdout.fileno(), f"\nProcess {state.process_index} stopped: {end.code}\n".encode())


def main():
    train()
    output_dir = Path(next(word for word in sys.argv if word.startswith("--output_dir=")).partition("=")[2])
    resumed, stopped = (output_dir.with_name(f"{output_dir.name}_{run}") for run in ("resumed", "stopped"))
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        for path in output_dir.glob("checkpoint-*"):
            shutil.copytree(path, resumed / path.name)
        newest = max(resumed.iterdir(), key=lambda path: int(path.name.partition("-")[2]))
        (newest / "trainer_state.json").unlink()
    PartialState().wait_for_everyone()
    train(f"--output_dir={resumed}", "--resume_from_checkpoint=last")
    train_with_broken_gradient(f"--output_dir={stopped}")


if __name__ == "__main__":
    main()
