"""The pipeline equals the model itself: answers, scores, ranks, and all forms of input."""

import math

import pytest
import torch
from datasets_in_memory import RowsDataset
from PIL import Image
from prompts import make_prompt
from tiny import approximately, padded_model, random_frames
from transformers import GenerationConfig, pipeline

from transformers_ma2mba import read_video

QUESTIONS = ["Who opens the door?", "Which colour is it?", "Why?"]
CANDIDATES = ["red", "green", "blue green", "yellow"]


@torch.no_grad()
def naive_log_probabilities(model, prompt, tokens: list[int]) -> torch.Tensor:
    """The log-probability of each token of an answer, by one forward pass over the whole text without a cache."""
    input_ids = torch.cat([prompt["input_ids"], torch.tensor([tokens])], 1)
    pixels = prompt["pixel_values_videos"]
    logits = model(input_ids=input_ids, pixel_values_videos=pixels, use_cache=False).logits[0].double()
    logits[:, [model.config.image_token_id, model.config.video_token_id]] = -torch.inf
    return torch.stack([logits[i - len(tokens) - 1].log_softmax(-1)[token] for i, token in enumerate(tokens)])


def naive_answer(model, processor, frames, question, **options) -> tuple[list[int], dict]:
    """The tokens of a plain `generate`, and the result that the pipeline should return for them."""
    prompt = make_prompt(processor, frames, question)
    tokens = model.generate(**prompt, **options)[0, prompt["input_ids"].shape[1] :].tolist()
    if 0 in tokens:
        tokens = tokens[: tokens.index(0) + 1]
    log_probabilities = naive_log_probabilities(model, prompt, tokens)
    answer = processor.decode(tokens, skip_special_tokens=True).strip()
    return tokens, {"answer": answer, "score": pytest.approx(math.exp(log_probabilities.mean()), rel=1e-4)}


@pytest.fixture(scope="module")
def frames():
    return random_frames(5, 48, 40)


# Answers


@pytest.mark.parametrize("options", [{}, dict(num_beams=3), dict(repetition_penalty=5.0)], ids=str)
@pytest.mark.parametrize("question", QUESTIONS)
def test_an_answer_equals_plain_generate(qa, model, processor, frames, question, options):
    """The score comes from the model's own probabilities, also where an option changes the choice of tokens."""
    tokens, expected = naive_answer(model, processor, frames, question, max_new_tokens=8, **options)
    assert qa(video=frames, question=question, max_new_tokens=8, **options) == expected
    assert len(tokens) > 1


def test_an_answer_may_be_empty(qa, model, processor, frames):
    """The score of an empty answer is the probability that the text ends at once."""
    end = naive_log_probabilities(model, make_prompt(processor, frames, "Why?"), [0])
    answer = qa(video=frames, question="Why?", sequence_bias={(0,): 100.0})
    assert answer == {"answer": "", "score": pytest.approx(math.exp(end), rel=1e-4)}


def test_several_questions_equal_one_by_one(qa, frames):
    one_by_one = [qa(video=frames, question=question, max_new_tokens=8) for question in QUESTIONS]
    assert qa(video=frames, question=QUESTIONS, max_new_tokens=8) == approximately(one_by_one)
    assert len({entry["answer"] for entry in one_by_one}) > 1
    assert qa(video=frames, question=QUESTIONS[:1], max_new_tokens=8) == one_by_one[:1]


def test_a_film_is_watched_once_for_several_questions(qa, frames, monkeypatch):
    calls = []
    features = qa.model.model.get_video_features
    monkeypatch.setattr(
        qa.model.model, "get_video_features", lambda pixels: calls.append(len(pixels)) or features(pixels)
    )
    qa(video=frames, question=QUESTIONS, max_new_tokens=2)
    qa(video=frames, question=QUESTIONS, candidates=CANDIDATES)
    assert calls == [3, 2, 3, 2]  # a few frames at a time


def test_sampling_and_several_answers(qa, model, processor, frames):
    options = dict(do_sample=True, temperature=0.7, top_k=20, max_new_tokens=6)
    torch.manual_seed(0)
    answers = qa(video=frames, question="Why?", num_return_sequences=3, **options)
    assert [set(entry) for entry in answers] == [{"answer", "score"}] * 3
    assert len({entry["answer"] for entry in answers}) > 1
    torch.manual_seed(0)
    again = qa(video=frames, question=["Why?"], num_return_sequences=3, **options)
    assert again == [answers]

    torch.manual_seed(1)
    _, expected = naive_answer(model, processor, frames, "Why?", **options)
    torch.manual_seed(1)
    assert qa(video=frames, question="Why?", **options) == expected


def test_several_beams_are_returned_best_first(qa, frames):
    answers = qa(video=frames, question="Why?", num_beams=3, num_return_sequences=3, max_new_tokens=4)
    assert len(answers) == 3
    scores = [entry["score"] for entry in answers]
    assert scores == sorted(scores, reverse=True)
    assert answers[0] == qa(video=frames, question="Why?", num_beams=3, max_new_tokens=4)


def test_generation_options(qa, model, processor, checkpoint, frames):
    _, three = naive_answer(model, processor, frames, "Why?", max_new_tokens=3)
    assert qa(video=frames, question="Why?", max_new_tokens=3) == three
    assert qa(video=frames, question="Why?", generation_config=GenerationConfig(max_new_tokens=3)) == three
    short = pipeline("video-question-answering", model=str(checkpoint), max_new_tokens=3)
    assert short(video=frames, question="Why?") == three
    _, five = naive_answer(model, processor, frames, "Why?", max_new_tokens=5, num_beams=2)
    assert short(video=frames, question="Why?", max_new_tokens=5, num_beams=2) == five


def test_misspelt_options_are_refused(qa, frames):
    with pytest.raises(ValueError, match="max_new_token"):
        qa(video=frames, question="Why?", max_new_token=3)


# Candidates


def naive_ranking(model, processor, frames, question, candidates):
    prompt = make_prompt(processor, frames, question)
    tokens = [processor.tokenizer(text)["input_ids"] + [processor.tokenizer.eos_token_id] for text in candidates]
    likelihoods = torch.stack([naive_log_probabilities(model, prompt, ids).sum() for ids in tokens]).exp()
    shares = (likelihoods / likelihoods.sum()).tolist()
    ranked = sorted(zip(candidates, shares, strict=True), key=lambda pair: -pair[1])
    return [{"answer": text, "score": pytest.approx(share, rel=1e-3)} for text, share in ranked]


@pytest.mark.parametrize("question", QUESTIONS)
def test_candidates_are_ranked_by_likelihood(qa, model, processor, frames, question):
    ranked = qa(video=frames, question=question, candidates=CANDIDATES)
    assert ranked == naive_ranking(model, processor, frames, question, CANDIDATES)
    assert sum(entry["score"] for entry in ranked) == pytest.approx(1)


def test_candidates_for_several_questions(qa, frames):
    ranked = qa(video=frames, question=QUESTIONS, candidates=CANDIDATES)
    one_by_one = [qa(video=frames, question=question, candidates=CANDIDATES) for question in QUESTIONS]
    assert ranked == approximately(one_by_one)


def test_one_candidate_is_certain(qa, frames):
    assert qa(video=frames, question="Why?", candidates=["red"]) == [{"answer": "red", "score": 1.0}]


@pytest.mark.parametrize("candidates", ["red", [], ["red", ""], ["red", " "], [1, 2]], ids=repr)
def test_bad_candidates(qa, frames, candidates):
    with pytest.raises(ValueError, match="candidates must be a list of answers, none of them empty"):
        qa(video=frames, question="Why?", candidates=candidates)


def test_placeholders_in_candidates_are_refused(qa, frames):
    with pytest.raises(ValueError, match="The candidate 'a <video>' contains a placeholder"):
        qa(video=frames, question="Why?", candidates=["red", "a <video>"])


def test_answers_and_scores_do_not_depend_on_the_padding(processor, frames):
    """Neither do they on the placeholders. The padding of one of the models would win each step."""
    answers = []
    for scale in (100, 0.1):
        qa = pipeline("video-question-answering", model=padded_model(scale), processor=processor)
        generated = [qa(video=frames, question=QUESTIONS, max_new_tokens=6, num_beams=beams) for beams in (1, 3)]
        answers.append([*generated, qa(video=frames, question=QUESTIONS, candidates=CANDIDATES)])
    assert answers[0] == answers[1]
    assert all(0 < entry["score"] < 1 for entry in answers[0][0])


# Watched once


def test_watch_and_resume(qa, film, frames, tmp_path):
    """See test_video_session.py for the sessions themselves."""
    expected = qa(video=film, question=QUESTIONS, max_new_tokens=6)
    watched = qa.watch(film, frames_per_piece=2)
    assert watched.ask(QUESTIONS, max_new_tokens=6) == approximately(expected)
    assert watched.num_frames == 6
    watched.save(tmp_path / "film.safetensors")
    resumed = qa.resume(tmp_path / "film.safetensors")
    assert resumed.ask(QUESTIONS, max_new_tokens=6) == watched.ask(QUESTIONS, max_new_tokens=6)
    assert resumed.ask("Why?", candidates=CANDIDATES) == approximately(
        qa(video=film, question="Why?", candidates=CANDIDATES)
    )
    faster = qa.watch(film, fps=4)
    assert (faster.num_frames, faster.frame_rate, faster.seconds) == (24, 4.0, 6.0)


def test_options_of_the_pipeline_hold_for_watched_films(checkpoint, frames):
    short = pipeline("video-question-answering", model=str(checkpoint), max_new_tokens=3)
    expected = short(video=frames, question="Why?")
    assert short.watch(frames).ask("Why?") == approximately(expected)
    assert short.watch(frames).ask("Why?", max_new_tokens=8) != approximately(expected)


@pytest.mark.parametrize("pieces", [1, 7])
def test_several_films_equal_one_by_one(qa, film, frames, pieces):
    films = [frames, film, list(frames[:2]), iter(frames[:3])]
    watched = qa.watch(films, frames_per_piece=pieces)
    for session, video in zip(watched, [frames, film, frames[:2], frames[:3]], strict=True):
        assert session.ask("Why?", max_new_tokens=6) == approximately(
            qa(video=video, question="Why?", max_new_tokens=6)
        )
    assert [session.num_frames for session in watched] == [5, 6, 2, 3]


def test_lists_of_films_and_lists_of_frames(qa, film, frames):
    assert [session.num_frames for session in qa.watch([str(film)])] == [6]
    assert [session.num_frames for session in qa.watch([frames, frames[:1]])] == [5, 1]
    assert qa.watch([Image.fromarray(frame) for frame in frames]).num_frames == 5
    assert qa.watch(list(frames)).num_frames == 5
    assert qa.watch([(0.0, frames[0]), (2.0, frames[1])]).num_frames == 3


def test_one_film_of_several_that_breaks_off(qa, frames, film):
    def broken():
        yield from frames[:2]
        raise OSError("connection lost")

    with pytest.warns(UserWarning, match=r"the generator broke off after 2 frames \(OSError: connection lost\)"):
        watched = qa.watch([film, broken()])
    assert [session.num_frames for session in watched] == [6, 2]
    expected = qa(video=frames[:2], question="Why?", max_new_tokens=4)
    assert watched[1].ask("Why?", max_new_tokens=4) == approximately(expected)


def test_one_film_of_several_that_fails_before_its_first_sample(qa, frames):
    """Its first frame stays on screen until the second, which is bad, and is then sampled."""
    with pytest.warns(UserWarning, match="Frame 1 of the list is at nan seconds"):
        watched = qa.watch([frames, [(0.0, frames[0]), (float("nan"), frames[1])]])
    assert [session.num_frames for session in watched] == [5, 1]


def test_mistakes_in_watching(qa, film, frames, tmp_path):
    with pytest.raises(ValueError, match="background is for one film, but a list of 2 was given"):
        qa.watch([film, film], background=True)
    with pytest.raises(FileNotFoundError, match="There is no file .*nowhere.mp4"):
        qa.watch(tmp_path / "nowhere.mp4")
    with pytest.raises(FileNotFoundError, match="There is no file .*nowhere.mp4"):
        qa.watch([film, tmp_path / "nowhere.mp4"])
    with pytest.raises(ValueError, match="FFmpeg does not open the ndarray: leave out its options format"):
        qa.watch(frames, format="v4l2")
    for ask in (lambda: qa(video=iter([]), question="Why?"), lambda: qa.watch([frames, iter([])])):
        with pytest.raises(ValueError, match="the list_iterator has no frame"):
            ask()


def test_ctrl_c_ends_a_plain_call(qa, frames):
    def interrupted():
        yield frames[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qa(video=interrupted(), question="Why?")


# Forms of a video


@pytest.mark.parametrize("form", ["path", "str", "array", "channels-first", "tensor", "images", "float", "generator"])
def test_forms_of_a_video(qa, film, form):
    frames, _ = read_video(film, 1.0)
    video = {
        "path": film,
        "str": str(film),
        "array": frames,
        "channels-first": frames.transpose(0, 3, 1, 2),
        "tensor": torch.from_numpy(frames),
        "images": [Image.fromarray(frame) for frame in frames],
        "float": frames / 255,
        "generator": (frame for frame in frames),
    }[form]
    assert qa(video=video, question="Why?", max_new_tokens=6) == qa(video=frames, question="Why?", max_new_tokens=6)


def test_answers_depend_on_the_frames(qa, frames):
    assert qa(video=frames, question="Why?") != qa(video=255 - frames, question="Why?")
    assert qa(video=frames, question="Why?") != qa(video=frames[::-1], question="Why?")


def test_fps(qa, film):
    frames, _ = read_video(film, 4.0)
    assert qa(video=film, question="Why?", fps=4) == qa(video=frames, question="Why?")
    assert qa(video=film, question="Why?", fps=4) != qa(video=film, question="Why?")


def test_the_default_frame_rate_is_that_of_the_config(checkpoint, film):
    pipe = pipeline("video-question-answering", model=str(checkpoint))
    pipe.model.config.frame_rate = 4.0
    assert pipe(video=film, question="Why?") == pipe(video=read_video(film, 4.0)[0], question="Why?")


@pytest.mark.parametrize("progress", [True, False])
def test_progress(qa, film, capsys, progress):
    qa(video=film, question="Why?", progress=progress, max_new_tokens=1)
    assert ("film.mp4" in capsys.readouterr().err) == progress


# Several inputs


@pytest.mark.parametrize("form", ["list", "tuple", "generator", "iterator", "dataset"])
def test_several_videos(qa, frames, form):
    rows = [
        {"video": frames, "question": "Why?"},
        {"video": frames[:2], "question": QUESTIONS},
        {"video": frames[:1], "question": "Who?"},
    ]
    expected = [qa(**row, max_new_tokens=4) for row in rows]
    forms = {"list": list, "tuple": tuple, "generator": lambda rows: (row for row in rows), "iterator": iter}
    output = qa({**forms, "dataset": RowsDataset}[form](rows), max_new_tokens=4)
    assert isinstance(output, list) == (form in ("list", "tuple"))  # other forms return an iterator
    assert list(output) == expected


def test_one_mapping(qa, frames):
    expected = qa(video=frames, question="Why?", max_new_tokens=4)
    assert qa({"video": frames, "question": "Why?"}, max_new_tokens=4) == expected
    assert qa(frames, "Why?", max_new_tokens=4) == expected


# Saving, and the checkpoint in the package


def test_the_pipeline_loads_its_own_files(qa, frames, tmp_path):
    qa.save_pretrained(tmp_path)
    loaded = pipeline("video-question-answering", model=str(tmp_path))
    assert loaded(video=frames, question=QUESTIONS) == qa(video=frames, question=QUESTIONS)
    assert loaded.processor.to_dict() == qa.processor.to_dict()


def test_model_and_processor_in_hand(qa, model, processor, frames):
    pipe = pipeline("video-question-answering", model=model, processor=processor)
    assert pipe(video=frames, question="Why?") == qa(video=frames, question="Why?")


def test_an_image_in_a_chat_through_transformers_own_pipeline(checkpoint, model, processor, frames):
    """`image-text-to-text` is a pipeline of Transformers, without code of this package."""
    picture = Image.fromarray(frames[0])
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Who?"}]}]
    pipe = pipeline("image-text-to-text", model=str(checkpoint))
    output = pipe(text=chat, max_new_tokens=6, return_full_text=False)
    prompt = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**prompt, max_new_tokens=6)[0, prompt["input_ids"].shape[1] :]
    assert [entry["generated_text"] for entry in output] == [processor.decode(tokens, skip_special_tokens=True)]


def test_the_default_checkpoint(film):
    """Without a model the task loads the checkpoint in the package."""
    from transformers_ma2mba.auto import DEFAULT_CHECKPOINT

    assert DEFAULT_CHECKPOINT.is_dir(), "the package has no default checkpoint; `make default-checkpoint` makes it"
    files = [path for path in DEFAULT_CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4e6
    card = (DEFAULT_CHECKPOINT / "README.md").read_text()
    assert "cannot" in card

    pipe = pipeline("video-question-answering")
    assert pipe.model.name_or_path == str(DEFAULT_CHECKPOINT)
    entry = pipe(video=film, question="Which shape appears?")
    assert entry["answer"] and 0 < entry["score"] <= 1
