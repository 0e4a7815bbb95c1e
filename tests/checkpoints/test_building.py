"""Building a model from a language model and a vision encoder: equal to one that is put together in memory."""

import json
import subprocess
import sys

import original_mamba2 as original
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_pixels, tiny_tokenizer, tiny_vision_config
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionModel,
    GenerationConfig,
    Mamba2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionModel,
)

from transformers_ma2mba import Ma2mbaConfig, Ma2mbaForVideoQA
from transformers_ma2mba.checkpoints.building import build_model

TOWERS = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}


def vision_tower(kind="clip", **options):
    torch.manual_seed(1)
    return TOWERS[kind](tiny_vision_config(kind, **options)).eval()


def write_vision(folder, kind="clip", whole=False, prefix=True, dtype=torch.float32):
    """Write a vision encoder as it is published: with the prefix `vision_model.`, and with or without a text tower."""
    tower = vision_tower(kind).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    config = tower.config
    state = {("vision_model." if prefix else "") + name: weight for name, weight in tower.state_dict().items()}
    if whole:
        text_class, config_class, model_class = {
            "clip": (CLIPTextConfig, CLIPConfig, CLIPModel),
            "siglip": (SiglipTextConfig, SiglipConfig, SiglipModel),
        }[kind]
        text = text_class(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
        config = config_class(text_config=text.to_dict(), vision_config=config.to_dict())
        rest = {name: w for name, w in model_class(config).state_dict().items() if not name.startswith("vision_model")}
        state |= {name: weight.clone() for name, weight in rest.items()}
        # Early files stored this buffer.
        state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors")
    return tower


@pytest.fixture
def parts(tmp_path):
    """Folders of a language model in the original layout with its tokenizer, and of a CLIP."""
    config = original.settings()
    original.write_original(tmp_path / "mamba2", config, original.weights(config))
    tiny_tokenizer().save_pretrained(tmp_path / "mamba2")
    write_vision(tmp_path / "clip")
    return tmp_path / "mamba2", tmp_path / "clip"


def put_together(config: Ma2mbaConfig, tower, state: dict[str, torch.Tensor], seed=0) -> Ma2mbaForVideoQA:
    """The model that `build` should write, from modules in memory."""
    model = Ma2mbaForVideoQA(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    stock = {name.replace("embedding.", "embeddings."): weight for name, weight in state.items()}
    language_model = Mamba2ForCausalLM(config.text_config)
    language_model.load_state_dict(stock)
    model.model.language_model = language_model.backbone
    model.lm_head = language_model.lm_head
    torch.manual_seed(seed)
    model.model.multi_modal_projector.apply(lambda module: _initialise(model, module))
    return model


def _initialise(model, module):
    for parameter in module.parameters(recurse=False):
        parameter._is_hf_initialized = False
    model._init_weights(module)


def predictions(model):
    config = model.config
    ids = [5, *[config.video_token_id] * 2 * config.tokens_per_frame, 9, 7]
    with torch.no_grad():
        return model(torch.tensor([ids]), pixel_values_videos=random_pixels(2)).logits


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("whole", [False, True], ids=["tower", "repository"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_a_built_model_equals_one_put_together_in_memory(tmp_path, kind, whole, tie):
    settings = original.settings(tie_embeddings=tie)
    state = original.weights(settings)
    original.write_original(tmp_path / "mamba2", settings, state, number=3)
    tower = write_vision(tmp_path / "vision", kind, whole)
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    build_model(tmp_path / "mamba2", tmp_path / "vision", tmp_path / "new", tokenizer=tmp_path / "tokenizer", seed=4)

    model, info = AutoModel.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert type(model) is Ma2mbaForVideoQA
    assert not any(info.values()), info
    expected = put_together(Ma2mbaConfig.from_pretrained(tmp_path / "new"), tower, state, seed=4)
    weights, expected_weights = model.state_dict(), expected.state_dict()
    assert weights.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        assert torch.equal(weights[name], weight), name
    assert torch.equal(predictions(model), predictions(expected))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_tower_as_transformers_saves_it(tmp_path, parts, kind):
    tower = vision_tower(kind)
    tower.save_pretrained(tmp_path / "saved")
    build_model(parts[0], tmp_path / "saved", tmp_path / "new")
    built = AutoModel.from_pretrained(tmp_path / "new").model.vision_tower.state_dict()
    assert all(torch.equal(built[name], weight) for name, weight in tower.state_dict().items())


def test_the_language_model_gives_the_reference_s_logits(tmp_path, parts):
    build_model(*parts, tmp_path / "new")
    ids = [5, 9, 300, 17, 2, 41]
    config = original.settings()
    with torch.no_grad():
        found = AutoModel.from_pretrained(tmp_path / "new")(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found, original.logits(config, original.weights(config), ids), rtol=1e-5, atol=1e-5)


def test_the_files_of_a_new_checkpoint(tmp_path, parts):
    build_model(*parts, tmp_path / "new")
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert {"processor_config.json", "chat_template.jinja"} <= names
    config = Ma2mbaConfig.from_pretrained(tmp_path / "new")
    assert config.architectures == ["Ma2mbaForVideoQA"] and config.dtype == torch.float32
    assert (config.image_token_id, config.video_token_id) == (382, 383)
    assert config.vision_feature_layer == -2 and config.tie_word_embeddings
    generation = GenerationConfig.from_pretrained(tmp_path / "new")
    assert (generation.eos_token_id, generation.pad_token_id) == (0, 1)
    processor = AutoProcessor.from_pretrained(tmp_path / "new")
    processor.check_model_config(config)
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<video>"]) == [382, 383]


def test_a_built_checkpoint_saves_the_same_files(tmp_path, parts):
    build_model(*parts, tmp_path / "new", dtype=torch.bfloat16)
    AutoModel.from_pretrained(tmp_path / "new").save_pretrained(tmp_path / "again")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "new" / name).read_text()) == json.loads((tmp_path / "again" / name).read_text())
    new, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("new", "again"))
    assert new.keys() == again.keys() and all(torch.equal(new[name], again[name]) for name in new)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_one_dtype_for_all(tmp_path, stored, dtype):
    settings = original.settings()
    state = original.weights(settings, dtype=stored)
    original.write_original(tmp_path / "mamba2", settings, state)
    tiny_tokenizer().save_pretrained(tmp_path / "mamba2")
    write_vision(tmp_path / "clip")
    build_model(tmp_path / "mamba2", tmp_path / "clip", tmp_path / "new", dtype=dtype)
    weights = load_file(tmp_path / "new" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {dtype or stored}
    embeddings = weights["model.language_model.embeddings.weight"]
    assert torch.equal(embeddings, state["backbone.embedding.weight"].to(dtype or stored))
    assert AutoModel.from_pretrained(tmp_path / "new").dtype == (dtype or stored)


def test_shards(tmp_path, parts):
    build_model(*parts, tmp_path / "one")
    build_model(*parts, tmp_path / "many", max_shard_size=20_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (AutoModel.from_pretrained(tmp_path / name) for name in ("one", "many"))
    assert all(torch.equal(weight, many.state_dict()[name]) for name, weight in one.state_dict().items())


def test_the_seed_decides_the_projector_only(tmp_path, parts):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_model(*parts, tmp_path / name, seed=seed)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    differing = {name for name in a if not torch.equal(a[name], c[name])}
    assert differing == {f"model.multi_modal_projector.linear_{i}.weight" for i in (1, 2)}


def test_a_full_vocabulary_gets_rows_for_the_placeholders(tmp_path):
    """Codestral's tokenizer uses every row."""
    config = original.settings(
        ssm_cfg={"layer": "Mamba2", "headdim": 8, "ngroups": 8}, vocab_size=382, pad_vocab_size_multiple=1
    )
    state = original.weights({**config, "tie_embeddings": False})
    original.write_codestral(tmp_path / "codestral", {**config, "tie_embeddings": False}, state)
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    write_vision(tmp_path / "clip")
    build_model(tmp_path / "codestral", tmp_path / "clip", tmp_path / "new", tokenizer=tmp_path / "tokenizer")
    model = AutoModel.from_pretrained(tmp_path / "new")
    assert model.config.text_config.vocab_size == 384 and model.config.image_token_id == 382
    for found, name in (
        (model.get_input_embeddings(), "backbone.embedding.weight"),
        (model.lm_head, "lm_head.weight"),
    ):
        assert torch.equal(found.weight[:382], state[name])
        assert len(found.weight) == 384 and not torch.equal(found.weight[382], found.weight[383])
    assert model.config.text_config.eos_token_id == 0  # the tokenizer's


def test_pixels_are_normalised_as_the_encoder_was_trained(tmp_path, parts):
    (parts[1] / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    config = build_model(*parts, tmp_path / "new")
    assert config.image_mean == [0.1, 0.2, 0.3] and config.image_std == pytest.approx([0.268, 0.261, 0.275], abs=1e-3)
    write_vision(tmp_path / "siglip", "siglip")
    config = build_model(parts[0], tmp_path / "siglip", tmp_path / "other")
    assert config.image_mean == config.image_std == [0.5, 0.5, 0.5]
    assert list(AutoProcessor.from_pretrained(tmp_path / "other").video_processor.image_mean) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("mean", "expected"), [(0.5, [0.5] * 3), (None, [0.48145466, 0.4578275, 0.40821073])], ids=["number", "null"]
)
def test_a_mean_that_is_no_list(tmp_path, parts, mean, expected):
    (parts[1] / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean}))
    assert build_model(*parts, tmp_path / "new").image_mean == expected


@pytest.mark.parametrize("mean", [[0.5], "half", [0.5, "x", 0.5]], ids=str)
def test_a_mean_that_cannot_be_used(tmp_path, parts, mean):
    (parts[1] / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean}))
    with pytest.raises(ValueError, match="configuration in .*clip' cannot be used: .*image_mean") as caught:
        build_model(*parts, tmp_path / "new")
    assert "\n" not in str(caught.value)


MEASURED = """
import sys
from pathlib import Path
from transformers_ma2mba.checkpoints.building import build_model
folder = Path(sys.argv[1])
for source in ("small-transformers", "small-original", "large-transformers", "large-original"):
    build_model(folder / source, folder / "clip", folder / f"{source}-built", tokenizer=folder / "tokenizer")
    status = Path("/proc/self/status").read_text()
    print(1024 * int(status.split("VmHWM:")[1].split()[0]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_near_the_largest_tensor(tmp_path):
    """The published vocabulary, a narrow trunk and an untied head. Small models come first, as a warm-up."""
    for size, changes in (
        ("small", {}),
        ("large", {"d_model": 256, "vocab_size": 50277, "n_layer": 16, "ssm_cfg": {"layer": "Mamba2"}}),
    ):
        config = original.settings(**changes, tie_embeddings=False)
        state = original.weights(config)
        original.write_original(tmp_path / f"{size}-original", config, state, number=2)
        original.write_transformers(tmp_path / f"{size}-transformers", config, state, number=2)
    write_vision(tmp_path / "clip")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    finished = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path], capture_output=True, text=True, timeout=300, check=True
    )
    *_, warm, from_safetensors, from_pickle = map(int, finished.stdout.split())
    largest = 50288 * 256 * 4
    assert (tmp_path / "large-original-built" / "model.safetensors").stat().st_size > 2.5 * largest
    assert from_safetensors - warm < 1.5 * largest
    # A pickle's tensor is in memory twice, as part of the mapped file and as a copy of it.
    assert from_pickle - warm < 2.75 * largest


# Errors


def assert_nothing_new(tmp_path, before):
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_without_a_tokenizer(tmp_path, parts):
    for path in parts[0].glob("*token*"):
        path.unlink()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(
        ValueError, match="no tokenizer in .*EleutherAI/gpt-neox-20b: name its folder with --tokenizer"
    ):
        build_model(*parts, tmp_path / "new")
    with pytest.raises(ValueError, match="cannot be loaded .*EleutherAI/gpt-neox-20b"):
        build_model(*parts, tmp_path / "new", tokenizer="EleutherAI/gpt-neox-20b")
    assert_nothing_new(tmp_path, before)


def test_codestral_says_which_tokenizer_it_needs(tmp_path, parts):
    config = original.settings(ssm_cfg={"layer": "Mamba2", "headdim": 8, "ngroups": 8})
    original.write_codestral(tmp_path / "codestral", config, original.weights(config))
    with pytest.raises(ValueError, match="tokenizer.model.v3 is Mistral's SentencePiece model"):
        build_model(tmp_path / "codestral", parts[1], tmp_path / "new")


def test_a_tokenizer_of_another_model(tmp_path, parts):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"more{i}" for i in range(9)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer has 391 tokens, but the language model has 384 rows"):
        build_model(*parts, tmp_path / "new", tokenizer=tmp_path / "tokenizer")


def test_a_vision_model_of_another_kind(tmp_path, parts):
    with pytest.raises(ValueError, match="vision encoder '.*mamba2' cannot be read"):
        build_model(parts[0], parts[0], tmp_path / "new")


def test_vision_weights_that_do_not_fit(tmp_path, parts):
    path = parts[1] / "model.safetensors"
    weights = load_file(path)
    weights["vision_model.extra"] = weights.pop("vision_model.post_layernorm.weight")
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"(?s)missing: post_layernorm.weight \[24\].*left over: extra \[24\]"):
        build_model(*parts, tmp_path / "new")


def test_an_output_that_exists(tmp_path, parts):
    with pytest.raises(ValueError, match="exists already"):
        build_model(*parts, parts[0])


def test_a_write_that_fails_leaves_nothing(tmp_path, parts, monkeypatch):
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers_ma2mba.checkpoints.building.save_around_weights", full)
    with pytest.raises(OSError, match="No space left"):
        build_model(*parts, tmp_path / "new")
    assert_nothing_new(tmp_path, before)
