"""`generate`: all decoding methods, from pixels and from states, in batches, with and without the cache."""

import copy
from threading import Thread

import pytest
import torch
from tiny import VOCABULARY, pad_left, padded_model, random_pixels, tiny_config, tiny_model
from torch.testing import assert_close
from transformers import AutoModel, TextIteratorStreamer, TextStreamer

# The recurrent and the chunked form of a scan round differently in float32.
ROUNDED = dict(rtol=1e-4, atol=1e-4)


def make_inputs(config, num_frames=3, seed=0, question=(6, 7, 8)) -> dict:
    """A prompt with one video and one image."""
    video = [config.video_token_id] * config.tokens_per_frame * num_frames
    image = [config.image_token_id] * config.tokens_per_frame
    input_ids = torch.tensor([[5, *video, 9, *image, *question]])
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values_videos": random_pixels(num_frames, seed=seed),
        "pixel_values": random_pixels(1, seed=seed + 100),
    }


def pad_together(samples: list[dict]) -> dict:
    """Several prompts as one batch, padded on the left."""
    return {
        "input_ids": pad_left([sample["input_ids"] for sample in samples], 1),
        "attention_mask": pad_left([sample["attention_mask"] for sample in samples], 0),
        "pixel_values_videos": torch.cat([sample["pixel_values_videos"] for sample in samples]),
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
    }


def generate(model, inputs, **options):
    """The new tokens, `max_new_tokens` by default."""
    options = {"max_new_tokens": 12, "min_new_tokens": options.get("max_new_tokens", 12), **options}
    options = {"do_sample": False, **options}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def state_after(model, inputs):
    """The recurrent state after the inputs."""
    with torch.no_grad():
        return model(**inputs, use_cache=True).cache_params


@torch.no_grad()
def naive_greedy(model, inputs, num_tokens):
    """Greedy decoding that computes the whole sequence again for each token."""
    inputs = dict(inputs)
    for _ in range(num_tokens):
        logits = model(**inputs, use_cache=False).logits[:, -1]
        logits[:, model.generation_config.eos_token_id] = -torch.inf  # min_new_tokens does the same
        logits[:, [VOCABULARY - 2, VOCABULARY - 1]] = -torch.inf  # the placeholders
        token = logits.argmax(-1, keepdim=True)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
    return inputs["input_ids"][:, -num_tokens:]


# Decoding


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_greedy_decoding_equals_the_naive_form(kind, use_cache):
    config = tiny_config(kind)
    model = tiny_model(config)
    inputs = make_inputs(config)
    expected = naive_greedy(model, inputs, 20)
    assert len(expected.unique()) > 3  # not a constant
    assert torch.equal(generate(model, inputs, max_new_tokens=20, use_cache=use_cache), expected)


def test_generated_tokens_depend_on_videos_and_images(model, config):
    inputs = make_inputs(config)
    for name in ("pixel_values_videos", "pixel_values"):
        other = {**inputs, name: 255 - inputs[name]}
        assert not torch.equal(generate(model, inputs), generate(model, other)), name


@pytest.mark.parametrize("num_beams", [1, 3])
def test_embeddings_may_replace_ids(model, config, num_beams):
    inputs = make_inputs(config)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, num_beams=num_beams)
    tokens = model.generate(**inputs, **options)  # without the prompt, which has no ids
    assert torch.equal(tokens, generate(model, make_inputs(config), max_new_tokens=8, num_beams=num_beams))


def test_generation_stops_at_the_end_of_text(model, config):
    """The generation config takes its end of text from the language model."""
    inputs = make_inputs(config)
    tokens = generate(model, inputs)[0].tolist()
    end = tokens[4]
    expected = tokens[: tokens.index(end) + 1]
    stopped = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=end, min_new_tokens=0)
    assert stopped[0, inputs["input_ids"].shape[1] :].tolist() == expected
    assert model.generation_config.eos_token_id == config.text_config.eos_token_id
    assert model.generation_config.pad_token_id == config.text_config.pad_token_id


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_sampling_follows_the_seed(model, config, use_cache):
    inputs = make_inputs(config)
    torch.manual_seed(0)
    first = generate(model, inputs, do_sample=True, use_cache=use_cache)
    again = generate(model, inputs, do_sample=True, use_cache=use_cache)
    torch.manual_seed(0)
    assert torch.equal(generate(model, inputs, do_sample=True, use_cache=use_cache), first)
    assert not torch.equal(again, first)


def test_sampling_draws_the_same_with_and_without_the_cache(model, config):
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        options = dict(do_sample=True, num_return_sequences=3, use_cache=use_cache)
        samples.append(generate(model, make_inputs(config), **options))
    assert torch.equal(*samples)
    assert len(samples[0].unique(dim=0)) == 3


def naive_beam_search(model, inputs, num_beams, num_tokens):
    """Beam search without an end of text, which extends the `num_beams` likeliest beams by one token at a time."""
    prompt = inputs["input_ids"][0].tolist()
    beams = [(0.0, [])]
    for _ in range(num_tokens):
        extended = []
        for score, tokens in beams:
            input_ids = torch.tensor([prompt + tokens])
            whole = {**inputs, "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
            with torch.no_grad():
                logits = model(**whole, use_cache=False).logits[0, -1]
            logits[[VOCABULARY - 2, VOCABULARY - 1]] = -torch.inf  # the placeholders
            log_probabilities = logits.log_softmax(-1)
            log_probabilities[model.generation_config.eos_token_id] = -torch.inf
            best = log_probabilities.topk(num_beams)
            extended += [(score + s, [*tokens, t]) for s, t in zip(*map(torch.Tensor.tolist, best), strict=True)]
        beams = sorted(extended, reverse=True)[:num_beams]
    return torch.tensor([tokens for _, tokens in beams])


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_beam_search_equals_the_naive_form(model, config, use_cache):
    inputs = make_inputs(config, num_frames=2, seed=1)
    options = dict(max_new_tokens=6, num_beams=3, num_return_sequences=3, use_cache=use_cache)
    found = generate(model, inputs, **options)
    assert torch.equal(found, naive_beam_search(model, inputs, 3, 6))
    assert not torch.equal(found[0], generate(model, inputs, max_new_tokens=6)[0])  # unlike greedy decoding


def test_beam_search_in_a_batch_gives_each_beam_its_own_video(model, config):
    samples = [make_inputs(config, 1, seed=1), make_inputs(config, 4, seed=2), make_inputs(config, 2, seed=3)]
    together = generate(model, pad_together(samples), num_beams=3)
    alone = torch.cat([generate(model, sample, num_beams=3) for sample in samples])
    assert torch.equal(together, alone)
    assert len(alone.unique(dim=0)) == 3


# Rows of the vocabulary that are no text


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy"),
        pytest.param(dict(do_sample=True, top_k=3), id="sampling"),
        pytest.param(dict(do_sample=True, temperature=5.0, top_p=0.5, renormalize_logits=True), id="nucleus"),
        pytest.param(dict(num_beams=3, num_return_sequences=3), id="beams"),
        pytest.param(dict(num_beams=3, do_sample=True), id="sampled-beams"),
        pytest.param(dict(suppress_tokens=[3], remove_invalid_values=True), id="with-suppressed-tokens"),
        pytest.param(dict(repetition_penalty=2.0), id="repetition-penalty"),
    ],
)
def test_padding_and_placeholders_are_never_generated(options, use_cache):
    """Each step would choose one of them."""
    model = padded_model(scale=100)
    inputs = make_inputs(model.config)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.argmax(-1).min() >= VOCABULARY - 2 and logits.isfinite().all()
    torch.manual_seed(0)
    tokens = generate(model, inputs, use_cache=use_cache, **options)
    assert tokens.max() < VOCABULARY - 2

    other = padded_model(scale=0.1)
    torch.manual_seed(0)
    assert torch.equal(generate(other, inputs, use_cache=use_cache, **options), tokens)


def test_padding_is_not_generated_after_loading(tmp_path):
    padded_model(scale=100).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert generate(model, make_inputs(model.config)).max() < VOCABULARY - 2


def test_every_row_is_a_token_unless_the_config_counts_them():
    model = padded_model(scale=100, num_tokens=None)
    tokens = generate(model, make_inputs(model.config))
    assert tokens.min() >= VOCABULARY  # but no placeholder


def test_new_tokens_are_generated_after_resizing():
    model = padded_model(scale=100)
    model.resize_token_embeddings(VOCABULARY + 2, pad_to_multiple_of=8)
    assert model.config.text_config.vocab_size == VOCABULARY + 8
    tokens = generate(model, make_inputs(model.config))
    assert set(tokens.unique().tolist()) <= {VOCABULARY, VOCABULARY + 1}


@pytest.mark.parametrize("num_tokens", [None, VOCABULARY - 2, VOCABULARY, VOCABULARY + 3, VOCABULARY + 8], ids=str)
def test_logits_of_text_tokens_only(num_tokens):
    model = padded_model(scale=1.0, num_tokens=num_tokens)
    inputs = make_inputs(model.config)
    with torch.no_grad():
        logits, expected = model(**inputs, text_tokens_only=True).logits, model(**inputs).logits
    padding = range(VOCABULARY + 8 if num_tokens is None else num_tokens, VOCABULARY + 8)
    expected[..., [VOCABULARY - 2, VOCABULARY - 1, *padding]] = -torch.inf
    assert torch.equal(logits, expected)


def test_training_sees_the_padding_as_the_published_models_did():
    model, unaware = padded_model(scale=1.0), padded_model(scale=1.0, num_tokens=None)
    inputs = make_inputs(model.config)
    inputs["labels"] = inputs["input_ids"].where(inputs["input_ids"] < VOCABULARY - 2, -100)
    outputs, expected = model(**inputs), unaware(**inputs)
    assert torch.equal(outputs.loss, expected.loss) and torch.equal(outputs.logits, expected.logits)


# Batches


@pytest.mark.parametrize("lengths", [(1, 2, 3), (5, 1), (2, 2, 2)], ids=str)
def test_padded_batch_equals_its_samples(model, config, lengths):
    samples = [make_inputs(config, n, seed=n + i, question=range(20, 20 + 2 * i)) for i, n in enumerate(lengths)]
    batch = pad_together(samples)
    with torch.no_grad():
        logits = model(**batch).logits
        for row, sample in enumerate(samples):
            alone = model(**sample).logits[0]
            assert_close(logits[row, -len(alone) :], alone, **ROUNDED)
    alone = torch.cat([generate(model, sample) for sample in samples])
    assert torch.equal(generate(model, batch), alone)
    assert torch.equal(generate(model, batch, use_cache=False), alone)
    assert len(alone.unique(dim=0)) == len(samples)


def test_finished_texts_get_padding(model, config):
    """The padding of a finished text does not change the others."""
    samples = [make_inputs(config, 1, seed=1), make_inputs(config, 2, seed=2)]
    alone = [generate(model, sample)[0].tolist() for sample in samples]
    end = next(token for token in alone[0][1:] if token not in alone[1])
    batch = pad_together(samples)
    sequences = model.generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=[end, 0], min_new_tokens=12)
    assert sequences.shape[1] == batch["input_ids"].shape[1] + 12
    together = generate(model, batch, eos_token_id=end, min_new_tokens=0).tolist()
    stop = alone[0].index(end) + 1
    assert together[0] == alone[0][:stop] + [1] * (12 - stop)
    assert together[1] == alone[1]


# Streamers


class Listener:
    """A streamer that keeps the tokens that it receives."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamer_gets_the_prompt_and_each_token(model, config):
    inputs, listener = make_inputs(config), Listener()
    tokens = generate(model, inputs, streamer=listener)
    assert listener.ended and listener.tokens == inputs["input_ids"][0].tolist() + tokens[0].tolist()


def test_text_streamer_prints_the_text(model, config, processor, capsys):
    inputs = make_inputs(config)
    tokens = generate(model, inputs, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == processor.decode(tokens[0]).strip()


def test_text_iterator_streamer_yields_the_text(model, config, processor):
    inputs = make_inputs(config)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=generate, args=(model, inputs), kwargs=dict(streamer=streamer))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == processor.decode(generate(model, inputs)[0])


# From a recurrent state


@pytest.mark.parametrize("frames_before", [0, 3], ids=["text-then-text", "video-then-text"])
def test_generation_from_a_state_equals_the_whole_prompt(model, config, frames_before):
    inputs = make_inputs(config) if frames_before else {"input_ids": torch.tensor([[5, 9, 30]])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    question = torch.tensor([[11, 12, 13, 14]])
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], question], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    tokens = generate(model, {"input_ids": question}, cache_params=state_after(model, inputs))
    assert torch.equal(tokens, generate(model, whole))


@pytest.mark.parametrize("num_beams, num_return_sequences", [(3, 1), (3, 3), (1, 3)], ids=str)
def test_beams_and_samples_from_a_state_equal_the_whole_prompt(model, config, num_beams, num_return_sequences):
    """The model expands the state over beams, because Transformers' `generate` cannot do it."""
    options = dict(num_beams=num_beams, num_return_sequences=num_return_sequences, do_sample=num_beams == 1)
    inputs, question = make_inputs(config), torch.tensor([[11, 12, 13]])
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], question], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    state = state_after(model, inputs)
    torch.manual_seed(0)
    expected = generate(model, whole, **options)
    torch.manual_seed(0)
    assert torch.equal(generate(model, {"input_ids": question}, cache_params=state, **options), expected)


def test_beams_from_batched_states_equal_single_ones(model, config):
    samples = [make_inputs(config, 2, seed=1), make_inputs(config, 2, seed=2)]
    questions = torch.tensor([[11, 12, 13], [14, 15, 16]])
    state = state_after(model, pad_together(samples))
    together = generate(model, {"input_ids": questions}, cache_params=state, num_beams=2)
    for row, sample in enumerate(samples):
        question = {"input_ids": questions[row : row + 1]}
        alone = generate(model, question, cache_params=state_after(model, sample), num_beams=2)
        assert torch.equal(together[row : row + 1], alone)


def test_generation_from_a_copy_does_not_change_the_state(model, config):
    state = state_after(model, make_inputs(config))
    before = [layer.recurrent_states[0].clone() for layer in state.layers]
    first = generate(model, {"input_ids": torch.tensor([[11, 12]])}, cache_params=copy.deepcopy(state))
    generate(model, {"input_ids": torch.tensor([[13, 14]])}, cache_params=copy.deepcopy(state), num_beams=2)
    assert all(map(torch.equal, before, [layer.recurrent_states[0] for layer in state.layers]))
    again = generate(model, {"input_ids": torch.tensor([[11, 12]])}, cache_params=copy.deepcopy(state))
    assert torch.equal(first, again)


def test_returned_state_continues_the_text(model, config):
    inputs = make_inputs(config)
    expected = generate(model, inputs, max_new_tokens=12)
    output = model.generate(
        **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, return_dict_in_generate=True
    )
    last = output.sequences[:, -1:]  # the state does not contain the last token yet
    rest = generate(model, {"input_ids": last}, cache_params=output.past_key_values, max_new_tokens=7)
    assert torch.equal(torch.cat([output.sequences[:, -5:], rest], 1), expected)


# Refused options


@pytest.mark.parametrize("how", ["assistant", "prompt-lookup"])
def test_assisted_decoding_is_refused(model, config, how):
    """A recurrent state cannot remove rejected tokens."""
    options = {"assistant_model": model} if how == "assistant" else {"prompt_lookup_num_tokens": 2}
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(**make_inputs(config), max_new_tokens=4, **options)


def test_misspelt_options_are_refused(model, config):
    with pytest.raises(ValueError, match="max_new_token"):
        model.generate(**make_inputs(config), max_new_token=4)
