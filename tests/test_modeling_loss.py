"""The loss and its gradients against the cross-entropy of the logits at all positions."""

import copy

import pytest
import torch
from comparison import assert_same
from tiny import VOCABULARY, random_pixels, tiny_config, tiny_model
from torch.testing import assert_close
from transformers.loss.loss_utils import ForCausalLMLoss

from transformers_ma2mba.gradient_checkpointing import loss_in_pieces

# The logits, norms and scans of the language model are float32.
ROUNDED = dict(rtol=2e-6, atol=1e-7)


@pytest.fixture
def double(config):
    """The tiny model in float64, in training mode, which the test may change."""
    return tiny_model(config, dtype=torch.float64).train()


def make_batch(config) -> dict:
    """Two conversations, of two turns and one turn, the shorter one padded on the left.

    Answers are supervised, including their end of text.
    """
    video = [config.video_token_id] * config.tokens_per_frame
    image = [config.image_token_id] * config.tokens_per_frame
    long = [5, *video, *video, 6, 7, 0, 20, 21, 0, 8, 9, 0, 22, 0]
    long_labels = [-100] * 12 + [20, 21, 0] + [-100] * 3 + [22, 0]
    short = [5, *image, *video, 6, 23, 24, 25, 0]
    short_labels = [-100] * 10 + [23, 24, 25, 0]
    missing = len(long) - len(short)
    return {
        "input_ids": torch.tensor([long, [1] * missing + short]),
        "labels": torch.tensor([long_labels, [-100] * missing + short_labels]),
        "attention_mask": torch.tensor([[1] * len(long), [0] * missing + [1] * len(short)]),
        "pixel_values": random_pixels(1),
        "pixel_values_videos": random_pixels(3, seed=1),
    }


def naive_loss(model, inputs, labels, divisor=None) -> torch.Tensor:
    """The mean negative log probability of the supervised tokens, each predicted by the position before it."""
    log_probabilities = model(**inputs).logits.double().log_softmax(-1)
    total, count = 0.0, 0
    for row in range(len(labels)):
        for position in range(1, labels.shape[1]):
            if (label := int(labels[row, position])) != -100:
                total = total - log_probabilities[row, position - 1, label]
                count += 1
    return total / (divisor or count)


def split(batch):
    return {name: tensor for name, tensor in batch.items() if name != "labels"}, batch["labels"]


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_loss_and_gradients_equal_the_naive_ones(kind):
    config = tiny_config(kind)
    model = tiny_model(config, dtype=torch.float64).train()
    inputs, labels = split(make_batch(config))
    output = model(**inputs, labels=labels)
    expected = naive_loss(model, inputs, labels)
    assert_close(output.loss.double(), expected, **ROUNDED)
    assert expected > 1  # otherwise the comparison would prove little

    actual, expected = gradients(model, output.loss), gradients(model, expected)
    assert actual.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in actual.items():
        assert (gradient - expected[name]).abs().max() < 1e-5 * largest, name


def test_labels_equal_to_the_ids_supervise_all_positions_but_the_first(double):
    input_ids = torch.arange(2, 32).view(2, 15)
    assert_close(
        double(input_ids, labels=input_ids).loss.double(),
        naive_loss(double, {"input_ids": input_ids}, input_ids),
        **ROUNDED,
    )


def test_label_at_the_first_position_is_ignored(double):
    input_ids = torch.arange(2, 8)[None]
    labels = torch.full_like(input_ids, -100)
    labels[0, 0] = 2
    assert double(input_ids, labels=labels).loss == 0


def test_only_supervised_positions_go_through_the_head(double, config):
    inputs, labels = split(make_batch(config))
    shapes = []
    double.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    logits = double(**inputs, labels=labels).logits
    assert shapes == [(9, VOCABULARY)]  # 5 + 4 supervised tokens in 40 positions

    full = double(**inputs).logits
    assert logits.shape == (2, 5, VOCABULARY)
    assert_close(logits[0], full[0, [11, 12, 13, 17, 18]], rtol=1e-5, atol=1e-5)
    assert_close(logits[1, :4], full[1, [15, 16, 17, 18]], rtol=1e-5, atol=1e-5)
    assert not logits[1, 4].any()  # padding


def test_loss_without_supervised_tokens_is_zero(double, config):
    inputs, labels = split(make_batch(config))
    loss = double(**inputs, labels=torch.full_like(labels, -100)).loss
    assert loss == 0
    for name, gradient in gradients(double, loss).items():
        assert not gradient.any(), name  # NaN counts as true


def test_unsupervised_text_does_not_change_the_loss_of_the_batch(double, config):
    batch = make_batch(config)
    batch["labels"][1] = -100
    inputs, labels = split(batch)
    assert_close(double(**inputs, labels=labels).loss.double(), naive_loss(double, inputs, labels), **ROUNDED)


@pytest.mark.parametrize("items", [1, 9, 64, torch.tensor(7)], ids=str)
def test_num_items_in_batch_divides_the_loss(double, config, items):
    """The Trainer passes the number of supervised tokens in all batches of a step."""
    inputs, labels = split(make_batch(config))
    loss = double(**inputs, labels=labels, num_items_in_batch=items).loss
    assert_close(loss.double(), naive_loss(double, inputs, labels, divisor=int(items)), **ROUNDED)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("layer", [-1, -2, 1, 0])
def test_vision_layers_above_the_feature_layer_are_frozen(kind, layer):
    config = tiny_config(kind, vision_feature_layer=layer)
    model = tiny_model(config).train()
    batch = make_batch(config)
    model(**batch).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert with_gradient == trainable

    used = layer % 4  # hidden states 0 to 3
    tower = "model.vision_tower."
    above = tuple(f"{tower}encoder.layers.{index}." for index in range(used, 3))
    frozen = {
        name for name, _ in model.named_parameters() if name.startswith((*above, f"{tower}post_", f"{tower}head"))
    }
    assert trainable == {name for name, _ in model.named_parameters()} - frozen


def test_evaluation_and_training_give_the_same_loss(model, config):
    """The model has no dropout, and takes the same path in both."""
    batch = make_batch(config)
    with torch.no_grad():
        evaluated = model(**batch).loss
    assert_close(tiny_model(config).train()(**batch).loss, evaluated, **ROUNDED)


@pytest.fixture
def checkpointed(double, in_double, monkeypatch):
    """The model with MA-GC, whose loss takes two positions at a time, in float64 throughout."""
    monkeypatch.setattr(loss_in_pieces, "_BYTES_OF_A_PIECE", 2 * 8 * VOCABULARY)
    double.activation_checkpointing_enable()
    return double


def without_checkpointing(model):
    model = copy.deepcopy(model)
    model.activation_checkpointing_disable()
    return model


def rows_through_the_head(model, monkeypatch) -> list[int]:
    """A list that gets the number of rows of each later call of the head.

    A hook or wrapper of the head would disable the loss in pieces, so this replaces the function that the head calls.
    """
    rows, linear = [], torch.nn.functional.linear

    def count(inputs, weight, bias=None):
        if weight is model.lm_head.weight:
            rows.append(len(inputs))
        return linear(inputs, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", count)
    return rows


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": torch.tensor(64)}, {"ignore_index": 22}], ids=str)
def test_checkpointed_step_gives_the_plain_loss_in_pieces(checkpointed, config, options, monkeypatch):
    batch, plain = make_batch(config) | options, without_checkpointing(checkpointed)
    outputs = plain(**batch)
    expected = {"loss": outputs.loss, **gradients(plain, outputs.loss)}
    rows = rows_through_the_head(checkpointed, monkeypatch)
    outputs = checkpointed(**batch)
    assert outputs.logits is None
    actual = {"loss": outputs.loss, **gradients(checkpointed, outputs.loss)}
    once = [2, 2, 2, 2] if "ignore_index" in options else [2, 2, 2, 2, 1]  # one of 9 supervised tokens is 22
    assert rows == 2 * once  # once in forward, once in backward
    assert_same(actual, expected, smallest_norm=1e-4)


def test_checkpointed_model_omits_logits_only_if_pieces_suffice(checkpointed, config):
    """Logits come without gradients or labels, with a hook on the head, and for other losses or options."""
    inputs, labels = split(make_batch(config))
    batch = inputs | {"labels": labels}
    assert checkpointed(**batch).logits is None
    assert checkpointed(**inputs).logits.shape == (2, 20, VOCABULARY)
    with torch.no_grad():
        assert checkpointed(**batch).logits.shape == (2, 5, VOCABULARY)
    assert checkpointed.eval()(**batch).logits.shape == (2, 5, VOCABULARY)
    assert checkpointed.train()(**batch, label_smoothing=0.1).logits is not None
    assert checkpointed(**batch, return_dict=True).logits is None
    hook = checkpointed.lm_head.register_forward_hook(lambda *args: None)
    assert checkpointed(**batch).logits is not None
    hook.remove()
    assert without_checkpointing(checkpointed)(**batch).logits is not None
    checkpointed.loss_function = lambda logits, **kwargs: 2 * ForCausalLMLoss(logits, **kwargs)
    outputs = checkpointed(**batch)
    assert outputs.logits is not None
    del checkpointed._loss_function
    assert_close(outputs.loss, 2 * checkpointed(**batch).loss)


def test_checkpointed_loss_without_supervised_tokens_is_zero(checkpointed, config):
    inputs, labels = split(make_batch(config))
    loss = checkpointed(**inputs, labels=torch.full_like(labels, -100)).loss
    assert loss == 0
    found = gradients(checkpointed, loss)
    assert found.keys() == {name for name, parameter in checkpointed.named_parameters() if parameter.requires_grad}
    assert not any(gradient.any() for gradient in found.values())


def test_autocast_loss_is_close_to_float32(config):
    """The Trainer's `bf16` keeps weights in float32, and computes most operations in bfloat16."""
    model, batch = tiny_model(config).train(), make_batch(config)
    expected = model(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    assert loss.dtype == torch.float32 and loss != expected
    assert_close(loss, expected, rtol=0.05, atol=0)
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values())


def test_model_declares_its_loss_type(model):
    """Otherwise Transformers would guess it, warn, and tell the Trainer that labels are not shifted."""
    assert model.loss_type == "ForCausalLM"
    assert model.loss_function is ForCausalLMLoss


def test_loss_works_after_resizing_the_vocabulary(config):
    model = tiny_model(config)
    batch = make_batch(config)
    model.resize_token_embeddings(VOCABULARY + 8)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.text_config.vocab_size == VOCABULARY + 8
    batch["input_ids"][0, -2] = batch["labels"][0, -2] = VOCABULARY + 3
    output = model(**batch)
    assert output.loss.isfinite() and output.logits.shape[-1] == VOCABULARY + 8
