"""Run examples/train.py, then once more in the same processes from the last checkpoint but one.

test_accelerate.py gives this to `accelerate launch`, because processes take longer to start than to train. The second
run finds the newest checkpoint unfinished; its folder is named like the first one's, with `_resumed` at its end.
"""

import runpy
import shutil
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from tiny import EXAMPLES


def main():
    runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")
    output_dir = Path(next(word for word in sys.argv if word.startswith("--output_dir=")).partition("=")[2])
    resumed = output_dir.with_name(f"{output_dir.name}_resumed")
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        for path in output_dir.glob("checkpoint-*"):
            shutil.copytree(path, resumed / path.name)
        newest = max(resumed.iterdir(), key=lambda path: int(path.name.partition("-")[2]))
        (newest / "trainer_state.json").unlink()
    PartialState().wait_for_everyone()
    AcceleratorState._reset_state()
    sys.argv += [f"--output_dir={resumed}", "--resume_from_checkpoint=last"]
    runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
