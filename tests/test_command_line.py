"""The command `transformers-ma2mba`: options, output and error messages."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, approximately, tiny_text_config
from transformers import AutoModel, AutoProcessor
from video_files import write_index_video

from transformers_ma2mba.command_line import main
from transformers_ma2mba.configuration_ma2mba import Ma2mbaConfig
from transformers_ma2mba.gradient_checkpointing.training_memory import estimate_training_memory


@pytest.fixture
def plan(capsys):
    """Run `plan` with arguments, and return its output."""

    def run(*arguments):
        assert main(["plan", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return run


def test_json_has_the_whole_result(plan):
    arguments = ("--preset", "0.7b", "--seconds", 100, "--fps", 2.5, "--text_tokens", 0, "--memory_budget", "24GiB")
    options = dict(seconds=100, fps=2.5, text_tokens=0, memory_budget="24GiB")
    memory = estimate_training_memory(Ma2mbaConfig.from_preset("0.7b"), **options)
    report = json.loads(plan(*arguments, "--json"))
    for name, value in dataclasses.asdict(memory).items():
        if name == "plan":
            value = {**value, "extra_compute": memory.plan.extra_compute}
        if name != "bytes_with_offload":
            assert report.pop(name) == value, name
    assert report.pop("host_total") == sum(memory.host.values())
    rest = {"model": "0.7b", "seconds": 100, "batch_size": 1, "dtype": "bfloat16", "optimizer": "adamw"}
    assert report == rest


def test_options_reach_the_result(plan, checkpoint):
    arguments = "--tokens 100 --dtype float32 --batch_size 2 --optimizer none --freeze_vision --offload --fused --json"
    report = json.loads(plan("--model", checkpoint, *arguments.split()))
    options = dict(dtype="float32", batch_size=2, optimizer="none", freeze_vision=True, offload=True, fused=True)
    memory = estimate_training_memory(Ma2mbaConfig.from_pretrained(checkpoint), tokens=100, **options)
    assert report["device"] == memory.device and report["host"] == memory.host
    assert "longest_tokens" not in report and "bytes_with_offload" not in report


def test_a_budget_gets_a_verdict(plan):
    def verdict(*arguments):
        return plan(*arguments, "--memory_budget", "24GiB")

    text = verdict("--preset", "0.7b", "--seconds", 36000)
    pattern = r"It does not fit 24\.0 GiB, even with this plan, the smallest\. Up to ([\d,]+) s of film, "
    seconds = int(re.search(pattern, text)[1].replace(",", ""))
    assert re.search(r"With --offload it would take [\d.]+ GiB at least\.", text)
    assert "It fits 24.0 GiB." in verdict("--preset", "0.7b", "--seconds", seconds)
    assert "Nothing fits, however short: all but activations takes 44.8 GiB." in verdict(
        "--preset", "3.1b", "--seconds", 60
    )


def test_the_table_names_all_parts(plan):
    text = plan("--preset", "3.1b", "--seconds", 7200, "--memory_budget", "80GiB", "--offload")
    for words in (
        "3.1b, 3.02B parameters, bfloat16, batch size 1, optimizer adamw",
        "7,200 s at 1 FPS: 7,200 frames, 1,037,056 tokens",
        "weights: language model",
        "gradients",
        "optimizer state",
        "pixels (uint8)",
        "MA-GC plan for 1 x 1,037,056 tokens, 64 layers",
        "Optimizer: AdamW: two moments in float32",
    ):
        assert words in text
    assert all(len(line) <= 110 for line in text.splitlines())


def test_a_language_model_alone(plan, tmp_path):
    tiny_text_config().save_pretrained(tmp_path)
    arguments = ("--model", tmp_path, "--tokens", 500, "--memory_budget", "1GB")
    assert "longest_seconds" not in json.loads(plan(*arguments, "--json"))
    assert re.search(r"It fits [\d.]+ MiB\. Up to [\d,]+ tokens would fit\.", plan(*arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--preset 9b --seconds 3", "There is no preset '9b'; choose one of 0.7b, 1.8b, 3.1b."),
        ("--preset 0.7b --seconds -3", "argument --seconds: it must be a number above 0; got '-3'"),
        ("--preset 0.7b --seconds nan", "argument --seconds: it must be a number above 0; got 'nan'"),
        ("--preset 0.7b --tokens 0", "argument --tokens: it must be a whole number above 0; got '0'"),
        ("--preset 0.7b --seconds 3 --text_tokens -1", "text_tokens cannot be negative; got -1."),
        ("--preset 0.7b --seconds 3 --memory_budget lots", "'lots' is not a size of memory"),
        ("--preset 0.7b --seconds 3 --model .", "not allowed with argument --preset"),
        ("--preset 0.7b", "one of the arguments --seconds --tokens is required"),
        ("--seconds 3", "one of the arguments --preset --model is required"),
        ("--model {tmp}/absent --tokens 4", "There is no config.json in"),
        ("--model {tmp}/broken --tokens 4", "cannot be read"),
        ("--model {tmp}/other --tokens 4", "holds a 'clip' model; plan knows ma2mba and mamba2."),
        (
            "--model {tmp}/mamba --seconds 4",
            "This model has no vision tower: give the length in tokens instead of seconds.",
        ),
    ],
)
def test_mistakes_in_plan_end_in_one_sentence(capsys, tmp_path, arguments, message):
    tiny_text_config().save_pretrained(tmp_path / "mamba")
    for name, text in (("broken", "{"), ("other", '{"model_type": "clip"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    with pytest.raises(SystemExit) as error:
        main(["plan", *arguments.format(tmp=tmp_path).split()])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_the_module_runs_by_itself():
    command = [sys.executable, "-m", "transformers_ma2mba.command_line", "plan", "--preset", "0.7b", "--seconds", "60"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "MA-GC plan for 1 x 8,896 tokens, 48 layers" in result.stdout
    assert "Traceback" not in result.stderr


@pytest.fixture
def ask(capsys, checkpoint):
    """Run `ask` with arguments, and return its output."""

    def run(*arguments):
        assert main(["ask", *map(str, arguments), "--model", str(checkpoint)]) == 0
        return capsys.readouterr().out

    return run


def test_questions_are_answered(ask, qa, film):
    questions = ["Who opens the door?", "Why?"]
    report = json.loads(ask(film, *questions, "--max_new_tokens", 4, "--json"))
    expected = qa(video=film, question=questions, max_new_tokens=4)
    given = [{name: entry[name] for name in ("answer", "score")} for entry in report["answers"]]
    assert given == approximately(expected)
    assert [entry["question"] for entry in report["answers"]] == questions
    assert (report["film"], report["frames"], report["seconds"]) == (str(film), 6, 6.0)
    assert json.loads(ask(film, "Why?", "--fps", 2, "--json", "--max_new_tokens", 1))["frames"] == 12


def test_candidates_are_ranked(ask, qa, film):
    ranked = qa(video=film, question="Why?", candidates=["red", "blue"])
    lines = [f"  {entry['score']:.3f}  {entry['answer']}" for entry in ranked]
    assert ask(film, "Why?", "--candidates", "red", "blue").splitlines() == ["Why?", *lines]


def test_a_saved_state_is_resumed(ask, film, tmp_path):
    path = tmp_path / "film.safetensors"
    first = ask(film, "Why?", "Who?", "--max_new_tokens", 4, "--save", path)
    assert ask("Why?", "Who?", "--max_new_tokens", 4, "--resume", path) == first


def test_the_model_in_the_package_answers(capsys, film):
    assert main(["ask", str(film), "Which shape appears?", "--max_new_tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"].endswith("default_checkpoint")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{film}"], "There is no question: give one or several after"),
        (["{film}", " "], "question must be a text or a list of texts, none of them empty"),
        (["{tmp}/nowhere.mp4", "Why?"], "There is no file {tmp}/nowhere.mp4: check its path."),
        (["{tmp}/notes.mp4", "Why?"], "is not a video that FFmpeg can read"),
        (["{film}", "Why?", "--fps", "0"], "argument --fps: it must be a number above 0; got '0'"),
        (["{film}", "Why?", "--max_new_tokens", "x"], "--max_new_tokens: it must be a whole number above 0; got 'x'"),
        (["{film}", "Why?", "--candidates", ""], "candidates must be a list of answers, none of them empty"),
        (["{film}", "Why?", "--model", "{tmp}"], "There is no config.json in"),
        (["{film}", "Why?", "--model", "{tmp}/mamba"], "holds a 'mamba2' model; ask knows ma2mba."),
        (["{film}", "Why?", "--save", "{tmp}/nowhere/state"], "There is no directory {tmp}/nowhere to save"),
        (["Why?", "--resume", "{tmp}/state"], "There is no file {tmp}/state: check its path."),
        (["Why?", "--resume", "{tmp}/notes.mp4"], "notes.mp4 is not the saved state of a film"),
        (["{film}", "Why?", "--resume", "{tmp}/state"], "has been watched already: leave out '{film}'"),
        (["Why?", "--fps", "2", "--resume", "{tmp}/state"], "has been watched already: leave out --fps 2"),
    ],
)
def test_mistakes_in_ask_end_in_one_sentence(capsys, tmp_path, checkpoint, film, arguments, message):
    tiny_text_config().save_pretrained(tmp_path / "mamba")
    (tmp_path / "notes.mp4").write_text("This is no film. " * 100)
    arguments = [argument.format(tmp=tmp_path, film=film) for argument in arguments]
    if "--model" not in arguments:
        arguments += ["--model", str(checkpoint)]
    with pytest.raises(SystemExit) as error:
        main(["ask", *arguments])
    assert error.value.code == 2
    assert message.format(tmp=tmp_path, film=film) in capsys.readouterr().err


def test_a_film_that_ends_early_is_answered_with_a_warning(ask, capsys, tmp_path, checkpoint):
    path = tmp_path / "cut.mp4"
    write_index_video(path, 80, fps=4, preset="ultrafast", faststart=True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main(["ask", str(path), "Why?", "--max_new_tokens", "2", "--model", str(checkpoint)]) == 0
    captured = capsys.readouterr()
    assert "transformers-ma2mba ask: warning: " in captured.err and "cut.mp4 ends early" in captured.err
    assert captured.out.startswith("Why?\n")


# build, convert, export


def test_weights_from_build_to_export_and_back(tmp_path, capsys, checkpoint):
    """`export` takes a model apart, `build` puts one together, `convert` reads what `export` wrote."""
    config = Ma2mbaConfig.from_pretrained(checkpoint)
    model = AutoModel.from_pretrained(checkpoint)
    vision = tmp_path / "clip"
    model.model.vision_tower.save_pretrained(vision)

    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 0
        assert capsys.readouterr().out == f"Wrote {arguments[-1]}.\n"
        return arguments[-1]

    original = run("export", checkpoint, "--layout", "original", "--output", tmp_path / "original")
    options = ("--language_model", original, "--vision_model", vision, "--dtype", "bfloat16", "--with_shim")
    built = run("build", *options, "--max_shard_size", "50KB", "--output", tmp_path / "built")
    assert (built / "ma2mba_shim.py").exists() and (built / "model.safetensors.index.json").exists()
    assert AutoModel.from_pretrained(built).dtype == torch.bfloat16
    published = tmp_path / "published"
    run("export", checkpoint, "--layout", "published", "--vision_tower", vision, "--output", published)
    again = run("convert", published, "--output", tmp_path / "again")
    weights = load_file(again / "model.safetensors")
    assert all(
        torch.equal(weights[name], weight) for name, weight in load_file(checkpoint / "model.safetensors").items()
    )
    assert Ma2mbaConfig.from_pretrained(again).tokens_per_frame == config.tokens_per_frame


@pytest.mark.parametrize(
    "arguments",
    [
        ("build", "--language_model", "nowhere", "--vision_model", "nowhere", "--output", "out"),
        ("convert", "nowhere", "--output", "out"),
        ("export", "nowhere", "--layout", "original", "--output", "out"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_folder_that_is_missing_ends_in_one_sentence(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    assert "nowhere" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


# check-data


@pytest.fixture
def lists(tmp_path):
    """Two lists: three questions about two films of 4 and 9 seconds, and a row whose film is missing."""
    for name, seconds in (("a", 4), ("b", 9)):
        write_index_video(tmp_path / f"{name}.mp4", seconds, fps=1)
    rows = [("a", "What?", "red"), ("b", "What?", "blue"), ("a", "When?", "now"), ("missing", "What?", "red")]
    rows = [
        {
            "id": f"{i}",
            "video": f"{video}.mp4",
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        }
        for i, (video, question, answer) in enumerate(rows)
    ]
    (tmp_path / "good.json").write_text(json.dumps(rows[:3]))
    (tmp_path / "bad.jsonl").write_text(json.dumps(rows[3]) + "\n" + '{"video": "a.mp4"}\n')
    return tmp_path


def test_check_data_reports_lengths_and_the_plan_for_the_longest(lists, checkpoint, capsys):
    arguments = ["check-data", str(lists / "good.json"), "--model", str(checkpoint), "--tokens_per_second", "10"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["answers"], report["videos"], report["broken"]) == (2, 3, 2, [])
    assert report["seconds"] == {"total": 13, "longest": 9, "histogram": [[4, 8, 1], [8, 16, 1]]}
    assert report["hours_per_epoch"] == report["tokens"]["total"] / 36000
    longest = report["longest"]
    assert (longest["name"], longest["frames"]) == ("1 (good.json, row 2)", 9)
    assert longest["tokens"] == longest["plan"]["tokens"] == report["tokens"]["longest"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "2 rows with 3 answers; 2 videos, 0 images" in text and "MA-GC plan for" in text
    assert re.search(r"4 to 8 #+ +1\n", text) and "An epoch takes 0.0" in text and "broken" not in text


def test_check_data_names_what_is_broken(lists, capsys):
    files = [str(lists / name) for name in ("good.json", "bad.jsonl")]
    assert main(["check-data", *files, "--preset", "3.1b"]) == 0
    text = capsys.readouterr().out
    assert "2 broken" in text and "3 (bad.jsonl, row 1): There is no file" in text and "bad.jsonl, row 2: " in text
    assert "Text is not counted" in text
    assert re.search(r"tokens of a row; 1,872 in all, 1,296 at most", text)  # 13 frames of 144 tokens


def test_check_data_without_any_good_row(lists, capsys):
    (lists / "bad.jsonl").write_text('{"video": "a.mp4"}\n')
    with pytest.raises(SystemExit, match="2"):
        main(["check-data", str(lists / "bad.jsonl"), "--preset", "3.1b"])
    assert "bad.jsonl, row 1" in capsys.readouterr().err


def test_check_data_without_the_library(lists, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match="2"):
        main(["check-data", str(lists / "good.json"), "--preset", "3.1b"])
    assert capsys.readouterr().err.endswith("pip install datasets, or transformers_ma2mba[train].\n")


def test_check_data_samples_as_the_processor_does(lists, checkpoint, tmp_path, capsys):
    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.video_processor.fps = 2.0
    AutoModel.from_pretrained(checkpoint).save_pretrained(tmp_path / "faster")
    processor.save_pretrained(tmp_path / "faster")
    assert main(["check-data", str(lists / "good.json"), "--model", str(tmp_path / "faster"), "--json"]) == 0
    longest = json.loads(capsys.readouterr().out)["longest"]
    assert longest["frames"] == 18 and longest["plan"]["frames"] == 18  # nine seconds
