"""Measure the memory of `build`, `export` and `convert` at the real sizes of a published model, with random weights.

    python benchmarks/build.py --size 2.7b --dtype bfloat16

Writes a Mamba-2 in the original layout and a CLIP ViT-L/14-336 in Transformers' into a temporary folder, in several
files each, builds a model of them, exports it in each layout, and converts the authors' layout back. Each command runs
in a process of its own. Results go to benchmarks/results/build.json.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common.recording import describe_environment, describe_run, new_parser, page, parse, publish, require_row, table
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModel, PreTrainedTokenizerFast

from transformers_ma2mba import Ma2mbaConfig

# Mamba-2's sizes in the original configuration: 48 layers of width 2,048, for instance.
SIZES = {"370m": "0.7b", "1.3b": "1.8b", "2.7b": "3.1b"}
TOKENS = 50277

# The commands by the names of their outputs, with paths in the temporary folder; later ones read earlier outputs.
COMMANDS = {
    "built": ["build", "--language_model", "language", "--vision_model", "vision"],
    "transformers": ["export", "built", "--layout", "transformers"],
    "original": ["export", "built", "--layout", "original"],
    "published": ["export", "built", "--layout", "published"],
    "converted": ["convert", "published"],
}


def write_sources(folder: Path, size: str, dtype: torch.dtype) -> int:
    """Write random weights in published layouts, and return their size in bytes."""
    config = Ma2mbaConfig.from_preset(SIZES[size])
    text = config.text_config
    language, vision = folder / "language", folder / "vision"
    for part in (language, vision):
        part.mkdir()
    original = {"d_model": text.hidden_size, "n_layer": text.num_hidden_layers, "vocab_size": TOKENS}
    original |= {"ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16, "tie_embeddings": True}
    (language / "config.json").write_text(json.dumps(original))
    text.vocab_size = -(-TOKENS // 16) * 16
    config.vision_config.save_pretrained(vision)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModel.from_config(text).state_dict().items()}
        tower = AutoModel.from_config(config.vision_config).state_dict()
    names = {name: f"backbone.{name.replace('embeddings.', 'embedding.')}" for name in shapes}
    write_shards(language, {names[name]: shape for name, shape in shapes.items()}, dtype, "pytorch_model", "bin")
    write_shards(
        vision, {f"vision_model.{name}": tensor.shape for name, tensor in tower.items()}, dtype, "model", "safetensors"
    )
    words = {"<|endoftext|>": 0, "<|padding|>": 1} | {f"word{i}": i for i in range(2, TOKENS)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>")),
        eos_token="<|endoftext|>",
        pad_token="<|padding|>",
    ).save_pretrained(language)
    return sum(file.stat().st_size for part in (language, vision) for file in part.iterdir())


def write_shards(folder: Path, shapes: dict, dtype: torch.dtype, stem: str, kind: str, largest: int = 2**30):
    """Write random tensors in files of about a GiB, with an index."""
    parts, size = [{}], 0
    for name, shape in shapes.items():
        if size > largest:
            parts.append({})
            size = 0
        parts[-1][name] = shape
        size += shape.numel() * dtype.itemsize
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}-{number:05}-of-{len(parts):05}.{kind}"
        tensors = {name: torch.randn(shape).mul_(0.02).to(dtype) for name, shape in part.items()}
        (torch.save if kind == "bin" else save_file)(tensors, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def worker(job: dict):
    """Run a command as a user does, and yield its peak of resident memory."""
    output = Path(job["folder"], job["output"])
    code = "import sys; from transformers_ma2mba.command_line import main; main(sys.argv[1:]); "
    code += "print(1024 * int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]))"
    command = COMMANDS[job["output"]]
    start = time.perf_counter()
    finished = subprocess.run(
        [sys.executable, "-c", code, *command, "--output", output],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=output.parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    yield {
        "command": " ".join(command),
        "peak_bytes": int(finished.stdout.split()[-1]),
        "written_bytes": sum(file.stat().st_size for file in output.iterdir()),
        "seconds": round(time.perf_counter() - start, 1),
    }


def measure(arguments) -> dict:
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        needed = 30 * 2**30 if arguments.dtype == "bfloat16" else 60 * 2**30
        if shutil.disk_usage(folder).free < needed:
            sys.exit(f"{folder} has less than {needed / 2**30:.0f} GiB free.")
        written = write_sources(Path(folder), arguments.size, getattr(torch, arguments.dtype))
        rows = []
        for output in COMMANDS:
            rows.append(require_row(__file__, {"folder": folder, "output": output, "threads": 1}))
            if output in ("transformers", "original"):  # which no later command reads
                shutil.rmtree(Path(folder, output))
    head = describe_run(__file__)
    return {**head, "size": arguments.size, "dtype": arguments.dtype, "source_bytes": written, "rows": rows}


def report(results: dict) -> str:
    header = ["command", "files written, GB", "peak memory, GB", "seconds"]
    rows = [
        [row["command"], *(f"{row[key] / 1e9:.2f}" for key in ("written_bytes", "peak_bytes")), f"{row['seconds']:g}"]
        for row in results["rows"]
    ]
    return page(
        f"Mamba-2 {results['size']} and CLIP ViT-L/14-336 in {results['dtype']}, "
        f"{results['source_bytes'] / 1e9:.2f} GB of files.",
        table(header, rows),
        "Peak memory is the resident size of the whole process, with Python and PyTorch themselves and mapped files.",
        describe_environment(results),
    )


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="1.3b")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--work", type=Path, help="a folder for temporary files (default: the system's)")
    arguments = parse(parser, worker)
    publish(arguments, "build", lambda: measure(arguments), report)


if __name__ == "__main__":
    main()
