"""Weights in 4 and 8 bits by bitsandbytes: loading, answers, saved models and states, and adapters on top."""

import copy

import pytest
import torch
from comparison import assert_same
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from quantization import why_not
from tiny import random_frames, tiny_config, tiny_model
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig, pipeline
from transformers.models.mamba2 import modeling_mamba2
from video_step import CANDIDATES, QUESTION, gradients, video_batch

from transformers_ma2mba import FrozenVisionFeatures, VideoSession

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

KINDS = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    # The type of the product is another than that of the checkpoint.
    "fp4": dict(load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16),
    "int8": dict(load_in_8bit=True),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def load(path, kind, **options):
    return AutoModel.from_pretrained(path, quantization_config=BitsAndBytesConfig(**KINDS[kind], **options))


def answers(model, processor=None) -> list[dict]:
    qa = pipeline("video-question-answering", model=model, processor=processor)
    return qa(video=random_frames(5), question=QUESTION, candidates=CANDIDATES)


def test_all_linear_layers_but_the_tied_head_are_quantized(checkpoint, kind):
    model = load(checkpoint, kind)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert [name for name, module in linear.items() if module.weight.is_floating_point()] == ["lm_head"]
    assert {"model.multi_modal_projector.linear_1", "model.language_model.layers.0.mixer.out_proj"} < linear.keys()
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("kind", ["nf4", "int8"], indirect=True)
def test_outputs_are_those_of_the_rounded_weights(checkpoint, kind, config):
    model, batch = load(checkpoint, kind), video_batch(config)
    found = model(**batch)
    rounded = copy.deepcopy(model).dequantize(torch.float32)
    assert all(module.weight.is_floating_point() for module in rounded.modules() if isinstance(module, nn.Linear))
    expected = rounded(**batch)
    # Products with 8-bit weights also round their inputs.
    assert_same([found.logits], [expected.logits], tolerance=1e-5 if kind == "nf4" else 0.05)
    exact = AutoModel.from_pretrained(checkpoint)(**batch).logits
    assert 0.01 < (found.logits - exact).norm() / exact.norm() < 1.5


def test_an_untied_head_may_be_quantized(tmp_path, kind):
    config = tiny_config(text=dict(tie_word_embeddings=False), tie_word_embeddings=False)
    tiny_model(config).save_pretrained(tmp_path)
    model, batch = load(tmp_path, kind, llm_int8_skip_modules=["model.vision_tower"]), video_batch(config)
    assert not model.lm_head.weight.is_floating_point()
    loss = model(**batch).loss
    del batch["labels"]
    assert loss.isfinite() and model(**batch).logits.isfinite().all()


def test_a_tied_head_cannot_be_quantized(checkpoint, kind):
    with pytest.raises(ValueError, match="lm_head cannot be quantized.*add 'lm_head' to llm_int8_skip_modules"):
        load(checkpoint, kind, llm_int8_skip_modules=["model.vision_tower"])
    model = load(checkpoint, kind, llm_int8_skip_modules=["model.vision_tower", "lm_head"])
    assert model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.is_floating_point()


def test_a_saved_model_answers_the_same(checkpoint, kind, processor, tmp_path):
    model = load(checkpoint, kind)
    expected = answers(model, processor)
    watched = pipeline("video-question-answering", model=model, processor=processor).watch(random_frames(5))
    assert watched.ask(QUESTION, CANDIDATES) == expected
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert answers(str(tmp_path / "model")) == expected
    watched.save(tmp_path / "film")
    # Models that have not seen a frame yet: a fingerprint must not depend on that.
    for fresh in (load(checkpoint, kind), AutoModel.from_pretrained(tmp_path / "model")):
        assert VideoSession.resume(tmp_path / "film", fresh, processor).ask(QUESTION, CANDIDATES) == expected


def test_generation(checkpoint, kind, processor):
    model = load(checkpoint, kind)
    batch = processor(text=f"{processor.video_token} {QUESTION}", videos=[random_frames(3)], return_tensors="pt")
    generated = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, batch["input_ids"].shape[1] + 4)


def test_kept_features_of_a_quantized_vision_tower(checkpoint, kind, processor, film, monkeypatch, tmp_path):
    """A film is encoded once, and the weights are hashed once."""
    features = FrozenVisionFeatures(load(checkpoint, kind).requires_grad_(False), processor, tmp_path)
    tower, hashed, encoded = features.model.vision_tower, [], []
    monkeypatch.setattr(tower, "state_dict", lambda: hashed.append(1) or type(tower).state_dict(tower))
    found = features(film)
    again = FrozenVisionFeatures(load(checkpoint, kind).requires_grad_(False), processor, tmp_path)
    for kept in (features, again):
        monkeypatch.setattr(kept, "_encode", encoded.append)
        assert torch.equal(kept(film).features, found.features)
    assert hashed == [1] and encoded == []


def test_blank_features_are_numbers_that_the_projector_takes(checkpoint, kind):
    """A process without frames projects them for the others."""
    model = load(checkpoint, kind)
    assert model.model._project_blank_features(1) == 0


def quantized_with_adapters(checkpoint, kind, processor, **options):
    """A quantized model, prepared for training, that has answered already."""
    model = load(checkpoint, kind)
    answers(model, processor)
    model = prepare_model_for_kbit_training(model, **options)
    torch.manual_seed(5)
    targets = dict(target_modules="all-linear", exclude_modules=model.unused_modules())
    return get_peft_model(model, LoraConfig(r=3, init_lora_weights=False, **targets))


def two_steps(model, batch) -> dict:
    """Gradients and weights of two steps of gradient descent."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.01), {}
    for step in range(2):
        found |= {f"{name}, {step}": value for name, value in gradients(model, batch).items()}
        optimizer.step()
    return found | {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_two_steps_with_adapters(checkpoint, kind, processor, config):
    batch = video_batch(config)
    plain = quantized_with_adapters(checkpoint, kind, processor, use_gradient_checkpointing=False)
    assert not plain.is_gradient_checkpointing
    expected = two_steps(plain, batch)
    assert all("lora" in name or "loss" in name for name in expected)
    for order in ("layer-major", "sequence-major"):
        options = {"layer_interval": 1, "sequence_interval": 8, "order": order}
        model = quantized_with_adapters(checkpoint, kind, processor, gradient_checkpointing_kwargs=options)
        assert model.is_gradient_checkpointing
        # bitsandbytes rounds each segment's products in bfloat16 for "fp4".
        assert_same(two_steps(model, batch), expected, tolerance=0.02 if kind == "fp4" else 1e-4, nonzero=True)


@pytest.mark.parametrize("kind", ["nf4"], indirect=True)
def test_gradients_are_those_of_the_rounded_weights(checkpoint, kind, processor, config):
    adapted, batch = quantized_with_adapters(checkpoint, kind, processor), video_batch(config)
    rounded = copy.deepcopy(adapted)
    for name, layer in list(rounded.named_modules()):
        if name.endswith("base_layer"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight, plain.bias = nn.Parameter(dequantized(layer), requires_grad=False), layer.bias
            rounded.set_submodule(name, plain)
    assert_same(gradients(adapted, batch), gradients(rounded, batch), tolerance=1e-4, nonzero=True)


def dequantized(layer) -> torch.Tensor:
    import bitsandbytes

    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def test_kernel_of_whole_layers_leaves_quantized_projections_alone(checkpoint, config, monkeypatch):
    """It reads the weight of `out_proj`, and not as integers."""
    model, allowed = load(checkpoint, "nf4").train(), []
    monkeypatch.setattr(
        modeling_mamba2,
        "mamba2_split_conv1d_scan_combined",
        lambda *args, **kwargs: allowed.append(kwargs.get("whole_layers", True)),
    )
    model(**video_batch(config))
    assert allowed == [False] * 2
