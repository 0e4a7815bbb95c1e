"""Peak memory and tokens per second of MA-GC here and in its authors' code, on one GPU within the hour.

    git clone https://github.com/klae01/ma2mba elsewhere/ma2mba
    python benchmarks/side_by_side.py --device cuda --authors elsewhere/ma2mba   # Mamba-2-2.7B, 2^14 to 2^19 tokens
    python benchmarks/side_by_side.py --device cuda --authors elsewhere/ma2mba --resume

Both sides run and measure the step of `common/training_step.py` with random tokens, each side in a process of its own.
The authors' checkout stands first on its process's PYTHONPATH, before an installed mamba-ssm, as its README asks. It
gets two names that it imports without need and that Transformers 5 has dropped, and the calls of today's causal-conv1d
in place of older ones. Their code is not changed otherwise. It needs CUDA.

Writes `side_by_side.json` to `benchmarks/results`.
"""

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch.nn.functional as F
from common.memory_use import gigabytes
from common.methods import AUTHORS, METHODS, RowsByLength
from common.options import base_job, base_parser, parse_step
from common.recording import Record, describe_environment, page, reasons, run_benchmark
from common.training_step import Step, TrainingStep, measure_by_method, measure_lengths

LENGTHS = [2**14, 2**16, 2**18, 2**19]
LINES = {
    "peak beyond weights and gradients, GB": lambda row: gigabytes(row["activation_bytes"]),
    "peak above the loaded model, GB": lambda row: gigabytes(row["peak_bytes"]),
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "seconds of a step": lambda row: f"{row['seconds']:.2f}",
}


def import_authors_model() -> tuple[type, type]:
    """Return `MambaLMHeadModel` and `MambaConfig` of the checkout that is first on the path."""
    from transformers import generation

    for name in ("GreedySearchDecoderOnlyOutput", "SampleDecoderOnlyOutput"):
        if not hasattr(generation, name):
            setattr(generation, name, generation.GenerateDecoderOnlyOutput)
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel, MixerModel
    from mamba_ssm.ops.triton import ssd_combined

    if not hasattr(MixerModel, "activation_checkpointing_enable"):
        raise ImportError("The mamba_ssm on the path is not the authors': give their checkout as --authors.")
    try:
        from causal_conv1d import cpp_functions
    except ImportError:  # a causal-conv1d as old as their code
        return MambaLMHeadModel, MambaConfig
    ssd_combined.causal_conv1d_cuda = SimpleNamespace(
        causal_conv1d_fwd=cpp_functions.causal_conv1d_fwd_function,
        causal_conv1d_bwd=cpp_functions.causal_conv1d_bwd_function,
    )
    return MambaLMHeadModel, MambaConfig


class AuthorsStep(Step):
    """A step of the authors' model with their checkpointing, in the shape of the job."""

    def make_model(self, job: dict):
        model_class, config_class = import_authors_model()
        shape = job["shape"]
        layer = {"layer": "Mamba2", "d_state": shape["state_size"], "headdim": shape["head_dim"]}
        config = config_class(
            d_model=shape["hidden_size"],
            n_layer=shape["num_hidden_layers"],
            vocab_size=shape["vocab_size"],
            ssm_cfg={**layer, "chunk_size": shape["chunk_size"], "ngroups": shape["n_groups"]},
            rms_norm=True,
            residual_in_fp32=True,
            fused_add_norm=True,
            pad_vocab_size_multiple=16,
            tie_embeddings=True,
        )
        model = model_class(config, device=self.device, dtype=self.dtype).train()
        model.gradient_checkpointing_enable()
        self.vocabulary = shape["vocab_size"]
        return model

    def forward(self, length: int):
        input_ids, targets = self.random_tokens(length, self.vocabulary)
        logits = self.model(input_ids, num_last_tokens=len(targets)).logits
        return F.cross_entropy(logits[0].float(), targets)


def describe_authors(checkout: Path) -> dict[str, str]:
    """Return the version of their code."""
    source = (checkout / "mamba_ssm" / "models" / "mixer_seq_simple.py").read_bytes()
    version = {"sha256 of mixer_seq_simple.py": hashlib.sha256(source).hexdigest()}
    if (checkout / ".git").exists():
        command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
        version["commit"] = subprocess.check_output(command, text=True).strip()
    return version


def measure_side(job: dict) -> Iterator[dict]:
    """Yield the rows of the job's method."""
    return measure_lengths(job, AuthorsStep if job["method"] == AUTHORS else TrainingStep)


def report(results: dict) -> str:
    """Return the results as a Markdown page."""
    found = RowsByLength(results)
    lines = []
    for name, cell in LINES.items():
        lines += [found.line(f"{METHODS.get(m, m)}: {name}", m, cell) for m in found.methods]
    for name, entry in (("memory beyond weights and gradients", "activation_bytes"), ("speed", "tokens_per_second")):
        for method in (method for method in found.methods if method != AUTHORS):
            lines.append(found.ratios(f"**{METHODS[method]} / {AUTHORS}: {name}**", method, AUTHORS, entry))
    times = sorted(row["time"] for row in results["rows"])
    authors = ", ".join(f"{name} {value}" for name, value in results["authors"].items()) or "not there"
    measured = f"Measured from {times[0]} to {times[-1]}. " if times else ""
    return page(
        f"One training step side by side, by tokens in the sequence. {AUTHORS.capitalize()}: {authors}.",
        found.table("", lines),
        reasons(results["rows"]),
        measured + describe_environment(results),
    )


def main():
    parser = base_parser(__doc__)
    parser.add_argument("--authors", type=Path, help="checkout of klae01/ma2mba (default: only our side)")
    arguments = parse_step(parser, measure_side, LENGTHS)
    if arguments.authors and not (arguments.authors / "mamba_ssm").is_dir():
        parser.error(f"{arguments.authors} has no folder mamba_ssm: give a checkout of klae01/ma2mba as --authors.")
    job = base_job(arguments)

    def measure(record: Record) -> None:
        run = (arguments.lengths, arguments.most_steps, __file__)
        measure_by_method(record, job, arguments.methods or ["MA-GC"], *run)
        if arguments.authors and arguments.device == "cuda":
            path = os.pathsep.join([str(arguments.authors.resolve()), os.environ.get("PYTHONPATH", "")])
            measure_by_method(record, job, [AUTHORS], *run, extra_environment={"PYTHONPATH": path})

    head = {"job": job, "authors": describe_authors(arguments.authors) if arguments.authors else {}}
    run_benchmark(arguments, __file__, "side_by_side", head, measure, report)


if __name__ == "__main__":
    main()
