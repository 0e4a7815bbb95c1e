"""The command `transformers-ma2mba`: what `plan` counts, what `ask` answers, and what they say of mistakes."""

import json
import re
import subprocess
import sys

import pytest
from tiny import ROOT, approximately, tiny_text_config
from video_files import write_index_video

from transformers_ma2mba.checkpoint_plan import plan_checkpoints, smallest_plan
from transformers_ma2mba.command_line import main
from transformers_ma2mba.configuration_ma2mba import Ma2mbaConfig

GiB = 2**30


@pytest.fixture
def plan(capsys):
    """Runs `plan` with arguments, and returns what it prints."""

    def run(*arguments):
        assert main(["plan", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return run


def plan_json(plan, *arguments):
    return json.loads(plan(*arguments, "--json"))


def test_parts_of_the_published_model(plan):
    report = plan_json(plan, "--preset", "3.1b", "--seconds", 600)
    device = report["device"]
    assert report["frames"] == 600
    assert report["tokens"] == 600 * 144 + 256
    assert device["weights: language model"] == 2 * 2_702_579_200
    assert device["weights: vision tower and projector"] == 2 * (303_507_456 + 9_180_160)
    # What no feature reaches is not trained: the last layer of the vision tower, and its last norm.
    assert report["parameters"] - report["trained_parameters"] == 12_596_224 + 2048
    assert device["gradients"] == 2 * report["trained_parameters"]
    assert device["optimizer state"] == 12 * report["trained_parameters"]
    expected = plan_checkpoints(Ma2mbaConfig.from_preset("3.1b"), report["tokens"])
    assert device["activations of the language model (MA-GC)"] == expected.device_bytes
    assert report["host"] == {"checkpoints": 0, "pixels (uint8)": 600 * 3 * 336**2}
    # The vision tower's backward comes after the language model's.
    assert report["device_total"] == sum(device.values()) - device["vision tower"]
    assert report["fits"] is None


def test_a_checkpoint_is_counted_as_the_model_counts_itself(plan, checkpoint, model):
    report = plan_json(plan, "--model", checkpoint, "--tokens", 100, "--dtype", "float32")
    assert report["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert report["trained_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report["device"]["optimizer state"] == 8 * report["trained_parameters"]
    assert report["tokens"] == 100
    assert report["frames"] == 25


def test_options_change_what_they_are_about(plan):
    plain = plan_json(plan, "--preset", "0.7b", "--seconds", 100)
    frozen = plan_json(plan, "--preset", "0.7b", "--seconds", 100, "--freeze_vision", "--optimizer", "none")
    assert frozen["device"]["optimizer state"] == 0
    assert frozen["device"]["gradients"] < plain["device"]["gradients"]
    assert frozen["device"]["vision tower"] == plain["device"]["vision tower"] / 23
    faster = plan_json(plan, "--preset", "0.7b", "--seconds", 100, "--frame_rate", 2.5, "--text_tokens", 0)
    assert faster["frames"] == 250
    assert faster["tokens"] == 250 * 144
    twice = plan_json(plan, "--preset", "0.7b", "--seconds", 100, "--batch_size", 2)
    assert twice["host"]["pixels (uint8)"] == 2 * plain["host"]["pixels (uint8)"]
    offloaded = plan_json(plan, "--preset", "0.7b", "--seconds", 100, "--offload")
    assert offloaded["host"]["checkpoints"] > 0
    assert offloaded["device_total"] < plain["device_total"]


def test_a_budget_gets_an_answer(plan):
    text = plan("--preset", "0.7b", "--seconds", 36000, "--memory_budget", "24GiB")
    seconds = int(
        re.search(r"It does not fit 24\.0 GiB, even with this plan, the smallest\. Up to ([\d,]+) s of film", text)[
            1
        ].replace(",", "")
    )
    assert 0 < seconds < 36000
    assert "It fits 24.0 GiB." in plan("--preset", "0.7b", "--seconds", seconds, "--memory_budget", "24GiB")
    longer = seconds + 10
    assert "It does not fit" in plan("--preset", "0.7b", "--seconds", longer, "--memory_budget", "24GiB")

    report = plan_json(plan, "--preset", "0.7b", "--seconds", seconds, "--memory_budget", "24GiB")
    assert report["fits"] is True
    assert report["device_total"] <= 24 * GiB
    too_much = plan_json(plan, "--preset", "3.1b", "--seconds", 60, "--memory_budget", "8GiB")
    assert too_much["fits"] is False
    assert too_much["longest_tokens"] == too_much["longest_seconds"] == 0
    tokens = too_much["tokens"]
    assert too_much["plan"]["cell_bytes"] == smallest_plan(Ma2mbaConfig.from_preset("3.1b"), tokens).cell_bytes
    assert "Nothing fits, however short: all but activations takes 44.8 GiB." in plan(
        "--preset", "3.1b", "--seconds", 60, "--memory_budget", "8GiB"
    )


def test_table_is_for_people(plan):
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
    report = plan_json(plan, "--model", tmp_path, "--tokens", 500, "--memory_budget", "1GB")
    assert report["fits"] is True
    assert report["frames"] == report["device"]["vision tower"] == 0
    assert "longest_seconds" not in report
    assert "tokens would fit." in plan("--model", tmp_path, "--tokens", 500, "--memory_budget", "1GB")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--preset 9b --seconds 3", "There is no preset '9b'; choose one of 0.7b, 1.8b, 3.1b."),
        ("--preset 0.7b --seconds -3", "argument --seconds: it must be a number above 0; got '-3'"),
        ("--preset 0.7b --seconds nan", "argument --seconds: it must be a number above 0; got 'nan'"),
        ("--preset 0.7b --tokens 0", "argument --tokens: it must be a whole number above 0; got '0'"),
        ("--preset 0.7b --seconds 3 --text_tokens -1", "--text_tokens cannot be negative; got -1."),
        ("--preset 0.7b --seconds 3 --memory_budget lots", "'lots' is not a size of memory"),
        ("--preset 0.7b --seconds 3 --model .", "not allowed with argument --preset"),
        ("--preset 0.7b", "one of the arguments --seconds --tokens is required"),
        ("--seconds 3", "one of the arguments --preset --model is required"),
        ("--model {tmp}/absent --tokens 4", "There is no config.json in"),
        ("--model {tmp}/broken --tokens 4", "cannot be read"),
        ("--model {tmp}/other --tokens 4", "holds a 'clip' model; plan knows ma2mba and mamba2."),
        ("--model {tmp}/mamba --seconds 4", "This model has no vision tower: give --tokens instead of --seconds."),
    ],
)
def test_mistakes_end_in_one_sentence(capsys, tmp_path, arguments, message):
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


# ask


@pytest.fixture
def ask(capsys, checkpoint):
    """Runs `ask` with arguments, and returns what it prints."""

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


def test_what_was_saved_is_resumed(ask, film, tmp_path):
    path = tmp_path / "film.safetensors"
    first = ask(film, "Why?", "Who?", "--max_new_tokens", 4, "--save", path)
    assert ask("Why?", "Who?", "--max_new_tokens", 4, "--resume", path) == first


def test_the_model_in_the_package_answers(capsys, film):
    assert main(["ask", str(film), "Which shape appears?", "--max_new_tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"].endswith("default_checkpoint")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{film}"], "There is no question: give one, or several, behind"),
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
def test_mistakes_in_asking_end_in_one_sentence(capsys, tmp_path, checkpoint, film, arguments, message):
    tiny_text_config().save_pretrained(tmp_path / "mamba")
    (tmp_path / "notes.mp4").write_text("This is no film. " * 100)
    arguments = [argument.format(tmp=tmp_path, film=film) for argument in arguments]
    if "--model" not in arguments:
        arguments += ["--model", str(checkpoint)]
    with pytest.raises(SystemExit) as error:
        main(["ask", *arguments])
    assert error.value.code == 2
    assert message.format(tmp=tmp_path, film=film) in capsys.readouterr().err


def test_a_film_cut_off_in_the_middle_is_answered_about(ask, capsys, tmp_path, checkpoint):
    path = tmp_path / "cut.mp4"
    write_index_video(path, 80, fps=4, preset="ultrafast", faststart=True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main(["ask", str(path), "Why?", "--max_new_tokens", "2", "--model", str(checkpoint)]) == 0
    captured = capsys.readouterr()
    assert "transformers-ma2mba ask: warning: " in captured.err and "cut.mp4 ends early" in captured.err
    assert captured.out.startswith("Why?\n")


def test_plan_says_what_offloading_would_take(capsys):
    arguments = ["plan", "--preset", "3.1b", "--seconds", "7200", "--memory_budget", "45GiB"]
    assert main(arguments) == 0
    (said,) = re.findall(r"With --offload it would take ([\d.]+) GiB at least", capsys.readouterr().out)
    assert main([*arguments, "--offload", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "bytes_with_offload" not in report
    assert report["fits"] == (float(said) <= 45)


def test_plan_with_fused_kernels_takes_less(capsys):
    def planned(*arguments):
        assert main(["plan", "--preset", "3.1b", "--tokens", "524288", *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["plan"]

    assert sum(planned("--fused")[part] for part in ("cell_bytes", "segment_bytes")) < planned()["cell_bytes"]
