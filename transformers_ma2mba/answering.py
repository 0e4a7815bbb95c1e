"""Questions to a recurrent state: answers in words, and candidates ranked by their likelihood.

Questions of one length go through the model as one batch, on copies of one state. Those of different lengths do not:
padding in front of a question would become part of the memory of the film.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import Cache

from .recurrent_state import copy_cache

# How many copies of a state are made at a time.
_MAX_COPIES = 16


class Answerer:
    """What asks a model, and puts what it says into words.

    Args:
        model ([`Ma2mbaForVideoQA`]): the model.
        processor ([`Ma2mbaProcessor`]): its processor.
        prepare_generate_kwargs: a function of the options for `generate` and of overrides, as pipelines have it; it
            adds defaults. Answers have at most 128 tokens unless given.
    """

    def __init__(self, model, processor, prepare_generate_kwargs: Callable[..., dict] | None = None):
        self.model, self.processor = model, processor
        self.tokenizer = processor.tokenizer
        self._prepare = prepare_generate_kwargs or self._with_defaults

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a piece from the middle of a prompt."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def answer(
        self, cache: Cache, prompts: Sequence[str], candidates: list[str] | None = None, **generate_kwargs
    ) -> list[dict | list[dict]]:
        """Answers each prompt as if it were the only one.

        Args:
            cache: the state, of one sample, that every prompt continues; it stays as it is.
            prompts: texts, up to where the answer begins.
            candidates: answers to choose from.
            generate_kwargs: for `generate`, without `candidates`.

        Returns:
            For each prompt `{"answer": str, "score": float}`, or a list of these if there are candidates or `generate`
            was asked for several answers.
        """
        tokens = [self.tokenize(prompt) for prompt in prompts]
        alone = any(generate_kwargs.get(name) is not None for name in ("streamer", "assistant_model"))
        results = [None] * len(prompts)
        for indices in _batches(tokens, 1 if alone else _MAX_COPIES):
            input_ids = self._tensor([tokens[index] for index in indices])
            copies = copy_cache(cache, rows=[0] * len(indices))
            if candidates is None:
                answers = self._generate(input_ids, copies, generate_kwargs)
            else:
                answers = self._rank(input_ids, copies, candidates)
            for index, entry in zip(indices, answers, strict=True):
                results[index] = entry
        return results

    def _generate(self, input_ids: torch.Tensor, cache: Cache, generate_kwargs: dict) -> Iterator[dict | list[dict]]:
        generate_kwargs = self._prepare(generate_kwargs, return_dict_in_generate=True, output_logits=True)
        outputs = self.model.generate(input_ids=input_ids, cache_params=cache, **generate_kwargs)
        answers = outputs.sequences[:, input_ids.shape[1] :]
        # Of the logits as they are: `scores` are what temperature, penalties and the like make of them.
        log_probabilities = self.model.compute_transition_scores(
            outputs.sequences, outputs.logits, getattr(outputs, "beam_indices", None), normalize_logits=True
        )
        entries = []
        for answer, scores in zip(answers, log_probabilities, strict=True):
            # What stands behind the end of an answer is padding.
            ends = (answer == self.tokenizer.eos_token_id).nonzero()
            length = int(ends[0]) + 1 if len(ends) else len(answer)
            text = self.processor.decode(answer[:length].tolist(), skip_special_tokens=True).strip()
            entries.append({"answer": text, "score": scores[:length].mean().exp().item()})
        each = len(entries) // len(input_ids)
        for start in range(0, len(entries), each):
            yield entries[start] if each == 1 else entries[start : start + each]

    def _rank(self, input_ids: torch.Tensor, cache: Cache, candidates: list[str]) -> Iterator[list[dict]]:
        """The candidates with their shares of the likelihood, best first."""
        outputs = self.model(input_ids=input_ids, cache_params=cache, use_cache=True, logits_to_keep=1)
        tokens = [self.tokenize(candidate) for candidate in candidates]
        likelihoods = outputs.logits.new_empty(len(input_ids), len(candidates))
        for row in range(len(input_ids)):
            for indices in _batches(tokens, _MAX_COPIES):
                candidate_ids = self._tensor([tokens[index] for index in indices])
                copies = copy_cache(cache, rows=[row] * len(indices))
                logits = self.model(input_ids=candidate_ids, cache_params=copies, use_cache=True).logits
                first = outputs.logits[row : row + 1].expand(len(indices), -1, -1)
                log_probabilities = torch.cat([first, logits], dim=1).log_softmax(-1)
                ends = candidate_ids.new_full((len(indices), 1), self.tokenizer.eos_token_id)
                targets = torch.cat([candidate_ids, ends], dim=1).to(logits.device)
                likelihoods[row, indices] = log_probabilities.gather(-1, targets[..., None]).sum((1, 2))
        for scores in likelihoods.softmax(-1).tolist():
            entries = [{"answer": text, "score": score} for text, score in zip(candidates, scores, strict=True)]
            yield sorted(entries, key=lambda entry: entry["score"], reverse=True)

    def _with_defaults(self, generate_kwargs: dict, **overrides) -> dict:
        given = copy.deepcopy(generate_kwargs.get("generation_config"))
        known = {
            *self.model.generation_config.to_diff_dict(),
            *(given.to_diff_dict() if given else ()),
            *generate_kwargs,
        }
        if not known & {"max_new_tokens", "max_length"}:
            overrides["max_new_tokens"] = 128
        if given is None:
            return {**generate_kwargs, **overrides}
        given.update(**overrides)  # `generate` wants either a config or options
        return {**generate_kwargs, "generation_config": given}

    def _tensor(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self.model.device)


def _batches(rows: Sequence[list[int]], size: int) -> Iterator[list[int]]:
    """Indices of rows of one length, at most `size` at a time."""
    by_length = defaultdict(list)
    for index, row in enumerate(rows):
        by_length[len(row)].append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def checked_questions(question, processor) -> list[str]:
    """One question or several as a list.

    Raises:
        ValueError: if there is none, one is no text or empty, or has a placeholder in it.
    """
    questions = [question] if isinstance(question, str) else question
    if not isinstance(questions, (list, tuple)) or not questions or not all(map(_is_text, questions)):
        raise ValueError(f"question must be a text or a list of texts, none of them empty; got {question!r}.")
    for text in questions:
        if processor.video_token in text or processor.image_token in text:
            raise ValueError(f"The question {text!r} has a placeholder in it: leave it to the pipeline.")
    return list(questions)


def checked_candidates(candidates) -> list[str] | None:
    """The candidates as a list, or None if there are none to choose from.

    Raises:
        ValueError: if it is no list, or one is no text or empty.
    """
    if candidates is None:
        return None
    if isinstance(candidates, str) or not candidates or not all(map(_is_text, candidates)):
        raise ValueError(f"candidates must be a list of answers, none of them empty; got {candidates!r}.")
    return list(candidates)


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


__all__ = ["Answerer", "checked_candidates", "checked_questions"]
