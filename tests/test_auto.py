"""Registration, and checkpoints through every Auto class."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_pixels, tiny_config, tiny_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    Pipeline,
    pipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY

import transformers_ma2mba
from transformers_ma2mba import (
    Ma2mbaConfig,
    Ma2mbaForVideoQA,
    Ma2mbaModel,
    Ma2mbaProcessor,
    Ma2mbaVideoProcessor,
    VideoQuestionAnsweringPipeline,
)

MODEL_CLASSES = [AutoModel, AutoModelForMultimodalLM, AutoModelForImageTextToText, Ma2mbaForVideoQA]


def run_python(code: str) -> str:
    """Runs code in a fresh interpreter, and returns its output."""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def assert_same_weights(model, expected):
    weights, expected_weights = model.state_dict(), expected.state_dict()
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert weight.dtype == expected_weights[name].dtype, name
        assert torch.equal(weight, expected_weights[name]), name


# Registration


def test_importing_registers_and_importing_twice_is_harmless():
    printed = run_python(
        """
import importlib, sys
from transformers import AutoConfig
try:
    AutoConfig.for_model("ma2mba")
    raise SystemExit("known before it was imported")
except ValueError:
    pass
import transformers_ma2mba
first = AutoConfig.for_model("ma2mba")
import transformers_ma2mba
importlib.import_module("transformers_ma2mba")
importlib.reload(transformers_ma2mba)
assert type(AutoConfig.for_model("ma2mba")) is type(first) is transformers_ma2mba.Ma2mbaConfig
print(type(first).__name__)
"""
    )
    assert printed == "Ma2mbaConfig\n"


def test_public_names():
    for name in transformers_ma2mba.__all__:
        assert hasattr(transformers_ma2mba, name), name
    assert transformers_ma2mba.__version__.count(".") == 2


def test_config_class():
    assert type(AutoConfig.for_model("ma2mba")) is Ma2mbaConfig


@pytest.mark.parametrize("auto_class", MODEL_CLASSES[:3])
def test_model_class(auto_class, config):
    assert type(auto_class.from_config(config)) is Ma2mbaForVideoQA


def test_the_task():
    assert "video-question-answering" in PIPELINE_REGISTRY.get_supported_tasks()
    _, task, _ = PIPELINE_REGISTRY.check_task("video-question-answering")
    assert task["impl"] is VideoQuestionAnsweringPipeline
    assert issubclass(task["impl"], Pipeline)


# Checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("auto_class", MODEL_CLASSES)
@pytest.mark.parametrize("shards", ["one-file", "sharded"])
def test_save_and_load_is_bit_exact(tmp_path, config, auto_class, dtype, shards):
    model = tiny_model(config, dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size="50KB" if shards == "sharded" else "5GB")
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 1 if shards == "sharded" else len(files) == 1

    loaded, info = auto_class.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert type(loaded) is Ma2mbaForVideoQA
    assert not any(info.values()), info
    assert_same_weights(loaded, model)
    assert not loaded.training
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_answers_survive_saving(tmp_path, kind):
    config = tiny_config(kind)
    model = tiny_model(config)
    inputs = {
        "input_ids": torch.tensor([[5, *[config.video_token_id] * 8, 9, 7]]),
        "pixel_values_videos": random_pixels(2),
    }
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("auto_class", MODEL_CLASSES)
def test_device_map(tmp_path, model, auto_class):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    loaded = auto_class.from_pretrained(tmp_path, device_map="auto")
    assert_same_weights(loaded, model)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_a_model_split_over_several_devices(tmp_path, config, model):
    """For accelerate the CPU's memory and the disk are two devices."""
    model.save_pretrained(tmp_path / "model")
    device_map = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    device_map |= {"model.language_model.embeddings": "cpu", "model.language_model.norm_f": "cpu"}
    device_map |= {"model.language_model.layers.0": "cpu", "model.language_model.layers.1": "disk"}
    loaded = AutoModel.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    inputs = {
        "input_ids": torch.tensor([[5, *[config.video_token_id] * 8, 9, 7]]),
        "pixel_values_videos": random_pixels(2),
    }
    generated = loaded.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(**inputs, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_attention_implementations(tmp_path, kind):
    config = tiny_config(kind)
    tiny_model(config).save_pretrained(tmp_path)
    features = []
    for implementation in ("eager", "sdpa"):
        loaded = AutoModel.from_pretrained(tmp_path, attn_implementation=implementation)
        assert loaded.model.vision_tower.config._attn_implementation == implementation
        with torch.no_grad():
            features.append(loaded.get_video_features(random_pixels(2)).pooler_output)
    torch.testing.assert_close(*features, rtol=1e-4, atol=1e-5)
    loaded.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(loaded.get_video_features(random_pixels(2)).pooler_output, features[0])


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_embeddings_are_tied_as_configured(tmp_path, tie):
    model = tiny_model(tiny_config(text=dict(tie_word_embeddings=tie), tie_word_embeddings=tie))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not tie)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tie
    assert_same_weights(loaded, model)


def test_a_loaded_checkpoint_saves_the_same_files(tmp_path, checkpoint):
    # Transformers writes the dtype into the configs of a loaded model's parts, but not into those of a new model.
    for source, target in ((checkpoint, tmp_path / "once"), (tmp_path / "once", tmp_path / "twice")):
        AutoModel.from_pretrained(source).save_pretrained(target)
        AutoProcessor.from_pretrained(source).save_pretrained(target)
    new, once, twice = (files_of(path) for path in (checkpoint, tmp_path / "once", tmp_path / "twice"))
    assert {"config.json", "generation_config.json", "processor_config.json", "chat_template.jinja"} <= new.keys()
    assert once == twice
    parts = json.loads(once["config.json"])
    assert [parts[part].pop("dtype") for part in ("text_config", "vision_config")] == ["float32", "float32"]
    assert parts == json.loads(new["config.json"])
    assert once["model.safetensors"] == new["model.safetensors"]


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_weight_names_follow_the_video_language_models_of_transformers(checkpoint):
    names = set(load_file(checkpoint / "model.safetensors"))
    assert {name.split(".")[1] for name in names} == {"vision_tower", "multi_modal_projector", "language_model"}


def test_weights_of_a_stock_mamba2_load_unchanged(tmp_path, config, model):
    """A language model's checkpoint has the same tensors as this model under `model.language_model`."""
    model.model.language_model.save_pretrained(tmp_path)
    stock = AutoModel.from_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        # This package's scan rounds differently; the stock model uses it on request.
        expected = stock(ids, ssd_scan=True).last_hidden_state
        assert torch.equal(expected, model.model(ids).last_hidden_state)


def test_the_base_model_alone(tmp_path, model):
    """`Ma2mbaModel` loads from a checkpoint of the whole model."""
    model.save_pretrained(tmp_path)
    base, info = Ma2mbaModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert_same_weights(base, model.model)


def test_processor_and_video_processor(checkpoint, processor):
    loaded = AutoProcessor.from_pretrained(checkpoint)
    assert type(loaded) is Ma2mbaProcessor
    assert type(loaded.video_processor) is Ma2mbaVideoProcessor
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.chat_template == processor.chat_template
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert loaded.tokenizer.padding_side == "left"
    assert AutoTokenizer.from_pretrained(checkpoint).padding_side == "left"

    alone = AutoVideoProcessor.from_pretrained(checkpoint)
    assert type(alone) is Ma2mbaVideoProcessor
    assert alone.to_dict() == processor.video_processor.to_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_pipeline_loads_model_and_processor(tmp_path, config, processor, dtype):
    model = tiny_model(config, dtype=dtype)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipe = pipeline("video-question-answering", model=str(tmp_path))
    assert type(pipe) is VideoQuestionAnsweringPipeline
    assert type(pipe.processor) is Ma2mbaProcessor
    assert_same_weights(pipe.model, model)


def test_unused_layers_stay_frozen_after_loading(model, checkpoint):
    """DDP in the Trainer would wait for the gradients of layers that no feature passes through."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    loaded = AutoModel.from_pretrained(checkpoint)
    assert frozen and frozen == {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    assert all("layers.2." in name or "post_layernorm" in name for name in frozen)


def test_importing_the_package_does_not_import_the_trainer_and_its_neighbours():
    code = "import sys, transformers_ma2mba; print(*{'peft', 'datasets', 'transformers.trainer'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_every_public_name_exists():
    for name in transformers_ma2mba.__all__:
        getattr(transformers_ma2mba, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        transformers_ma2mba.nonsense  # noqa: B018
