"""What the benchmarks have in common: measurements in processes of their own, rows that are written down at once,
peaks of memory, the conditions of a run, tables."""

import ctypes
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
USABLE = 0.9  # of the memory that is free
PINNED_MEMORY = "transformers_ma2mba.pinned_memory"
PACKAGES = {"cpu": ["torch", "transformers"]}
PACKAGES["cuda"] = [*PACKAGES["cpu"], "triton", "mamba-ssm", "causal-conv1d"]


# Processes


def worker_rows(script: str, job: dict, extra_environment: dict[str, str] | None = None) -> Iterator[dict]:
    """The rows that `script` prints as it measures `job` in a process of its own, each as it comes.

    If the process is killed for want of memory, a last row says `{"skipped": "out of memory"}`; if it ends otherwise
    before it is done, `{"failed": its last words}`.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), **(extra_environment or {})}
    environment["TRANSFORMERS_VERBOSITY"] = "error"  # each process would say that mamba-ssm is not installed
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
    """The last row of `worker_rows`."""
    return list(worker_rows(script, job, extra_environment))[-1]


def print_rows(rows: Iterator[dict]) -> None:
    """What a worker does with its rows."""
    for row in rows:
        print(json.dumps(row), flush=True)


def expected_shortage(expected_bytes: int) -> str | None:
    """Why a measurement on the CPU should not be tried, if so: other processes would be killed as well."""
    free = available_bytes()
    if expected_bytes <= USABLE * free:
        return None
    return f"expected to take {expected_bytes / 1e9:.1f} GB of {free / 1e9:.1f} GB free"


# Rows


class Record:
    """Rows of a benchmark in a JSON file, written after each one.

    Args:
        head: what comes before the rows: the command, the environment, and whatever else they depend on.
        resume: whether to keep the rows of an earlier run with the same head, but for its command, date and driver.
        keys: the entries that tell one row from another.
    """

    def __init__(self, path: Path, head: dict, resume: bool = False, keys: tuple[str, ...] = ("method", "length")):
        self.path, self.keys = path, keys
        self.results = {**json.loads(json.dumps(head)), "rows": []}
        if resume:
            self.borrow(path)

    def borrow(self, path: Path) -> None:
        """Takes the rows of another file that were measured under the same conditions, and that this one lacks."""
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
        return any(all(row[name] == value for name, value in key.items()) for row in self.results["rows"])

    def add(self, row: dict) -> None:
        """Appends a row and writes the file, since what comes next may take long, or be cut off."""
        self.results["rows"].append({**row, "time": time.strftime("%Y-%m-%d %H:%M")})
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.results, indent=1) + "\n")
        part.replace(self.path)  # all or nothing, for whoever is cut off here

    @property
    def failed(self) -> list[dict]:
        return [row for row in self.results["rows"] if "failed" in row]


def conditions(results: dict) -> dict:
    """What the rows of two files must share to stand in one table."""
    kept = {name: value for name, value in results.items() if name not in ("command", "rows", "environment", "note")}
    where = results["environment"]
    return {**kept, "environment": {name: where.get(name) for name in ("device", "python", *PACKAGES["cuda"])}}


def run_benchmark(
    arguments,
    script: str,
    name: str,
    head: dict,
    measure: Callable[[Record], None],
    report: Callable[[dict], str],
    draw: Callable[[dict, Path], None] | None = None,
    keys: tuple[str, ...] = ("method", "length"),
) -> None:
    """Measures, or with `--plot_only` reads what was measured, and prints the report. Writes `NAME.json`; with `draw`,
    `NAME.md` and `NAME.png` too."""
    output = arguments.output_dir / f"{name}.json"
    if arguments.plot_only:
        results, failed = json.loads(output.read_text()), []
    else:
        where = environment(arguments.device, arguments.threads)
        record = Record(
            output, {"command": command_line(script), "environment": where, **head}, arguments.resume, keys
        )
        measure(record)
        record.write()
        results, failed = record.results, record.failed
    print(report(results))
    if draw is not None:
        output.with_suffix(".md").write_text(report(results))
        draw(results, output.with_suffix(".png"))
    if failed:
        sys.exit(f"{len(failed)} of {len(results['rows'])} rows of {output.name} failed; --resume tries them again.")


# Memory


def resident_bytes(field: str) -> int:
    """`VmRSS`, this process's resident size now, or `VmHWM`, the highest since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def available_bytes() -> int:
    """Host memory that is free, or would be if it were asked for."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024


class PeakMemory:
    """The highest memory above that at its making.

    On a GPU that is what PyTorch allocated on it, with what it reserved, and beside that the host's resident size, of
    which pinned memory is a part. On a CPU it is the resident size. (Linux only.)
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            if PINNED_MEMORY in sys.modules:  # blocks of an earlier, shorter sequence
                sys.modules[PINNED_MEMORY].pinned_memory.release()
            self.before = torch.cuda.memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        except OSError:
            if not self.on_gpu:
                raise
        self.resident = resident_bytes("VmRSS")
        self.forget()

    def forget(self) -> None:
        """Begins anew on a GPU, where allocators stay as they are."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> dict[str, int]:
        resident = resident_bytes("VmHWM") - self.resident
        if not self.on_gpu:
            return {"peak_bytes": resident}
        return {
            "peak_bytes": torch.cuda.max_memory_allocated() - self.before,
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "host_bytes": resident,
        }


def gigabytes(num_bytes: int) -> str:
    """Three digits: 0.305, 2.57, 10.3."""
    size = num_bytes / 1e9
    return f"{size:.{3 if size < 0.9995 else 2 if size < 9.995 else 1}f}"


# Conditions and tables


def environment(device: str, threads: int) -> dict:
    """What the figures depend on. A GPU is described from outside: a process that asks PyTorch takes memory on it."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    where = {"device": cpu, "cpu": cpu, "threads": threads}
    if device == "cuda":
        where["device"] = "a GPU"
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader", "--id=0"]
            name, driver, memory = subprocess.check_output(query, text=True).strip().split(", ")
            where |= {"device": name, "driver": driver, "device_memory": memory}
        where["allocator"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "default")
    where |= {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
    for package in PACKAGES[device]:
        try:
            where[package] = version(package)
        except ModuleNotFoundError:
            where[package] = None
    return where


def describe_environment(results: dict) -> str:
    """The machine, the versions, the date and the command, for below a table."""
    where = results["environment"]
    on = f"{where['device']}, {where['threads']} threads"
    if where["device"] != where["cpu"]:
        settings = where.get("allocator", "default")
        on = f"{where['device']}, driver {where.get('driver', 'unknown')}, PyTorch's allocator {settings}"
    packages = [f"{name} {where[name]}" for name in PACKAGES["cuda"] if where.get(name)]
    return f"{on}; Python {where['python']}, {', '.join(packages)}; {where['date']}; `{results['command']}`."


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, its first column to the left."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def reasons(rows: list[dict]) -> list[str]:
    """Why rows are missing, as paragraphs of a page."""
    found = dict.fromkeys(row.get("skipped") or f"failed, {row['failed']}" for row in rows if "seconds" not in row)
    return [f"“–” was not measured: {'; '.join(found)}.", ""] if found else []


def command_line(script: str) -> str:
    """The command that repeats a run, without the paths of the machine it ran on."""
    words, hidden = [], 0
    for word in sys.argv[1:]:
        if word in ("--plot_only", "--resume"):
            continue
        hidden = 2 if word == "--output_dir" else hidden
        if not hidden:
            words.append("PATH" if words and words[-1] == "--authors" else word)
        hidden = max(hidden - 1, 0)
    return " ".join(["python", f"benchmarks/{Path(script).name}", *words])
