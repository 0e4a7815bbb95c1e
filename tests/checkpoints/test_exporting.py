"""Export: stock Mamba-2 and the plain reference give equal logits, and all that is written comes back bit by bit."""

import json

import original_mamba2 as original
import pytest
import torch
from comparison import LargestTensor
from peft import LoraConfig, get_peft_model
from references import authors_config, authors_weights, random_weights, vision_shapes, write_checkpoint, write_encoder
from safetensors.torch import load_file, save_file
from tiny import random_pixels, tiny_config, tiny_model, tiny_processor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModel, AutoTokenizer, Mamba2ForCausalLM

from transformers_ma2mba import Ma2mbaForVideoQA
from transformers_ma2mba.checkpoints.building import build_model
from transformers_ma2mba.checkpoints.converting import convert_published
from transformers_ma2mba.checkpoints.exporting import LAYOUTS, export_model
from transformers_ma2mba.checkpoints.tensor_files import TensorFolder

IDS = [5, 9, 300, 17, 2, 41, 8]


def save(folder, tie=True, dtype=torch.float32, kind="clip", **options) -> Ma2mbaForVideoQA:
    """A saved model with its processor."""
    config = tiny_config(kind, text={"tie_word_embeddings": tie}, tie_word_embeddings=tie, **options)
    processor = tiny_processor(config)
    model = tiny_model(config, dtype=dtype)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def same_bits(found, expected):
    found, expected = dict(found), dict(expected)
    assert found.keys() == expected.keys()
    return all(found[name].dtype == w.dtype and torch.equal(found[name], w) for name, w in expected.items())


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [5 * 10**9, 20_000], ids=["one-file", "shards"])
def test_stock_mamba2_gives_equal_logits(tmp_path, tie, dtype, size):
    model = save(tmp_path / "model", tie, dtype)
    export_model(tmp_path / "model", tmp_path / "stock", "transformers", max_shard_size=size)
    stock, info = Mamba2ForCausalLM.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(info.values()), info
    assert stock.dtype == dtype and (stock.lm_head.weight is stock.get_input_embeddings().weight) == tie
    language = model.model.language_model.state_dict()
    assert same_bits(stock.backbone.state_dict(), language)
    stock, model = stock.float(), model.float()
    with torch.no_grad():
        found, expected = (either(torch.tensor([IDS])).logits for either in (stock, model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "stock").tokenize("red green")


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_the_original_layout_gives_the_reference_s_logits(tmp_path, tie):
    model = save(tmp_path / "model", tie)
    export_model(tmp_path / "model", tmp_path / "original", "original")
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    state = torch.load(tmp_path / "original" / "pytorch_model.bin", weights_only=True)
    assert "lm_head.weight" in state and "backbone.embedding.weight" in state
    with torch.no_grad():
        found = model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(found, original.logits(config, state, IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["original", "transformers"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_language_model_comes_back_bit_by_bit(tmp_path, layout, tie, dtype):
    """Original, built, exported: the same file, also with the padded vocabulary and the head."""
    config = original.settings(tie_embeddings=tie)
    state = original.weights(config, dtype=dtype)
    original.write_original(tmp_path / "source", config, state)
    save(tmp_path / "other")
    write_encoder(tmp_path / "clip", "clip", random_weights(vision_shapes("clip", 3)))
    build_model(tmp_path / "source", tmp_path / "clip", tmp_path / "built", tokenizer=tmp_path / "other")
    export_model(tmp_path / "built", tmp_path / "again", layout)
    if layout == "original":
        assert same_bits(torch.load(tmp_path / "again" / "pytorch_model.bin", weights_only=True), state)
        return
    named = {name.replace("embedding.", "embeddings."): weight for name, weight in state.items()}
    if tie:
        del named["lm_head.weight"]
    assert same_bits(load_file(tmp_path / "again" / "model.safetensors"), named)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_vision_encoder_loads_alone_and_builds_a_model_again(tmp_path, kind):
    original.write_original(tmp_path / "mamba2", config := original.settings(), original.weights(config))
    write_encoder(tmp_path / "encoder", kind, random_weights(vision_shapes(kind, 3)))
    save(tmp_path / "other")
    build_model(tmp_path / "mamba2", tmp_path / "encoder", tmp_path / "built", tokenizer=tmp_path / "other")
    export_model(tmp_path / "built", tmp_path / "vision", "vision")

    tower = AutoModel.from_pretrained(tmp_path / "built").model.vision_tower
    alone, report = type(tower).from_pretrained(tmp_path / "vision", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert alone.config.architectures == [type(tower).__name__]
    assert same_bits(dict(alone.state_dict()), dict(tower.state_dict()))
    build_model(tmp_path / "mamba2", tmp_path / "vision", tmp_path / "again", tokenizer=tmp_path / "other")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("built", "again"))
    assert same_bits(first, second)


# The authors' layout


@pytest.fixture
def published(tmp_path):
    """A folder in the authors' layout, with its encoder beside it, and the folder of a tokenizer."""

    def write(kind="siglip", dtype=torch.float32, changes=None, **options):
        write_encoder(tmp_path / kind, kind, random_weights(vision_shapes(kind, 3), seed=1))
        config = {**authors_config(tmp_path / kind), **(changes or {})}
        weights = {name: weight.to(dtype) for name, weight in authors_weights(config, kind).items()}
        save(tmp_path / "other")
        return write_checkpoint(tmp_path / "published", config, weights, **options), weights

    return write


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@pytest.mark.parametrize("mode", ["bilinear", "average"])
@pytest.mark.parametrize("model_type", ["llava_mamba", "mamba2"])
def test_a_published_checkpoint_is_converted(tmp_path, published, kind, mode, model_type):
    folder, _ = published(kind, changes={"mm_spatial_pool_mode": mode})
    expected = AutoModel.from_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": model_type}))
    convert_published(folder, tmp_path / "ours", tokenizer=tmp_path / "other")
    model, info = AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(model) is Ma2mbaForVideoQA and not any(info.values()), info
    assert model.config.spatial_pool_rounding == ("up" if mode == "bilinear" else "down")
    ids = torch.tensor([[5, *[model.config.video_token_id] * 2 * model.config.tokens_per_frame, 9, 7]])
    pixels = random_pixels(2, model.config.vision_config.image_size)
    with torch.no_grad():
        found, logits = (m(ids, pixel_values_videos=pixels).logits for m in (model, expected))
    assert torch.equal(found, logits)


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"files": 10, "suffix": "bin"}], ids=["one-file", "ten-files"])
def test_a_published_checkpoint_comes_back_bit_by_bit(tmp_path, published, kind, dtype, options):
    folder, weights = published(kind, dtype, **options)
    convert_published(folder, tmp_path / "ours", tokenizer=tmp_path / "other")
    export_model(tmp_path / "ours", tmp_path / "again", "published", vision_tower=str(tmp_path / kind))
    again = dict(TensorFolder(tmp_path / "again"))
    assert same_bits({name: again[name] for name in weights}, weights)
    settings, before = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "again", folder))
    for name in ("d_model", "n_layer", "mm_vision_tower", "mm_spatial_pool_mode", "tie_embeddings", "vocab_size"):
        assert settings[name] == before[name], name
    assert type(AutoModel.from_pretrained(tmp_path / "again")) is Ma2mbaForVideoQA


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_vision_weights_may_lie_in_their_own_repository(tmp_path, published, kind):
    folder, weights = published(kind)
    write_checkpoint(
        folder,
        json.loads((folder / "config.json").read_text()),
        {name: weight for name, weight in weights.items() if "vision_tower" not in name},
    )
    convert_published(folder, tmp_path / "ours", tokenizer=tmp_path / "other")
    encoder = load_file(tmp_path / kind / "model.safetensors")
    for name, weight in load_file(tmp_path / "ours" / "model.safetensors").items():
        if name.startswith("model.vision_tower."):
            own = name.removeprefix("model.vision_tower.")
            assert torch.equal(weight, encoder.get(own, encoder.get(f"vision_model.{own}")))


def test_heads_of_a_frame_selector_are_named(tmp_path, published):
    folder, weights = published()
    write_checkpoint(
        folder, json.loads((folder / "config.json").read_text()), {**weights, "key_head.weight": torch.ones(2)}
    )
    with pytest.warns(UserWarning, match="frame selector .* left out: key_head.weight"):
        convert_published(folder, tmp_path / "ours", tokenizer=tmp_path / "other")


def test_settings_without_a_place_in_the_authors_layout(tmp_path):
    save(tmp_path / "model", projector_hidden_act="relu", image_mean=[0.1, 0.1, 0.1], vision_feature_layer=-1)
    write_encoder(tmp_path / "clip", "clip", random_weights(vision_shapes("clip", 3)))
    with pytest.raises(ValueError, match="name it with --vision_tower"):
        export_model(tmp_path / "model", tmp_path / "out", "published")
    with pytest.raises(ValueError, match="projector_hidden_act = 'relu' would become 'gelu'; .*image_mean = "):
        export_model(tmp_path / "model", tmp_path / "out", "published", vision_tower=str(tmp_path / "clip"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "vision_config.hidden_act = 'gelu' would become 'quick_gelu'"),
        ({"layer_norm_eps": 1e-6}, "vision_config.layer_norm_eps = 1e-06 would become 1e-05"),
    ],
)
def test_a_vision_encoder_that_computes_otherwise(tmp_path, changes, message):
    """Its weights would load into the encoder that is named, without an error."""
    save(tmp_path / "model", vision=changes)
    config = tiny_config().vision_config
    write_encoder(tmp_path / "clip", "clip", random_weights(vision_shapes("clip", 3)))
    config.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=message):
        export_model(tmp_path / "model", tmp_path / "out", "published", vision_tower=str(tmp_path / "clip"))


def test_the_tokens_and_their_end_have_no_place_in_the_authors_layout(tmp_path):
    options = {"image_token_id": 379, "video_token_id": 380, "unpadded_vocab_size": 382}
    tiny_model(tiny_config(text={"eos_token_id": 2}, **options)).save_pretrained(tmp_path / "model")
    tiny_config().vision_config.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="unpadded_vocab_size = 382 would become 381; text_config.eos_token_id = 2 "):
        export_model(tmp_path / "model", tmp_path / "out", "published", vision_tower=str(tmp_path / "clip"))


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_the_model_decides_whether_the_head_is_tied(tmp_path, tie, layout):
    """Its configuration says it twice, and the language model's own part may say otherwise."""
    config = tiny_config(text={"tie_word_embeddings": not tie}, tie_word_embeddings=tie)
    model = tiny_model(config)
    model.save_pretrained(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "out", layout)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["tie_word_embeddings" if layout == "transformers" else "tie_embeddings"] == tie
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0]
        if layout == "transformers":
            found = Mamba2ForCausalLM.from_pretrained(tmp_path / "out")(torch.tensor([IDS])).logits[0]
        else:
            state = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
            found = original.logits(settings, state, IDS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_matrices_decide_the_dtype_of_mixed_weights(tmp_path):
    save(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = {name: w.bfloat16() if w.ndim == 2 else w for name, w in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    export_model(tmp_path / "model", tmp_path / "out", "transformers")
    assert Mamba2ForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert {exported[f"backbone.{name}.weight"].dtype for name in ("embeddings", "norm_f")} == {
        torch.bfloat16,
        torch.float32,
    }


def test_a_model_after_training(tmp_path):
    """Tokens were added, an adapter was merged, and the vision encoder was trained."""
    model = save(tmp_path / "model")
    model.resize_token_embeddings(392)
    config = LoraConfig(target_modules=["in_proj"], init_lora_weights=False)
    merged = get_peft_model(model, config).merge_and_unload()
    for weight in merged.model.vision_tower.parameters():
        weight.data += 0.1
    merged.save_pretrained(tmp_path / "trained")
    for layout in ("transformers", "original"):
        export_model(tmp_path / "trained", tmp_path / layout, layout)
    stock = Mamba2ForCausalLM.from_pretrained(tmp_path / "transformers")
    ids = [*IDS, 388]
    settings = json.loads((tmp_path / "original" / "config.json").read_text())
    state = torch.load(tmp_path / "original" / "pytorch_model.bin", weights_only=True)
    with torch.no_grad():
        expected, found = (either(torch.tensor([ids])).logits[0] for either in (merged, stock))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(original.logits(settings, state, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_one_tensor_is_in_memory_at_a_time(tmp_path, published, monkeypatch, kind):
    """In all commands, each tensor is released before the next is read, and none larger than the largest is made."""
    files = {"files": 3, "suffix": kind}
    theirs, _ = published("clip", changes={"tie_embeddings": False}, **files)
    config = original.settings(tie_embeddings=True)
    state = original.weights(config)
    original.write_original(tmp_path / "mamba2", config, state, number=3)
    held, read = [], TensorFolder.__getitem__

    def checked(tensors, name):
        assert all(storage.expired() for storage in held), name
        tensor = read(tensors, name)
        held.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    monkeypatch.setattr(TensorFolder, "__getitem__", checked)
    with LargestTensor() as largest:
        build_model(tmp_path / "mamba2", tmp_path / "clip", tmp_path / "built", tokenizer=tmp_path / "other")
        convert_published(theirs, tmp_path / "ours", tokenizer=tmp_path / "other", dtype=torch.bfloat16)
        for layout in LAYOUTS:
            export_model(tmp_path / "ours", tmp_path / f"to-{layout}", layout, vision_tower=str(tmp_path / "clip"))
    assert len(held) > 200
    assert largest.numel <= state["backbone.embedding.weight"].nbytes


# Errors


def test_a_configuration_that_cannot_be_used(tmp_path):
    save(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "frame_rate": "fast"}))
    with pytest.raises(ValueError, match="configuration in .*model' cannot be used: .*frame_rate") as caught:
        export_model(tmp_path / "model", tmp_path / "out", "original")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("d_model", "32"), ("ssm_cfg", "Mamba2"), ("vocab_size", None), ("vision_encode_chunk_size", -1)],
)
def test_a_published_configuration_that_cannot_be_used(tmp_path, published, key, value):
    folder, _ = published()
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, key: value}))
    with pytest.raises(ValueError, match="configuration in .*published' cannot be used: ") as caught:
        convert_published(folder, tmp_path / "ours", tokenizer=tmp_path / "other")
    assert "\n" not in str(caught.value)


def test_quantized_weights_are_refused(tmp_path, published):
    folder, weights = published()
    name = "backbone.layers.0.mixer.in_proj.weight"
    settings = json.loads((folder / "config.json").read_text())
    write_checkpoint(folder, settings, {**weights, name: weights[name].to(torch.int8)})
    with pytest.raises(ValueError, match=f"{name} in .* is stored as torch.int8: quantized"):
        convert_published(folder, tmp_path / "ours", tokenizer=tmp_path / "other", dtype=torch.float32)


def test_other_models_are_refused(tmp_path, published):
    folder, _ = published()
    with pytest.raises(ValueError, match="holds a 'llava_mamba' model; export takes a saved Ma2mbaForVideoQA"):
        export_model(folder, tmp_path / "out", "original")
    with pytest.raises(ValueError, match="no Video-Ma²mba in its authors' layout"):
        convert_published(tmp_path / "other", tmp_path / "out")
    with pytest.raises(ValueError, match="no layout 'gguf'"):
        export_model(tmp_path / "other", tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_are_listed(tmp_path, published):
    folder, weights = published()
    name = "backbone.layers.0.mixer.D"
    rest = {key: weight for key, weight in weights.items() if key != "backbone.norm_f.weight"}
    write_checkpoint(
        folder, json.loads((folder / "config.json").read_text()), {**rest, name: torch.ones(3), "other": torch.ones(1)}
    )
    with pytest.raises(ValueError) as caught:
        convert_published(folder, tmp_path / "ours", tokenizer=tmp_path / "other")
    lines = str(caught.value).splitlines()
    assert lines[1].startswith("  missing: model.language_model.norm_f.weight")
    assert lines[2].startswith("  left over: other")
    assert lines[3].startswith("  wrong shape: model.language_model.layers.0.mixer.D is [3]")
