"""`pipeline("video-question-answering")`: a video is watched once, each question continues from there."""

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Cache, GenerationConfig, Pipeline

_VIDEO_OPTIONS = ("fps", "progress")


class VideoQuestionAnsweringPipeline(Pipeline):
    """Answers questions about a video.

    ```python
    qa = pipeline("video-question-answering", model="path/video-ma2mba")
    qa(video="film.mp4", question="Who opens the door?")  # {"answer": "...", "score": 0.93}
    qa(video="film.mp4", question=["Who opens the door?", "What colour is it?"])  # a list of these
    qa(video="film.mp4", question="What colour is the door?", candidates=["red", "blue"])  # ranked by likelihood
    ```

    Without a model, the task loads a tiny one that ships with the package and knows nothing but its own toy films.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=128)

    def __call__(self, video: Any = None, question: str | list[str] | None = None, **kwargs):
        """
        Args:
            video: a path or URL; frames as an array or tensor `(num_frames, height, width, 3)` or
                `(num_frames, 3, height, width)`; or a list of PIL images. In its place, a mapping with `"video"` and
                `"question"`, or a list, generator or data set of such mappings.
            question (`str` or `list[str]`): one question, or several about the same video, which is watched once.
            candidates (`list[str]`, *optional*): answers to choose from, ranked by their likelihood.
            fps (`float`, *optional*): frames per second of film to look at; `model.config.frame_rate` unless given.
            progress (`bool`, *optional*): show a bar while a file is read; unless given, if that takes a while.
            kwargs: anything else goes to `generate`, `max_new_tokens` for example.

        Returns:
            `{"answer": str, "score": float}` for a question and a list of these for a list of questions. The score of
            a generated answer is the geometric mean of its tokens' probabilities, its end included. With
            `candidates`, each question gets a list with one such entry a candidate, best first; their scores are the
            candidates' likelihoods, end included, divided by the sum of them all.

        Raises:
            ValueError: if the video or the question is missing or empty, or the video cannot be read.
            FileNotFoundError: if the path does not exist.
        """
        if isinstance(video, Mapping):
            inputs = dict(video)
        elif question is None and (rows := _as_rows(video)) is not None:
            inputs = rows
        else:
            inputs = {"video": video, "question": question}
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, candidates=None, **kwargs):
        preprocess = {name: kwargs.pop(name) for name in _VIDEO_OPTIONS if name in kwargs}
        forward = {"generate_kwargs": kwargs} if kwargs else {}
        if candidates is not None:
            if isinstance(candidates, str) or not candidates or not all(map(_is_text, candidates)):
                raise ValueError(f"candidates must be a list of answers, none of them empty; got {candidates!r}.")
            forward["candidates"] = list(candidates)
        return preprocess, forward, {}

    def preprocess(self, inputs, fps=None, progress=None):
        if not isinstance(inputs, Mapping):
            raise ValueError(f"Each input must be a mapping with `video` and `question`; got {type(inputs).__name__}.")
        video, question = inputs.get("video"), inputs.get("question")
        if video is None or (isinstance(video, (list, tuple, str)) and len(video) == 0):
            raise ValueError("There is a question but no video: pass video=, a path or frames.")
        questions = [question] if isinstance(question, str) else question
        if not isinstance(questions, (list, tuple)) or not questions or not all(map(_is_text, questions)):
            raise ValueError(f"question must be a text or a list of texts, none of them empty; got {question!r}.")
        tokenizer, token = self.processor.tokenizer, self.processor.video_token
        for text in questions:
            if token in text or self.processor.image_token in text:
                raise ValueError(f"The question {text!r} has a placeholder in it: leave it to the pipeline.")

        # Up to its video every prompt is the same. The placeholder is a special token, so that cutting behind it does
        # not change how the rest is split into tokens.
        prompts = [self._prompt(text) for text in questions]
        beginning, _, _ = prompts[0].partition(token)
        watched = self.processor(
            text=beginning + token,
            videos=video,
            fps=fps if fps is not None else self.model.config.frame_rate,
            progress=progress,
            return_tensors="pt",
        )
        continuations = [
            tokenizer(prompt.partition(token)[2], add_special_tokens=False, return_tensors="pt")["input_ids"]
            for prompt in prompts
        ]
        return {"watched": dict(watched), "continuations": continuations, "single": isinstance(question, str)}

    def _prompt(self, question: str) -> str:
        content = [{"type": "video"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _forward(self, model_inputs, candidates=None, generate_kwargs=None):
        state = self.model(**model_inputs["watched"], use_cache=True, logits_to_keep=1).cache_params
        results = []
        for input_ids in model_inputs["continuations"]:
            fork = copy.deepcopy(state)
            if candidates is None:
                results.append(self._generate(input_ids, fork, generate_kwargs or {}))
            else:
                results.append(self._rank(input_ids, fork, candidates))
        return {"results": results, "single": model_inputs["single"]}

    def _generate(self, input_ids: torch.Tensor, state: Cache, generate_kwargs: dict) -> list[tuple]:
        """Token ids and score of each answer that `generate` returns."""
        generate_kwargs = self._prepare_generate_kwargs(
            generate_kwargs, return_dict_in_generate=True, output_logits=True
        )
        outputs = self.model.generate(input_ids=input_ids, cache_params=state, **generate_kwargs)
        answers = outputs.sequences[:, input_ids.shape[1] :]
        # Of the logits as they are: `scores` are what temperature, penalties and the like make of them.
        log_probabilities = self.model.compute_transition_scores(
            outputs.sequences, outputs.logits, getattr(outputs, "beam_indices", None), normalize_logits=True
        )
        results = []
        for answer, scores in zip(answers, log_probabilities, strict=True):
            # What stands behind the end of an answer is padding.
            ends = (answer == self.processor.tokenizer.eos_token_id).nonzero()
            length = int(ends[0]) + 1 if len(ends) else len(answer)
            results.append((answer[:length].tolist(), scores[:length].mean().exp().item()))
        return results

    def _rank(self, input_ids: torch.Tensor, state: Cache, candidates: list[str]) -> list[tuple]:
        """The candidates with their share of the likelihood, best first."""
        tokenizer = self.processor.tokenizer
        outputs = self.model(input_ids=input_ids, cache_params=state, use_cache=True, logits_to_keep=1)
        likelihoods = []
        for candidate in candidates:
            tokens = tokenizer(candidate, add_special_tokens=False, return_tensors="pt")["input_ids"]
            tokens = tokens.to(input_ids.device)
            end = tokens.new_tensor([[tokenizer.eos_token_id]])
            logits = self.model(input_ids=tokens, cache_params=copy.deepcopy(state), use_cache=True).logits
            log_probabilities = torch.cat([outputs.logits, logits], dim=1).log_softmax(-1)
            targets = torch.cat([tokens, end], dim=1)
            likelihoods.append(log_probabilities.gather(-1, targets[..., None]).sum())
        scores = torch.stack(likelihoods).softmax(0).tolist()
        return sorted(zip(candidates, scores, strict=True), key=lambda entry: entry[1], reverse=True)

    def postprocess(self, model_outputs):
        answers = []
        for results in model_outputs["results"]:
            entries = []
            for answer, score in results:
                if not isinstance(answer, str):
                    answer = self.processor.decode(answer, skip_special_tokens=True).strip()
                entries.append({"answer": answer, "score": score})
            is_one = len(results) == 1 and not isinstance(results[0][0], str)
            answers.append(entries[0] if is_one else entries)
        return answers[0] if model_outputs["single"] else answers

    def get_iterator(self, inputs, num_workers, batch_size, *params):
        if batch_size != 1:
            raise ValueError("batch_size must be 1: videos differ in length. Ask several questions about one instead.")
        return super().get_iterator(inputs, num_workers, batch_size, *params)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Saves model and processor, such that `pipeline(task, model=save_directory)` finds all it needs."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _as_rows(inputs) -> list | Dataset | Iterator | None:
    """Several mappings in a form that `Pipeline` goes through one by one, or None if `inputs` is one video."""
    if isinstance(inputs, (list, tuple)):
        return list(inputs) if inputs and isinstance(inputs[0], Mapping) else None
    if isinstance(inputs, Dataset):
        return inputs
    is_video = isinstance(inputs, (str, bytes, os.PathLike, torch.Tensor))
    is_video = is_video or hasattr(inputs, "__array__") or hasattr(inputs, "read")
    return (row for row in inputs) if isinstance(inputs, Iterable) and not is_video else None


__all__ = ["VideoQuestionAnsweringPipeline"]
