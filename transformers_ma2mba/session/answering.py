"""Questions to a recurrent state: prompts, answers as text, candidates ranked by likelihood, and conversations.

Questions of one length go through the model as one batch, on copies of one state. Questions of different lengths do
not, because padding in front of a question would become part of the memory of the film.
"""

import copy
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import Cache

from ..mamba2 import copy_cache

_MAX_COPIES = 16  # the number of copies of a state that exist at a time


class Answerer:
    """Asks a model questions about a recurrent state.

    Args:
        model ([`Ma2mbaForVideoQA`]): the model.
        processor ([`Ma2mbaProcessor`]): its processor.
        prepare_generate_kwargs: adds defaults to the options for `generate`, like the method of pipelines with this
            name: a function of the options and of overrides. By default an answer has at most 128 tokens.
    """

    def __init__(self, model, processor, prepare_generate_kwargs: Callable[..., dict] | None = None):
        self.model, self.processor = model, processor
        self.tokenizer = processor.tokenizer
        self._prepare = prepare_generate_kwargs or self._with_defaults

    def ask(
        self,
        state: Callable[[], Cache],
        question: str | list[str],
        candidates: list[str] | None = None,
        **generate_kwargs,
    ):
        """Answers one question, or a list of questions independently; see [`VideoSession.ask`].

        Args:
            state: returns the state of one film up to the end of its video; called once the arguments are checked.

        Raises:
            ValueError: if the question or the candidates are empty.
        """
        questions = checked_questions(question, self.processor)
        candidates = checked_candidates(candidates, self.processor)
        prompts = [text_after_video(self.processor, [user_message(text, with_video=True)]) for text in questions]
        results = self.answer(state(), prompts, candidates, **generate_kwargs)
        return results[0] if isinstance(question, str) else results

    def tokenize(self, text: str) -> list[int]:
        """Tokenizes a part from the middle of a prompt."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def answer(
        self, cache: Cache, prompts: Sequence[str], candidates: list[str] | None = None, **generate_kwargs
    ) -> list[dict | list[dict]]:
        """Answers each prompt independently of the others.

        Args:
            cache: the state of one sample that every prompt continues; it is not changed.
            prompts: texts up to the beginning of the answer.
            candidates: answers to rank by likelihood; without them `generate` writes the answer.
            generate_kwargs: options for `generate`.

        Returns:
            For each prompt `{"answer": str, "score": float}`, or a list of these if there are candidates or `generate`
            returns several sequences.
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
        # From the raw logits, because temperature and penalties have changed `scores`.
        log_probabilities = self.model.compute_transition_scores(
            outputs.sequences, outputs.logits, getattr(outputs, "beam_indices", None), normalize_logits=True
        )
        entries = []
        for answer, scores in zip(answers, log_probabilities, strict=True):
            # The rest of a row after the end of its answer is padding.
            ends = (answer == self.tokenizer.eos_token_id).nonzero()
            length = int(ends[0]) + 1 if len(ends) else len(answer)
            text = self.processor.decode(answer[:length].tolist(), skip_special_tokens=True).strip()
            entries.append({"answer": text, "score": scores[:length].mean().exp().item()})
        each = len(entries) // len(input_ids)
        for start in range(0, len(entries), each):
            yield entries[start] if each == 1 else entries[start : start + each]

    def _rank(self, input_ids: torch.Tensor, cache: Cache, candidates: list[str]) -> Iterator[list[dict]]:
        """Yield for each prompt the candidates with their shares of the likelihood, best first."""
        options = dict(use_cache=True, text_tokens_only=True)
        outputs = self.model(input_ids=input_ids, cache_params=cache, logits_to_keep=1, **options)
        tokens = [self.tokenize(candidate) for candidate in candidates]
        likelihoods = outputs.logits.new_empty(len(input_ids), len(candidates))
        for row in range(len(input_ids)):
            for indices in _batches(tokens, _MAX_COPIES):
                candidate_ids = self._tensor([tokens[index] for index in indices])
                copies = copy_cache(cache, rows=[row] * len(indices))
                logits = self.model(input_ids=candidate_ids, cache_params=copies, **options).logits
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
        given.update(**overrides)  # `generate` takes either a config or options
        return {**generate_kwargs, "generation_config": given}

    def _tensor(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self.model.device)


def _batches(rows: Sequence[list[int]], size: int) -> Iterator[list[int]]:
    """Yield the indices of rows of equal length, at most `size` at a time."""
    by_length = defaultdict(list)
    for index, row in enumerate(rows):
        by_length[len(row)].append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


class VideoChat:
    """A conversation about a film, in which each question continues the earlier turns (paper, Table 5).

    The film ends where the session was when [`VideoSession.chat`] began the conversation.

    Attributes:
        messages: the conversation so far, in the form of chat templates.
    """

    def __init__(self, state: Cache, answerer: Answerer):
        self.messages: list[dict] = []
        self._state, self._answerer, self._processor = state, answerer, answerer.processor
        self._said = ""  # the text after the video that the state contains
        self._lock = threading.Lock()

    def ask(self, question: str, candidates: list[str] | None = None, **generate_kwargs):
        """Answers the next question; arguments and result are those of [`VideoSession.ask`].

        The conversation continues with the first of several answers or candidates, which is the best.
        """
        [text] = checked_questions([question], self._processor)
        candidates = checked_candidates(candidates, self._processor)
        with self._lock:
            messages = [*self.messages, user_message(text, with_video=not self.messages)]
            prompt = text_after_video(self._processor, messages).removeprefix(self._said)
            [result] = self._answerer.answer(self._state, [prompt], candidates, **generate_kwargs)
            answer = (result[0] if isinstance(result, list) else result)["answer"]
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            # The state gets the template's text of the answer: the generated tokens may be cut short, or be others.
            said = text_after_video(self._processor, messages, add_generation_prompt=False)
            state = copy_cache(self._state)
            self._hear(state, self._answerer.tokenize(said.removeprefix(self._said)))
            self.messages, self._said, self._state = messages, said, state
        return result

    @torch.no_grad()
    def _hear(self, state: Cache, tokens: list[int]):
        model = self._answerer.model
        input_ids = torch.tensor([tokens], device=model.device)
        model(input_ids=input_ids, cache_params=state, use_cache=True, logits_to_keep=1)


# Prompts


def user_message(text: str, with_video: bool) -> dict:
    """A user's turn, in the form of chat templates."""
    content = [{"type": "video"}] if with_video else []
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def beginning_tokens(processor) -> list[int]:
    """The tokens of every prompt up to its video.

    The placeholder is a special token, so that cutting a text there changes the tokens of neither part.
    """
    text = processor.apply_chat_template([user_message("?", with_video=True)], add_generation_prompt=True)
    before, placeholder, _ = text.partition(processor.video_token)
    input_ids = processor.tokenizer(before + placeholder)["input_ids"]
    return input_ids[: input_ids.index(processor.video_token_id)]


def text_after_video(processor, messages: list[dict], add_generation_prompt: bool = True) -> str:
    """The text of a conversation after its video."""
    text = processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
    return text.partition(processor.video_token)[2]


def checked_questions(question, processor) -> list[str]:
    """Return one question, or several, as a list.

    Raises:
        ValueError: if there is no question, or one is no text, is empty, or contains a placeholder.
    """
    questions = [question] if isinstance(question, str) else question
    if not isinstance(questions, (list, tuple)) or not questions or not all(map(_is_text, questions)):
        raise ValueError(f"question must be a text or a list of texts, none of them empty; got {question!r}.")
    for text in questions:
        if _has_placeholder(text, processor):
            raise ValueError(f"The question {text!r} contains a placeholder: leave it out, the prompt adds it.")
    return list(questions)


def checked_candidates(candidates, processor) -> list[str] | None:
    """Return the candidates as a list, or None without candidates.

    Raises:
        ValueError: if they are no list or an empty one, or a candidate is no text or empty, or contains a placeholder.
    """
    if candidates is None:
        return None
    if isinstance(candidates, str) or not candidates or not all(map(_is_text, candidates)):
        raise ValueError(f"candidates must be a list of answers, none of them empty; got {candidates!r}.")
    for text in candidates:
        if _has_placeholder(text, processor):
            raise ValueError(f"The candidate {text!r} contains a placeholder, which no answer does: leave it out.")
    return list(candidates)


def _has_placeholder(text: str, processor) -> bool:
    return processor.video_token in text or processor.image_token in text


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())
