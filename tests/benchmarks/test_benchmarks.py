"""Benchmarks: measuring, resuming and reporting, rehearsed on the CPU with tiny models."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Mamba2Model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import breakdown  # noqa: E402
import film  # noqa: E402
import gpu_report  # noqa: E402
import longest  # noqa: E402
import memory  # noqa: E402
import needle  # noqa: E402
import scan  # noqa: E402
import side_by_side  # noqa: E402
import speed  # noqa: E402
import state  # noqa: E402
import video_reader  # noqa: E402
import watch  # noqa: E402
from breakdown import copies_and_kernels, kernels_by_kind, overlap, union  # noqa: E402
from common import plans, recording, toy_films, training_step  # noqa: E402
from common.methods import AUTHORS, GPU_METHODS  # noqa: E402
from common.options import TINY, TINY_LENGTHS  # noqa: E402
from common.recording import Record  # noqa: E402
from common.training_step import TrainingStep, measure_lengths  # noqa: E402
from make_videos import COLOURS, FPS, QUESTIONS, paint, plan_film, render  # noqa: E402

from transformers_ma2mba import Ma2mbaConfig  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

JOB = {"device": "cpu", "dtype": "float32", "threads": 1, "shape": TINY, "step": "tokens", "ma_gc": {}}
METHODS = ["none", "every-layer", "every-sqrt", "MA-GC", "MA-GC-offload", "MA-GC-minimal"]
ENVIRONMENT = {
    "device": "a GPU",
    "cpu": "a CPU",
    "threads": 16,
    "driver": "1.2",
    "date": "2026-01-02",
    "python": "3.12",
}


# Intervals and kernels


@pytest.mark.parametrize(
    "copies, kernels, common",
    [
        ([], [(0, 9)], 0),
        ([(0, 2)], [], 0),
        ([(0, 2)], [(2, 4)], 0),
        ([(0, 4)], [(1, 2), (3, 9)], 2),
        ([(0, 4), (2, 6), (10, 11)], [(5, 10.5)], 1.5),
        ([(5, 6), (0, 1)], [(0, 9), (0, 9)], 2),
        ([(1, 1)], [(0, 2)], 0),
    ],
)
def test_overlap(copies, kernels, common):
    assert overlap(copies, kernels) == overlap(kernels, copies) == common


def test_overlap_equals_a_count_of_moments():
    generator = random.Random(0)
    for _ in range(50):
        first, second = (
            [(start, start + generator.randrange(9)) for start in generator.sample(range(60), 8)] for _ in range(2)
        )
        inside = [
            {moment for start, end in intervals for moment in range(start, end)} for intervals in (first, second)
        ]
        assert overlap(first, second) == len(inside[0] & inside[1])
        assert sum(end - start for start, end in union(first)) == len(inside[0])


def event(category, name, start, duration, **more):
    return {"cat": category, "name": name, "ts": start * 1e6, "dur": duration * 1e6, **more}


def test_profile_is_split_by_kernel_kind_and_by_copies():
    events = [
        event("kernel", "_chunk_scan_fwd_kernel", 0, 2),
        event("kernel", "nvjet_hsh_128x256_64x4_2x1_v_bz_TNT", 2, 3),
        event("kernel", "void causal_conv1d_channellast_fwd_kernel<...>", 5, 1),
        event("kernel", "void at::native::vectorized_elementwise_kernel<4, ...>", 9, 0.5),
        event("kernel", "pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", 12, 0.25),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 1, 2, args={"bytes": 300}),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 5.5, 2, args={"bytes": 100}),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 0, 20, args={"bytes": 7}),
        event("cuda_runtime", "cudaLaunchKernel", 0, 9),
        {"ph": "M", "name": "process_name"},
    ]
    kinds = {"matrix products": 3, "scan": 2, "convolution": 1, "element by element": 0.5, "attention": 0.25}
    assert kernels_by_kind(events) == kinds
    found = copies_and_kernels(events)
    assert found["kernel_seconds"] == 6.75
    assert found["to_host"] == {"bytes": 300, "seconds": 2, "beside_kernels": 2, "share": 1}
    assert found["to_device"] == {"bytes": 100, "seconds": 2, "beside_kernels": 0.5, "share": 0.25}
    assert found["both"] == {"bytes": 400, "seconds": 4, "beside_kernels": 2.5, "share": 0.625}


def test_flops_slightly_exceed_twice_the_weights():
    config = Ma2mbaConfig()
    with torch.device("meta"):
        trunk = Mamba2Model(config.text_config)
    weights = sum(module.weight.numel() for module in trunk.modules() if isinstance(module, torch.nn.Linear))
    assert 2 * weights < breakdown.mamba2_flops(config.text_config) < 2.2 * weights
    vision = config.vision_config
    per_layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    assert 2 * 23 * 577 * per_layer < breakdown.vision_flops(config) < 2.4 * 23 * 577 * per_layer


# Rows, processes and commands


def test_record_resumes_only_under_the_same_conditions(tmp_path):
    head = {"command": "one", "environment": ENVIRONMENT, "job": {"a": [1, 2]}}
    record = Record(tmp_path / "x.json", head)
    record.add({"method": "none", "length": 8, "seconds": 1.0})
    record.add({"method": "none", "length": 16, "skipped": "out of memory"})
    record.add({"method": "MA-GC", "length": 8, "failed": "some error"})
    assert record.failed

    same = {**head, "command": "another", "environment": {**ENVIRONMENT, "date": "2026-01-03", "driver": "1.3"}}
    resumed = Record(tmp_path / "x.json", same, resume=True)
    assert [row["length"] for row in resumed.results["rows"]] == [8, 16]  # a failed row is measured again
    assert resumed.has(method="none", length=16) and not resumed.has(method="MA-GC", length=8)
    assert not Record(tmp_path / "x.json", same).results["rows"]
    for other in ({**head, "job": {"a": 1}}, {**head, "environment": {**ENVIRONMENT, "torch": "9"}}):
        assert not Record(tmp_path / "x.json", other, resume=True).results["rows"]

    resumed.borrow(tmp_path / "x.json")
    assert len(resumed.results["rows"]) == 2


@pytest.mark.parametrize(
    "end, last",
    [
        ("", {"length": 2}),
        ("raise SystemExit('no such kernel')", {"failed": "no such kernel"}),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", {"skipped": "out of memory"}),
    ],
    ids=["done", "failed", "killed"],
)
def test_last_row_tells_how_a_worker_ended(tmp_path, end, last):
    script = tmp_path / "worker.py"
    rows = "for length in json.loads(sys.argv[2])['lengths']: print(json.dumps({'length': length}), flush=True)"
    script.write_text(f"import json, sys\nprint('output of a library')\n{rows}\n{end}\n")
    found = list(recording.worker_rows(str(script), {"threads": 1, "lengths": [1, 2]}))
    assert found[:2] == [{"length": 1}, {"length": 2}]
    assert found[-1] == last
    assert recording.run_worker(str(script), {"threads": 1, "lengths": [1, 2]}) == last


@pytest.mark.parametrize("separator", [" ", "="])
def test_command_hides_paths_of_the_machine(monkeypatch, separator):
    options = "--resume --device cuda --output_dir=elsewhere/out --authors=elsewhere/ma2mba --lengths 1 2 --plot_only"
    monkeypatch.setattr(sys, "argv", ["elsewhere/longest.py", *options.replace("=", separator).split()])
    expected = "python benchmarks/longest.py --device cuda --authors PATH --lengths 1 2"
    assert recording.command_line("elsewhere/longest.py") == expected


# Steps


def test_all_methods_have_the_same_loss_and_gradients():
    steps = {method: TrainingStep({**JOB, "method": method}) for method in METHODS}
    gradients = {}
    for method, step in steps.items():
        torch.manual_seed(1)
        assert step(70) > 0
        gradients[method] = {name: p.grad for name, p in step.model.named_parameters()}
    names = list(gradients["none"])
    for method, step in steps.items():
        assert step.loss == pytest.approx(steps["none"].loss, rel=1e-5)
        assert step.has_finite_gradients()
        assert step.gradient_bytes() == sum(p.nbytes for p in step.model.parameters())
        if method != "every-sqrt":  # its layers have other names
            for name in names:
                torch.testing.assert_close(gradients[method][name], gradients["none"][name], rtol=1e-3, atol=1e-6)


class FullStep(training_step.Step):
    """A step that runs out of memory beyond 100 tokens."""

    def make_model(self, job):
        return torch.nn.Linear(2, 2)

    def forward(self, length):
        if length > 100:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.model(torch.ones(2)).sum()


def test_length_that_does_not_fit_ends_a_method(tmp_path, monkeypatch):
    monkeypatch.setitem(training_step.WARM_UP_TOKENS, "cpu", 10)
    monkeypatch.setattr(training_step, "worker_rows", lambda script, job: measure_lengths(job, FullStep))
    record = Record(tmp_path / "x.json", {"environment": ENVIRONMENT})
    training_step.measure_by_method(record, JOB, ["none"], [50, 100, 200, 400], 3, "script.py")
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["length"] for row in rows] == [50, 100, 200, 400]
    assert [row.get("skipped") for row in rows] == [None, None, "out of memory", "a shorter sequence did not fit"]
    assert len(rows[0]["step_seconds"]) == 2  # the first of three does not count
    assert rows[0]["activation_bytes"] == rows[0]["peak_bytes"] - rows[0]["gradient_bytes"]


def test_plans_of_the_longest_steps_fit_device_and_host(monkeypatch):
    job = {**JOB, "device": "cuda", "dtype": "bfloat16", "shape": Ma2mbaConfig().text_config.to_dict()}
    monkeypatch.setattr(plans, "available_bytes", lambda: 120e9)
    for length in longest.LENGTHS:
        plan = plans.plan_of(
            {**job, "method": "MA-GC-offload", "length": length, "ma_gc": plans.fitting_settings(job, length)}
        )
        assert plan["host_bytes"] < 108e9
        assert plan["device_bytes"] < 70e9
    monkeypatch.setattr(plans, "available_bytes", lambda: 1e9)
    with pytest.raises(ValueError, match="no plan for 4,194,304 tokens fits"):
        plans.fitting_settings(job, 2**22)


# Rehearsals


@pytest.fixture
def in_this_process(monkeypatch):
    """Run workers without processes of their own, and return the list of their jobs."""
    workers = {
        memory.__file__: measure_lengths,
        speed.__file__: measure_lengths,
        side_by_side.__file__: side_by_side.measure_side,
        longest.__file__: longest.measure_longest,
        breakdown.__file__: breakdown.measure_one,
        film.__file__: film.measure_one,
    }
    jobs = []

    def rows(script, job, extra_environment=None):
        jobs.append(json.loads(json.dumps(job)))
        return workers[script](jobs[-1])

    monkeypatch.setitem(training_step.WARM_UP_TOKENS, "cpu", 40)
    for module in (training_step, film, breakdown):
        monkeypatch.setattr(module, "worker_rows", rows)
    for module in (memory, speed):
        monkeypatch.setattr(module, "run_worker", lambda *arguments: list(rows(*arguments))[-1])
    return jobs


def run_main(module, monkeypatch, output_dir, *options):
    words = ["--threads", "1", "--output_dir", str(output_dir), *options]
    monkeypatch.setattr(sys, "argv", [module.__file__, *words])
    module.main()


def rehearse(module, monkeypatch, output_dir, *options):
    run_main(module, monkeypatch, output_dir, "--tiny", *options)


SCRIPTS = {
    "memory_cuda": (memory, [(method, length) for method in GPU_METHODS for length in TINY_LENGTHS]),
    "side_by_side": (side_by_side, [("MA-GC", length) for length in TINY_LENGTHS]),
    "longest": (longest, [("MA-GC-offload", length) for length in TINY_LENGTHS]),
    "film": (film, [("train", 6), ("watch", 4), ("watch", 8), ("watch", 12)]),
    "breakdown": (breakdown, [("watching",), ("training",), ("offload",)]),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_rehearsal_measures_and_resumes(name, tmp_path, monkeypatch, in_this_process):
    module, expected = SCRIPTS[name]
    keys = {"film": ("part", "film_seconds"), "breakdown": ("what",)}.get(name, ("method", "length"))
    rehearse(module, monkeypatch, tmp_path)
    results = json.loads((tmp_path / f"{name}.json").read_text())
    assert [tuple(row[key] for key in keys) for row in results["rows"]] == expected
    for row in results["rows"]:
        assert row["seconds"] > 0
        assert row.get("finite", True)
        assert 0 < row.get("loss", 1.0) < 10
        assert row.get("peak_bytes", 0) >= 0
    assert results["environment"]["torch"] == torch.__version__.split("+")[0]
    assert str(tmp_path) not in json.dumps(results)

    # As if cut off before the last row: only that row is measured.
    lost = results["rows"].pop()
    (tmp_path / f"{name}.json").write_text(json.dumps(results))
    in_this_process.clear()
    rehearse(module, monkeypatch, tmp_path, "--resume")
    resumed = json.loads((tmp_path / f"{name}.json").read_text())
    assert resumed["rows"][:-1] == results["rows"]
    assert all(resumed["rows"][-1][key] == lost[key] for key in keys)
    assert len(in_this_process) == 1

    in_this_process.clear()
    rehearse(module, monkeypatch, tmp_path, "--resume")
    assert not in_this_process
    assert json.loads((tmp_path / f"{name}.json").read_text()) == resumed


def test_speed_takes_over_the_rows_of_memory(tmp_path, monkeypatch, in_this_process):
    rehearse(memory, monkeypatch, tmp_path, "--methods", "none", "MA-GC", "--lengths", "40")
    in_this_process.clear()
    rehearse(speed, monkeypatch, tmp_path, "--methods", "none", "MA-GC", "--lengths", "40", "--resume")
    assert not in_this_process
    rows = json.loads((tmp_path / "speed_cuda.json").read_text())["rows"]
    assert [row["tokens_per_second"] > 0 for row in rows] == [True, True]
    rehearse(speed, monkeypatch, tmp_path, "--methods", "none", "--lengths", "40", "50", "--resume")
    assert [job["lengths"] for job in in_this_process] == [[50]]


@pytest.mark.parametrize("module", [memory, speed])
def test_methods_are_measured_in_processes_of_their_own_on_a_cpu(module, tmp_path, monkeypatch, in_this_process):
    options = ("--device", "cpu", "--num_hidden_layers", "2", "--methods", "none", "MA-GC", "--lengths", "40", "50")
    run_main(module, monkeypatch, tmp_path, *options)
    path = tmp_path / f"{module.__name__}.json"
    results = json.loads(path.read_text())
    assert [(row["method"], row["length"]) for row in results["rows"]] == [
        ("none", 40),
        ("MA-GC", 40),
        ("none", 50),
        ("MA-GC", 50),
    ]
    assert all(row["seconds"] for row in results["rows"])
    assert all(len(job["lengths"]) == 1 for job in in_this_process)
    assert path.with_suffix(".md").read_text() == module.report(results)

    in_this_process.clear()
    run_main(module, monkeypatch, tmp_path, *options, "--resume")
    assert not in_this_process


def test_rows_of_a_cpu_are_skipped_without_the_memory(tmp_path, monkeypatch):
    record = Record(tmp_path / "x.json", {"environment": ENVIRONMENT})
    job = {**JOB, "step": "embeddings"}
    record.add({"method": "none", "length": 8, "failed": "some error"})
    assert "skipped" not in training_step.new_row(record, job, "none", 16)
    record.add({"method": "none", "length": 16, "peak_bytes": 10**15, "seconds": 1.0})
    record.add({"method": "MA-GC", "length": 16, "peak_bytes": 10**15, "seconds": 1.0})
    row = training_step.new_row(record, job, "none", 32)
    assert row["skipped"].startswith("expected to take 2000000.0 GB")
    assert "skipped" not in training_step.new_row(record, job, "MA-GC", 32)  # its plan takes less
    record.add(row)
    assert training_step.new_row(record, job, "none", 64)["skipped"] == row["skipped"]


def test_watching_ends_when_the_time_is_up(tmp_path, monkeypatch, in_this_process):
    rehearse(film, monkeypatch, tmp_path, "--parts", "watch", "--most_seconds", "0")
    rows = json.loads((tmp_path / "film.json").read_text())["rows"]
    assert [row["film_seconds"] for row in rows] == [
        3,
        4,
        8,
        12,
    ]  # 3 frames were seen
    assert rows[0]["seconds"] > 0
    assert all("seconds were over" in row["skipped"] for row in rows[1:])
    assert "– |" in film.report(json.loads((tmp_path / "film.json").read_text()))


@pytest.mark.parametrize("module", [memory, speed, side_by_side, longest, film, breakdown])
def test_rehearsal_refuses_the_folder_of_results(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module.__file__, "--tiny"])
    with pytest.raises(SystemExit):
        module.main()
    assert "give it an --output_dir of its own" in capsys.readouterr().err


# Pages


def results_of_gpu(rows, **more):
    job = {**JOB, "device": "cuda", "dtype": "bfloat16", "preset": "3.1b"}
    return {"command": "python x.py", "environment": ENVIRONMENT, "job": job, **more, "rows": rows}


def row_of_gpu(method, length, gigabytes, seconds):
    plan = {"order": "layer-major", "layer_interval": 8, "sequence_interval": 4096, "device_bytes": 2e9}
    return {
        "method": method,
        "length": length,
        "peak_bytes": int(gigabytes * 1e9 + 5e9),
        "gradient_bytes": int(5e9),
        "activation_bytes": int(gigabytes * 1e9),
        "reserved_bytes": int(20e9),
        "host_bytes": int(3e9),
        "seconds": seconds,
        "step_seconds": [seconds, seconds],
        "tokens_per_second": length / seconds,
        "loss": 10.8,
        "time": "2026-01-02 03:04",
        **({"plan": plan} if method.startswith("MA-GC") else {}),
    }


ROWS = [
    row_of_gpu("MA-GC", 2**14, 3.5, 1.0),
    row_of_gpu("MA-GC", 2**19, 21.0, 40.0),
    row_of_gpu("none", 2**14, 40.0, 0.5),
    {"method": "none", "length": 2**19, "skipped": "out of memory", "time": "2026-01-02 03:05"},
]


def test_pages_of_memory_and_speed_show_the_paper_s_figures():
    page = memory.report(results_of_gpu(ROWS))
    assert "| MA-GC | 3.50 | 21.0 |" in page
    assert "| MA-GC: paper | 4.2 | 42.2 |" in page
    assert "| no checkpointing | 40.0 | – |" in page
    assert "| no checkpointing: paper | 42.6 | – |" in page
    assert "| MA-GC: layers × tokens of a cell | 8 × 4,096 | 8 × 4,096 |" in page
    assert "“–” was not measured: out of memory." in page
    page = speed.report(results_of_gpu(ROWS))
    assert "| MA-GC | 524,288 | 13,107 | 7,914 | 1.66 |" in page
    assert "| no checkpointing | 16,384 | 32,768 | 12,168 | 2.69 |" in page


def test_page_compares_with_the_authors():
    theirs = row_of_gpu(AUTHORS, 2**19, 42.0, 80.0)
    page = side_by_side.report(results_of_gpu([*ROWS[:2], theirs], authors={"commit": "abc"}))
    assert "| **MA-GC / the authors' code: memory beyond weights and gradients** | – | 0.50 |" in page
    assert "| **MA-GC / the authors' code: speed** | – | 2.00 |" in page
    assert "commit abc" in page
    assert page.count("| the authors' code: tokens/s |") == page.count("| MA-GC: tokens/s |") == 1


def test_gpu_report_gathers_all_results(tmp_path):
    assert gpu_report.write_report(tmp_path) is None
    (tmp_path / "speed_cuda.json").write_text(json.dumps(results_of_gpu(ROWS)))
    train = {"part": "train", "film_seconds": 7200, "seconds": 90.0, "frames_per_second": 80.0, "peak_bytes": 40e9}
    train |= {"gradient_bytes": 6e9, "host_bytes": 60e9, "loss": 11.0, "finite": True}
    over = {"part": "watch", "film_seconds": 86400, "skipped": "300 seconds were over"}
    (tmp_path / "film.json").write_text(json.dumps(results_of_gpu([train, over])))
    page = gpu_report.write_report(tmp_path).read_text()
    assert "| training step, 2 hours | 90.0 | 80 | 40.0 | 34.0 | 60.0 | loss 11.000 | yes |" in page
    assert "| watching, 24 hours | – |" in page
    assert "The longest step" not in page
    assert "| MA-GC | 524,288 | 13,107 | 7,914 | 1.66 |" in page
    assert (tmp_path / "speed_cuda.png").exists() == ("(speed_cuda.png)" in page)


def read_results(name):
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["memory", "memory_default_allocator", "speed", "state", "video_reader", "watch"])
def test_pages_of_the_committed_results_are_up_to_date(name):
    module = {"speed": speed, "state": state, "video_reader": video_reader, "watch": watch}.get(name, memory)
    assert module.report(read_results(name)) == (BENCHMARKS / "results" / f"{name}.md").read_text()


def test_tables_of_the_committed_results_are_printed():
    assert "| demo, 4 heads | 9.7 ms | 5.2 ms | 1.9 |" in scan.report(read_results("scan"))
    assert needle.report(read_results("needle")).startswith("| viewer | films | answers | 1 min | 2 min |")


# Toy films


DEFAULT_CHECKPOINT = str(BENCHMARKS.parent / "transformers_ma2mba" / "default_checkpoint")


@pytest.fixture
def qa():
    return toy_films.load_pipeline(DEFAULT_CHECKPOINT)


def toy_film(seconds, **answers):
    rng = random.Random(seconds)
    return plan_film(seconds, {**toy_films.random_answers(rng), **answers}, rng)


def frames_of(film):
    return list(render(film))[::FPS]


def run_on_toy_films(module, monkeypatch, output_dir, *options):
    words = ["--clips_model", DEFAULT_CHECKPOINT, "--output_dir", str(output_dir), *options]
    monkeypatch.setattr(sys, "argv", [module.__file__, *words])
    module.main()
    return json.loads((output_dir / f"{module.__name__}.json").read_text())


def assert_states_close(cache, expected):
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.recurrent_states[0], other.recurrent_states[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.conv_states[0], other.conv_states[0], rtol=1e-4, atol=1e-4)


def test_toy_films_are_watched_quickly_with_the_same_result(qa):
    films = [toy_film(90), toy_film(90, flash="blue", count="four times")]
    encode, num_encoded = qa.model.model._encode_frames, []
    qa.model.model._encode_frames = lambda pixels: num_encoded.append(len(pixels)) or encode(pixels)
    quick = toy_films.watch(qa, films)
    assert 10 < sum(num_encoded) < 80
    del qa.model.get_video_features  # the model's own method again, which encodes every frame
    num_encoded.clear()
    plain = [qa.watch(frames_of(film), progress=False) for film in films]
    assert sum(num_encoded) == 180
    questions = [question for question, _ in QUESTIONS.values()]
    for session, expected in zip(quick, plain, strict=True):
        assert session.num_frames == expected.num_frames == 90
        assert_states_close(session.state(), expected.state())
        found, other = (one.ask(questions, max_new_tokens=8) for one in (session, expected))
        assert [entry["answer"] for entry in found] == [entry["answer"] for entry in other]


def test_film_without_events_shows_one_picture():
    film = toy_films.without_events(toy_film(30))
    assert all((frame == paint(film)(0)).all() for frame in frames_of(film))
    assert len(frames_of(film)) == 30


def test_missing_checkpoint_is_named():
    with pytest.raises(SystemExit, match="demo/nothing is not a folder with a checkpoint"):
        toy_films.load_pipeline("demo/nothing")


@pytest.mark.parametrize("seconds", [16, 160])
def test_sampled_frames_are_evenly_spread(seconds):
    seen = []
    for second in range(seconds):
        film = {**toy_films.without_events(toy_film(seconds)), "flash": ("red", second)}
        frames = needle.sample_frames(film, random.Random(5))
        assert len(frames) == needle.NUM_SAMPLED
        if any((frame[0, 0] == COLOURS["red"]).all() for frame in frames):
            seen.append(second)
    assert len(seen) == needle.NUM_SAMPLED
    assert {later - earlier for earlier, later in zip(seen, seen[1:], strict=False)} == {seconds // 16}


def test_needle_compares_three_viewers(tmp_path, monkeypatch):
    options = ("--minutes", "0.25", "--depths", "50", "--films", "4")
    results = run_on_toy_films(needle, monkeypatch, tmp_path, *options)
    assert len(results["cells"]) == 3 * 2
    for cell in results["cells"]:
        assert len(cell["wrong"]) == round((1 - cell["accuracy"]) * 4)
        if cell["viewer"] != "sampled":
            assert cell["accuracy"] == cell["ranked_accuracy"] == 1
    report = needle.report(results)
    assert "| clips | quiet | word for word | 1.00 |" in report
    assert "| sampled | busy | ranked |" in report


def test_half_lives_follow_decay_and_time_step(qa):
    for layer in qa.model.model.language_model.layers:
        with torch.no_grad():
            layer.mixer.in_proj.weight[-layer.mixer.num_heads :] = 0
            layer.mixer.dt_bias.fill_(-2.252168)  # softplus gives 0.1
            layer.mixer.A_log.fill_(-4.60517)  # A = 0.01
    found = state.measure_film(qa, 40, seed=0)
    assert found["A"] == [[0.01] * 6] * 3
    assert torch.tensor(found["half_lives"]).shape == (3, 6)
    for name in ("half_lives", "half_lives_at_events"):
        torch.testing.assert_close(torch.tensor(found[name]), torch.full((3, 6), 693.1), rtol=1e-3, atol=0)


def test_norms_are_those_of_the_state_at_their_moment(qa):
    found = state.measure_film(qa, 40, seed=0)
    rng = random.Random(0)
    planned = plan_film(40, toy_films.random_answers(rng), rng)
    frames, still = frames_of(planned), paint(toy_films.without_events(planned))(0)
    assert found["event_seconds"] == [second for second in range(40) if (frames[second] != still).any()]
    assert found["moments"][0] == 1 and found["moments"][-1] == 40
    for place in (4, -1):
        cache = qa.watch(frames[: found["moments"][place]], progress=False).state()
        torch.testing.assert_close(torch.tensor(found["norms"][place]), state.norms(cache), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("place", ["start", "anywhere", "end"])
def test_events_are_at_their_place(place):
    film, answers = state.plan(place, 600, seed=0, index=3)
    assert film["seconds"] == 600
    still = paint(toy_films.without_events(film))(0)
    seconds = [second for second, frame in enumerate(frames_of(film)) if (frame != still).any()]
    first, last = {"start": (0, 19), "anywhere": (0, 599), "end": (580, 599)}[place]
    assert first <= seconds[0] and seconds[-1] <= last
    if place != "anywhere":
        assert answers["when"] == place
        clip, _ = state.plan("start" if place == "start" else "end", 20, seed=0, index=3)
        assert all((paint(film)(first + second) == paint(clip)(second)).all() for second in range(20))


def test_background_and_trace_add_up_to_the_state(qa):
    examiner = state.Examiner(qa, num_films=2, seed=0)
    films, right = examiner.planned("start", 60)
    backgrounds, traces = examiner.events_at_start(60)
    states = state.sums(backgrounds, traces)
    for cache, planned in zip(states, films, strict=True):
        assert_states_close(cache, qa.watch(frames_of(planned), progress=False).state())
    assert state.mean_norms(traces).min() >= 0 and state.mean_norms(traces).max() > 1
    assert examiner.accuracy(states, right)["all"] > 0.8  # a minute is near the lengths of its training
    wrong = [{**answers, "flash": "none"} for answers in right]
    assert examiner.accuracy(states, wrong)["flash"] == 0
    assert state.largest_difference(states, states) == 0


def test_state_measures_three_models(tmp_path, monkeypatch):
    options = ("--untrained", DEFAULT_CHECKPOINT, "--seconds", "30", "--hours", "0.008", "--films", "1")
    results = run_on_toy_films(state, monkeypatch, tmp_path, *options)
    assert list(results["models"]) == ["untrained", "clips", "films"]
    for name in ("clips", "films"):
        [row] = results["models"][name]["hours"]
        assert row["hours"] == 0.008
        assert row["accuracy"]["start"] == row["accuracy"]["start, float64"]
        assert 0 < row["rounding"] < 1e-4
    page = (tmp_path / "state.md").read_text()
    assert page == state.report(results)
    assert "| model | layer | head 0 |" in page and "| the same films in float64 | events anywhere |" in page


# The script that runs them all


def run_script(*words):
    return subprocess.run(["bash", str(BENCHMARKS / "gpu.sh"), *words], capture_output=True, text=True)


def test_gpu_script_shows_its_plan():
    subprocess.run(["bash", "-n", str(BENCHMARKS / "gpu.sh")], check=True)
    plan = run_script("--dry-run")
    assert plan.returncode == 0, plan.stderr
    parts = [line[3:] for line in plan.stdout.splitlines() if line.startswith("== ")]
    assert parts == "build check memory speed side-by-side longest film profile report".split()
    for script in ("memory", "speed", "side_by_side", "longest", "film", "breakdown", "gpu_report"):
        assert f"benchmarks/{script}.py" in plan.stdout
    for path in re.findall(r"\b(?:benchmarks|tests)/[\w/]+\.py", plan.stdout):
        assert (BENCHMARKS.parent / path).exists(), path
    assert "benchmarks/film.py --device cuda" in run_script("--dry-run", "--limit", "0", "film").stdout


def test_gpu_script_refuses_unknown_parts():
    wrong = run_script("memroy")
    assert wrong.returncode == 2 and "There is no part or option memroy" in wrong.stderr
    assert run_script("--tiny").returncode == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_script_needs_a_gpu():
    without = run_script("memory")
    assert without.returncode == 1
    assert without.stderr.startswith("PyTorch sees no CUDA device here") and len(without.stderr.splitlines()) == 1
