"""Recording of measurements: worker processes, rows that are written at once, the conditions of a run, tables."""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
STEP_PACKAGES = ["torch", "transformers", "triton", "mamba-ssm", "causal-conv1d"]
VIDEO_PACKAGES = ["av", "torch", "torchvision", "transformers", "numpy"]


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="default: benchmarks/results")
    parser.add_argument("--plot_only", action="store_true", help="draw and tabulate the results of an earlier run")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser


def parse(parser: argparse.ArgumentParser, worker: Callable[[dict], Iterable[dict]]) -> argparse.Namespace:
    """Return the options, or, in a process started with `--worker JOB`, print the rows of the job and exit."""
    arguments = parser.parse_args()
    if arguments.worker:
        for row in worker(arguments.worker):
            print(json.dumps(row), flush=True)
        sys.exit()
    return arguments


# Processes


def worker_rows(script: str, job: dict, extra_environment: dict[str, str] | None = None) -> Iterator[dict]:
    """Measure `job` by `script` in a process of its own, and yield each row that it prints.

    If the kernel kills the process for want of memory, the last row is `{"skipped": "out of memory"}`. If the process
    fails otherwise, the last row is `{"failed": last line of its error output}`.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), **(extra_environment or {})}
    environment["TRANSFORMERS_VERBOSITY"] = "error"  # or each process would warn that mamba-ssm is not installed
    command = [sys.executable, script, "--worker", json.dumps(job)]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process:
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
        if process.returncode == 0:
            return
        errors.seek(0)
        words = errors.read().strip()
    if process.returncode == -9:  # the kernel's out-of-memory killer
        yield {"skipped": "out of memory"}
        return
    print(words[-4000:], file=sys.stderr)
    yield {"failed": (words.splitlines() or [f"exit status {process.returncode}"])[-1][:300]}


def run_worker(script: str, job: dict, extra_environment: dict[str, str] | None = None) -> dict:
    """Return the last row of [`worker_rows`]."""
    return list(worker_rows(script, job, extra_environment))[-1]


def require_row(script: str, job: dict) -> dict:
    """Return the row of a job without which the benchmark cannot go on, and end the process if there is none."""
    print(f"Measuring {', '.join(str(value) for name, value in job.items() if name != 'threads')} ...", flush=True)
    row = run_worker(script, job)
    reason = row.get("failed") or row.get("skipped")
    if reason:
        sys.exit(f"The measurement failed: {reason}")
    print(f"    {row}", flush=True)
    return row


class Stopwatch:
    """Seconds and CPU seconds since its creation."""

    def __init__(self):
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Return `seconds` and `cpu_seconds`."""
        seconds, cpu_seconds = time.perf_counter() - self.start, time.process_time() - self.cpu_start
        return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2)}


# Results


def write_json(path: Path, results: dict) -> None:
    """Write the file at once or not at all, since the process may be cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


class Record:
    """Rows of a benchmark in a JSON file, which is written after each row.

    Args:
        head: entries of the file before its rows: the command, the environment and all else that the rows depend on.
        resume: whether to keep the rows of an earlier run under the same conditions (see [`conditions`]).
        keys: the entries that identify a row.
    """

    def __init__(self, path: Path, head: dict, resume: bool = False, keys: tuple[str, ...] = ("method", "length")):
        self.path, self.keys = path, keys
        self.results = {**json.loads(json.dumps(head)), "rows": []}
        if resume:
            self.borrow(path)

    def borrow(self, path: Path) -> None:
        """Add the rows that another file has, this record lacks, and the same conditions hold for."""
        if not path.exists():
            return
        other = json.loads(path.read_text())
        if conditions(other) != conditions(self.results):
            print(f"The rows in {path.name} were measured under other conditions, and are not kept.", flush=True)
            return
        for row in other["rows"]:
            if "failed" not in row and not self.has(**{key: row[key] for key in self.keys}):
                self.results["rows"].append(row)

    def has(self, **key) -> bool:
        """Return whether a row has these entries."""
        return any(all(row[name] == value for name, value in key.items()) for row in self.results["rows"])

    def add(self, row: dict) -> None:
        """Append a row and write the file, since the next row may take long or be cut off."""
        self.results["rows"].append({**row, "time": time.strftime("%Y-%m-%d %H:%M")})
        write_json(self.path, self.results)

    @property
    def failed(self) -> list[dict]:
        """The rows whose worker failed."""
        return [row for row in self.results["rows"] if "failed" in row]


def conditions(results: dict) -> dict:
    """Return the entries of a file that must equal those of another for their rows to stand in one table.

    These are all but the rows, the command, notes, the date and the driver.
    """
    kept = {name: value for name, value in results.items() if name not in ("command", "rows", "environment", "note")}
    where = results["environment"]
    return {**kept, "environment": {name: where.get(name) for name in ("device", "python", *STEP_PACKAGES)}}


def publish(
    arguments: argparse.Namespace,
    name: str,
    measure: Callable[[], dict],
    report: Callable[[dict], str],
    draw: Callable[[dict, Path], None] | None = None,
    markdown: bool = False,
) -> None:
    """Measure, or with `--plot_only` read earlier results, and print the report.

    Writes `NAME.json`, with `markdown` `NAME.md`, and with `draw` `NAME.png`.
    """
    path = arguments.output_dir / f"{name}.json"
    if arguments.plot_only:
        results = json.loads(path.read_text())
    else:
        results = measure()
        write_json(path, results)
    print(report(results))
    if markdown:
        path.with_suffix(".md").write_text(report(results))
    if draw is not None:
        draw(results, path.with_suffix(".png"))


def run_benchmark(
    arguments: argparse.Namespace,
    script: str,
    name: str,
    head: dict,
    measure: Callable[[Record], None],
    report: Callable[[dict], str],
    draw: Callable[[dict, Path], None] | None = None,
    keys: tuple[str, ...] = ("method", "length"),
) -> None:
    """Publish a benchmark whose rows `measure` adds to a record. With `draw` it has a page, too."""
    failed = []

    def measure_rows() -> dict:
        run = describe_run(script, arguments.device, arguments.threads)
        record = Record(arguments.output_dir / f"{name}.json", {**run, **head}, arguments.resume, keys)
        measure(record)
        failed.extend(record.failed)
        return record.results

    publish(arguments, name, measure_rows, report, draw, markdown=draw is not None)
    if failed:
        sys.exit(f"{len(failed)} rows of {name}.json failed; --resume measures them again.")


# Conditions and tables


def describe_run(
    script: str, device: str = "cpu", threads: int | None = None, packages: Iterable[str] | None = None
) -> dict:
    """Return the command and the environment that figures depend on, for the head of a file.

    A GPU is described by `nvidia-smi`, because a process that asks PyTorch takes memory on it.
    """
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    where = {"device": cpu, "cpu": cpu, "cores": os.cpu_count()}
    if threads is not None:
        where["threads"] = threads
    if device == "cuda":
        where["device"] = "a GPU"
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader", "--id=0"]
            name, driver, memory = subprocess.check_output(query, text=True).strip().split(", ")
            where |= {"device": name, "driver": driver, "device_memory": memory}
        where["allocator"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "default")
    where |= {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
    for package in packages or (STEP_PACKAGES if device == "cuda" else STEP_PACKAGES[:2]):
        try:
            where[package] = version(package)
        except ModuleNotFoundError:
            where[package] = None
    return {"command": command_line(script), "environment": where}


def describe_environment(results: dict) -> str:
    """Return the machine, the versions, the date and the command as a sentence for below a table."""
    where = results["environment"]
    on = f"{where['cpu']}, " + (f"{where['threads']} threads" if "threads" in where else f"{where['cores']} cores")
    if where.get("device", where["cpu"]) != where["cpu"]:
        settings = where.get("allocator", "default")
        on = f"{where['device']}, driver {where.get('driver', 'unknown')}, PyTorch's allocator {settings}"
    packages = [f"{name} {value}" for name, value in where.items() if value and name in STEP_PACKAGES + VIDEO_PACKAGES]
    date = f"; {where['date']}" if "date" in where else ""
    return f"{on}; Python {where['python']}, {', '.join(packages)}{date}; `{results['command']}`."


def table(header: list[str], rows: list[list[str]], left: int = 1) -> list[str]:
    """Return the lines of a Markdown table whose first `left` columns are aligned to the left."""
    lines = [header, ["---"] * left + ["---:"] * (len(header) - left), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def page(*parts: str | list[str]) -> str:
    """Return a Markdown page of paragraphs and of tables, which are lists of lines. Empty parts are left out."""
    return "\n\n".join(part if isinstance(part, str) else "\n".join(part) for part in parts if part) + "\n"


def reasons(rows: list[dict]) -> str:
    """Return a paragraph that says why rows are missing, or nothing."""
    found = dict.fromkeys(row.get("skipped") or f"failed, {row['failed']}" for row in rows if "seconds" not in row)
    return f"“–” was not measured: {'; '.join(found)}." if found else ""


def command_line(script: str) -> str:
    """Return the command that repeats this run, without paths of the machine."""
    kept = []
    words = iter([part for word in sys.argv[1:] for part in (word.split("=", 1) if word[:2] == "--" else [word])])
    for word in words:
        if word in ("--output_dir", "--film_dir", "--work"):
            next(words, None)
        elif word == "--authors":
            kept += [word, "PATH"]
            next(words, None)
        elif word not in ("--plot_only", "--resume"):
            kept.append(word)
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *kept])
