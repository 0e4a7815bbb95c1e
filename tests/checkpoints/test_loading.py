"""The authors' layout through the Auto classes: equal to a plain reference, and one clear error where it differs."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from quantization import why_not
from references import (
    ENCODER,
    IMAGE_PLACEHOLDER,
    VISION,
    authors_config,
    authors_weights,
    random_weights,
    reference_logits,
    vision_shapes,
    write_checkpoint,
    write_encoder,
)
from safetensors.torch import load_file
from tiny import random_frames, random_pixels, tiny_processor, tiny_tokenizer
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    BitsAndBytesConfig,
    Mamba2Config,
    Mamba2Model,
    pipeline,
)
from video_step import video_batch

from transformers_ma2mba import Ma2mbaConfig, Ma2mbaForVideoQA, Ma2mbaProcessor
from transformers_ma2mba.checkpoints.published import to_published
from transformers_ma2mba.checkpoints.tensor_files import TensorFolder
from transformers_ma2mba.command_line import main

LOGITS = dict(rtol=1e-5, atol=1e-5)
SIDE = ENCODER["image_size"]


@pytest.fixture
def encoders(tmp_path):
    """Repositories of both encoders, whose weights no checkpoint here has."""
    for kind in ("clip", "siglip"):
        weights = random_weights(vision_shapes(kind, ENCODER["num_hidden_layers"]), seed=1)
        write_encoder(tmp_path / kind, kind, weights)
    return tmp_path


@torch.no_grad()
def assert_equals_the_reference(model, weights, config, kind, **options):
    before, after, frames = [5, 9], [7, 3, 300, 11], random_pixels(3, SIDE)
    expected = reference_logits(weights, config, kind, [*before, IMAGE_PLACEHOLDER, *after], frames, **options)
    film = [model.config.video_token_id] * (len(frames) * model.config.tokens_per_frame)
    ids = torch.tensor([[*before, *film, *after]])
    logits = model(input_ids=ids, pixel_values_videos=frames).logits[0]
    assert_close(logits, expected, **LOGITS)


# Parity


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@pytest.mark.parametrize("mode", ["bilinear", "average", "max"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_equal_a_plain_reference(encoders, kind, mode, tied):
    config = authors_config(encoders / kind, mm_spatial_pool_mode=mode, tie_embeddings=tied)
    weights = authors_weights(config, kind)
    folder = write_checkpoint(encoders / "published", config, weights)
    with warnings.catch_warnings(action="error"):
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model) is Ma2mbaForVideoQA and type(model.config) is Ma2mbaConfig
    assert not any(info.values()), info
    assert not model.training
    assert model.config.tokens_per_frame == (9 if mode == "bilinear" else 4)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert_equals_the_reference(model, weights, config, kind)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("files", [1, 10], ids=["one-file", "ten-files"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_files_and_dtypes(encoders, suffix, files, dtype):
    config = authors_config(encoders / "siglip")
    weights = {name: weight.to(dtype) for name, weight in authors_weights(config).items()}
    folder = write_checkpoint(encoders / "published", config, weights, files=files, suffix=suffix)
    as_stored = AutoModel.from_pretrained(folder).state_dict()
    for name, weight in weights.items():
        mine = next(key for key in as_stored if to_published(key) == name)
        assert as_stored[mine].dtype == dtype and torch.equal(as_stored[mine], weight), name
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    assert_equals_the_reference(model, weights, config, "siglip")


@pytest.mark.parametrize("prefix", [VISION, VISION.removesuffix("vision_model."), "mm_model.vision_tower."])
@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_spellings_of_vision_weights(encoders, kind, prefix):
    config = authors_config(encoders / kind)
    weights = authors_weights(config, kind, vision_prefix=prefix)
    model = AutoModel.from_pretrained(write_checkpoint(encoders / "published", config, weights))
    assert_equals_the_reference(model, weights, config, kind, prefix=prefix)


@pytest.mark.parametrize(
    "ssm, tokens, multiple",
    [({"d_state": 16, "headdim": 8, "ngroups": 2}, 370, 8), ({"d_state": 8, "expand": 3, "d_conv": 3}, 382, 64)],
    ids=["groups", "width"],
)
def test_other_sizes(encoders, ssm, tokens, multiple):
    layers = {"layer": "Mamba2", "headdim": 16, "chunk_size": 8, **ssm}
    changes = dict(vocab_size=tokens, pad_vocab_size_multiple=multiple)
    config = authors_config(encoders / "siglip", ssm_cfg=layers, **changes)
    weights = authors_weights(config)
    model = AutoModel.from_pretrained(write_checkpoint(encoders / "published", config, weights))
    assert model.config.text_config.vocab_size == -(-tokens // multiple) * multiple
    assert_equals_the_reference(model, weights, config, "siglip")


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_vision_weights_come_from_the_encoder_if_the_checkpoint_has_none(encoders, kind):
    config = authors_config(encoders / kind)
    weights = {name: weight for name, weight in authors_weights(config, kind).items() if not name.startswith(VISION)}
    folder = write_checkpoint(encoders / "published", config, weights)
    with warnings.catch_warnings(action="error"):
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    encoder = load_file(encoders / kind / "model.safetensors")
    weights |= {VISION.replace("vision_model.", name): weight for name, weight in encoder.items()}
    assert_equals_the_reference(model, weights, config, kind)


_LOADING_UNDER_ZERO3 = """
import sys, deepspeed, torch
from transformers import AutoModel
from transformers.integrations import HfDeepSpeedConfig
import transformers_ma2mba
folder, store, output_file = sys.argv[1:]
deepspeed.ops.__compatible_ops__ = {}  # on a CPU, DeepSpeed would compile its own all-reduce for minutes
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
settings = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero})
model = AutoModel.from_pretrained(folder)
assert not any(parameter.numel() for parameter in model.parameters()), "ZeRO-3 has not taken the weights apart"
with deepspeed.zero.GatheredParameters(list(model.parameters())):
    torch.save({name: weight.clone() for name, weight in model.state_dict().items()}, output_file)
"""


def test_vision_weights_come_from_the_encoder_under_zero3(encoders):
    """As the Trainer loads with a DeepSpeed configuration. Outside of a gathering, parameters are empty."""
    config = authors_config(encoders / "siglip")
    weights = {name: weight for name, weight in authors_weights(config).items() if not name.startswith(VISION)}
    folder = write_checkpoint(encoders / "published", config, weights)
    files = [str(encoders / name) for name in ("published", "store", "weights.bin")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "LOCAL_RANK": "0"}
    command = [sys.executable, "-c", _LOADING_UNDER_ZERO3, *files]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert finished.returncode == 0, finished.stderr
    expected = AutoModel.from_pretrained(folder).state_dict()
    loaded = torch.load(files[-1])
    assert loaded.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(loaded[name], expected[name])] == []


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_weights_in_4_bits(encoders):
    config = authors_config(str(encoders / "siglip"))
    weights = authors_weights(config)
    write_checkpoint(encoders / "whole", config, weights)
    write_checkpoint(encoders / "part", config, {key: w for key, w in weights.items() if "vision_tower" not in key})
    four_bits = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModel.from_pretrained(encoders / "whole", quantization_config=BitsAndBytesConfig(**four_bits))
    model.save_pretrained(encoders / "saved")
    batch = video_batch(model.config, side=SIDE)
    assert torch.equal(AutoModel.from_pretrained(encoders / "saved")(**batch).logits, model(**batch).logits)
    with pytest.raises(ValueError, match="siglip', which cannot be quantized while it loads: convert the checkpoint"):
        AutoModel.from_pretrained(encoders / "part", quantization_config=BitsAndBytesConfig(**four_bits))
    skip = ["model.vision_tower", "lm_head"]
    quantization = BitsAndBytesConfig(**four_bits, llm_int8_skip_modules=skip)
    model = AutoModel.from_pretrained(encoders / "part", quantization_config=quantization)
    encoder = AutoModel.from_pretrained(encoders / "part").model.vision_tower
    for name, parameter in encoder.named_parameters():
        assert torch.equal(model.model.vision_tower.get_parameter(name), parameter)


def test_adapters_of_a_checkpoint_without_vision_weights(encoders, tmp_path):
    """The adapters come on top of the vision encoder's own weights, and those of the checkpoint are checked."""
    config = authors_config(str(encoders / "siglip"))
    weights = {key: weight for key, weight in authors_weights(config).items() if "vision_tower" not in key}
    write_checkpoint(encoders / "part", config, weights)
    model = AutoModel.from_pretrained(encoders / "part")
    targets = dict(target_modules="all-linear", exclude_modules=model.unused_modules())
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **targets)).eval()
    adapted.save_pretrained(tmp_path)
    batch = video_batch(model.config, side=SIDE)
    assert_close(AutoModel.from_pretrained(tmp_path)(**batch).logits, adapted(**batch).logits, **LOGITS)
    del weights["backbone.norm_f.weight"]
    write_checkpoint(encoders / "part", config, weights)
    with pytest.raises(ValueError, match="Missing in the files: backbone.norm_f.weight"):
        AutoModel.from_pretrained(tmp_path)


def test_another_vision_encoder_when_loading(encoders, tmp_path):
    """For a folder that has moved."""
    config = authors_config(tmp_path / "somewhere else")
    weights = authors_weights(config)
    folder = write_checkpoint(encoders / "published", config, weights)
    with pytest.raises(ValueError, match="somewhere else' cannot be read"):
        AutoModel.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, mm_vision_tower=str(encoders / "siglip"))
    assert_equals_the_reference(model, weights, config, "siglip")
    tiny_tokenizer().save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder, mm_vision_tower=str(encoders / "siglip"))
    assert processor.tokens_per_frame == model.config.tokens_per_frame


def test_a_subfolder(encoders):
    config = authors_config(encoders / "siglip")
    weights = authors_weights(config)
    write_checkpoint(encoders / "published", config, weights, tiny_tokenizer(), files=2)
    assert_equals_the_reference(AutoModel.from_pretrained(encoders, subfolder="published"), weights, config, "siglip")
    assert type(AutoProcessor.from_pretrained(encoders, subfolder="published")) is Ma2mbaProcessor


# After loading


def test_saving_writes_our_layout(encoders, tmp_path):
    config = authors_config(encoders / "clip")
    weights = authors_weights(config, "clip")
    folder = write_checkpoint(encoders / "published", config, weights, tiny_tokenizer(), files=3)
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (saved["model_type"], saved["architectures"]) == ("ma2mba", ["Ma2mbaForVideoQA"])
    assert not [key for key in saved if key.startswith("mm_") or key == "tokenizer_name"]
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert {to_published(name) for name in stored} == weights.keys()
    model, info = AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert_equals_the_reference(model, weights, config, "clip")
    assert AutoProcessor.from_pretrained(tmp_path / "ours").tokens_per_frame == 9


def test_saving_over_the_shards(encoders):
    """Their index stays behind. The new file counts."""
    config = authors_config(encoders / "siglip")
    weights = authors_weights(config)
    folder = write_checkpoint(encoders / "published", config, weights, files=3)
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()
    assert_equals_the_reference(AutoModel.from_pretrained(folder), weights, config, "siglip")
    assert {to_published(name) for name in TensorFolder(folder)} == weights.keys()


def test_configuration(encoders):
    folder = write_checkpoint(encoders / "published", authors_config(encoders / "siglip"), {})
    config = AutoConfig.from_pretrained(folder, frame_rate=2.0)
    assert isinstance(config, Ma2mbaConfig) and config.model_type == "ma2mba"
    assert (config.frame_rate, config.frames_per_vision_pass) == (2.0, 4)
    assert type(AutoModel.from_config(config)) is Ma2mbaForVideoQA
    assert AutoConfig.from_pretrained(folder, pad_vocab_size_multiple=64, vocab_size=320).text_config.vocab_size == 320


def test_the_plan_of_training(encoders, capsys):
    folder = write_checkpoint(encoders / "published", authors_config(encoders / "siglip"), {})
    assert main(["plan", "--model", str(folder), "--tokens", "4096", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 4096


@pytest.mark.parametrize("auto_class", [AutoModelForMultimodalLM, AutoModelForImageTextToText])
def test_options_of_loading(encoders, auto_class):
    config = authors_config(encoders / "siglip", torch_dtype="bfloat16")
    weights = authors_weights(config)
    folder = write_checkpoint(encoders / "published", config, weights)
    assert auto_class.from_pretrained(folder).dtype == torch.bfloat16
    model = auto_class.from_pretrained(folder, device_map="auto", dtype=torch.float32, attn_implementation="eager")
    assert model.model.vision_tower.config._attn_implementation == "eager"
    assert model.name_or_path == str(folder)
    assert_equals_the_reference(model, weights, config, "siglip")


@pytest.mark.parametrize("offloaded", ["model.vision_tower", "model.language_model"])
def test_offload_to_disk(encoders, offloaded):
    config = authors_config(encoders / "siglip", tie_embeddings=False)
    weights = authors_weights(config)
    folder = write_checkpoint(encoders / "published", config, weights, files=2)
    parts = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
    device_map = {part: "disk" if part == offloaded else "cpu" for part in parts}
    model = AutoModel.from_pretrained(folder, device_map=device_map, offload_folder=encoders / "disk")
    assert_equals_the_reference(model, weights, config, "siglip")


def test_only_the_auto_classes_read_this_layout(encoders):
    folder = write_checkpoint(encoders / "published", authors_config(encoders / "siglip"), {})
    with pytest.raises(ValueError, match="'llava_mamba'.*AutoModel"):
        Ma2mbaForVideoQA.from_pretrained(folder)


def test_stock_mamba2_stays_stock(tmp_path):
    """Checkpoints of this lineage may say "mamba2", which is Transformers' own name."""
    sizes = dict(hidden_size=32, num_heads=4, head_dim=16, num_hidden_layers=1, vocab_size=64, n_groups=1)
    Mamba2Model(Mamba2Config(**sizes)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "mm_vision_tower": "somewhere"}))
    assert type(AutoConfig.from_pretrained(tmp_path)) is Mamba2Config
    assert type(AutoModel.from_pretrained(tmp_path)) is Mamba2Model


# Weights that do not fit


def test_heads_of_a_frame_selector_are_named_and_left_out(encoders):
    config = authors_config(encoders / "siglip")
    weights = authors_weights(config)
    heads = {
        "key_head.weight": torch.ones(32, 32),
        "value_embedding": torch.ones(4, 32),
        "logit_scale": torch.ones(()),
    }
    folder = write_checkpoint(encoders / "published", config, {**weights, **heads})
    with pytest.warns(UserWarning, match="frame selector.*key_head.weight, logit_scale, value_embedding"):
        model = AutoModel.from_pretrained(folder)
    assert_equals_the_reference(model, weights, config, "siglip")


def test_parts_of_the_encoder_that_are_not_used_may_be_there(encoders):
    config = authors_config(encoders / "siglip")
    weights = authors_weights(config)
    unused = {VISION + "encoder.layers.2.mlp.fc1.bias": torch.ones(48), VISION + "head.probe": torch.ones(1, 1, 24)}
    unused[VISION + "embeddings.position_ids"] = torch.arange(25)[None]
    folder = write_checkpoint(encoders / "published", config, {**weights, **unused})
    del weights[VISION + "post_layernorm.weight"]
    with warnings.catch_warnings(action="error"):
        model = AutoModel.from_pretrained(folder)
    assert_equals_the_reference(model, weights, config, "siglip")


def test_one_error_lists_all_that_does_not_fit(encoders, caplog):
    config = authors_config(encoders / "siglip")
    weights = authors_weights(config)
    norm = weights.pop("backbone.layers.1.norm.weight")
    del weights["mm_model.mm_projector.2.bias"], weights[VISION + "encoder.layers.1.mlp.fc1.bias"]
    weights["backbone.embedding.weight"] = torch.zeros(392, 32)
    weights |= {"backbone.layers.1.normal.weight": norm, "mm_model.image_newline": torch.ones(32)}
    folder = write_checkpoint(encoders / "published", config, weights)
    with pytest.raises(ValueError) as error:
        AutoModel.from_pretrained(folder)
    assert str(error.value).split("\n")[:-1] == [
        f"The weights in {str(folder)!r} do not fit its config.json, read as the authors' layout (llava_mamba).",
        "Left over, with no place in the model: backbone.layers.1.normal.weight, mm_model.image_newline.",
        "Missing in the files: backbone.layers.1.norm.weight, mm_model.mm_projector.2.bias, "
        f"{VISION}encoder.layers.1.mlp.fc1.bias.",
        "Of another shape: backbone.embedding.weight (392, 32) in the files and (384, 32) by config.json.",
    ]
    assert "What to do: " in str(error.value) and "pad_vocab_size_multiple" in str(error.value)
    assert "LOAD REPORT" not in caplog.text
    with pytest.warns(UserWarning, match="Left over"):
        AutoModel.from_pretrained(folder, strict=False)


def test_long_lists_are_cut(encoders):
    config = authors_config(encoders / "siglip")
    weights = authors_weights(config)
    folder = write_checkpoint(
        encoders / "published", config, {**weights, **{f"x{i}": torch.ones(1) for i in range(99)}}
    )
    with pytest.raises(ValueError, match="x0, x1, x10.*, and 79 more"):
        AutoModel.from_pretrained(folder)


def test_an_untied_head_that_is_missing(encoders):
    config = authors_config(encoders / "siglip")
    weights = authors_weights(config)
    folder = write_checkpoint(encoders / "published", {**config, "tie_embeddings": False}, weights)
    with pytest.raises(ValueError, match="Missing in the files: lm_head.weight"):
        AutoModel.from_pretrained(folder)


def test_a_tied_head_that_is_stored(encoders):
    config = authors_config(encoders / "siglip")
    weights = authors_weights(config)
    stored = {**weights, "lm_head.weight": weights["backbone.embedding.weight"].clone()}
    model = AutoModel.from_pretrained(write_checkpoint(encoders / "published", config, stored))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert_equals_the_reference(model, weights, config, "siglip")


def test_a_tied_head_that_differs(encoders):
    config = authors_config(encoders / "siglip")
    weights = authors_weights(config)
    weights["lm_head.weight"] = weights["backbone.embedding.weight"].flip(0)
    folder = write_checkpoint(encoders / "published", config, weights)
    with pytest.raises(ValueError, match="Different, though tie_embeddings is true: .* and lm_head.weight"):
        AutoModel.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, tie_embeddings=False)
    assert_equals_the_reference(model, weights, {**config, "tie_embeddings": False}, "siglip")


@pytest.mark.parametrize("broken", ["no weights", "other shapes"])
def test_a_vision_encoder_that_does_not_fit(encoders, broken):
    config = authors_config(encoders / "siglip")
    weights = {name: weight for name, weight in authors_weights(config).items() if not name.startswith(VISION)}
    folder = write_checkpoint(encoders / "published", config, weights)
    encoder = load_file(encoders / "siglip" / "model.safetensors")
    (encoders / "siglip" / "model.safetensors").unlink()
    if broken == "other shapes":
        name = "embeddings.position_embedding.weight"
        cut = {key.removeprefix("vision_model."): weight for key, weight in encoder.items() if "vision" in key}
        write_encoder(encoders / "siglip", "siglip", {**cut, name: torch.ones(9, 24)})
    with pytest.raises(ValueError, match="siglip.*(cannot be loaded|another shape).*mm_vision_tower"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("files", [1, 3])
def test_broken_files(encoders, suffix, files):
    config = authors_config(encoders / "siglip")
    folder = write_checkpoint(encoders / "published", config, authors_weights(config), files=files, suffix=suffix)
    file = sorted(folder.glob(f"*.{suffix}"))[-1]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"published' cannot be read: .*{file.name} is truncated.* Download"):
        AutoModel.from_pretrained(folder)
    file.unlink()
    with pytest.raises(OSError, match=file.name if files > 1 else "no file"):
        AutoModel.from_pretrained(folder)


def test_weights_in_another_dictionary(encoders):
    config = authors_config(encoders / "siglip")
    folder = write_checkpoint(encoders / "published", config, {"state_dict": authors_weights(config)}, suffix="bin")
    with pytest.raises(ValueError, match="cannot be read: .*pytorch_model.bin is no dictionary of tensors"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_broken_index(encoders, content):
    config = authors_config(encoders / "siglip")
    folder = write_checkpoint(encoders / "published", config, authors_weights(config), files=2)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="cannot be read: .*model.safetensors.index.json is no index of shards"):
        AutoModel.from_pretrained(folder)


# Processor and pipeline


@pytest.mark.parametrize("named", [False, True], ids=["beside", "by-name"])
def test_the_pipeline_answers(encoders, named):
    config = authors_config(encoders / "siglip", **({"tokenizer_name": str(encoders / "words")} if named else {}))
    weights = authors_weights(config)
    tokenizer = tiny_tokenizer()
    if named:
        tokenizer.pad_token = None
        tokenizer.save_pretrained(encoders / "words")
    folder = write_checkpoint(encoders / "published", config, weights, None if named else tokenizer)

    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is Ma2mbaProcessor
    assert processor.tokens_per_frame == 9 and dict(processor.video_processor.size) == {"height": SIDE, "width": SIDE}
    assert processor.tokenizer.pad_token == "<|padding|>"
    assert processor.chat_template == tiny_processor(AutoConfig.from_pretrained(folder)).chat_template

    qa = pipeline("video-question-answering", model=str(folder))
    assert type(qa.model) is Ma2mbaForVideoQA
    frames, question, answers = random_frames(3, SIDE, SIDE), "Who opens the door?", ["red", "blue green", "yellow"]
    answer = qa(video=frames, question=question, max_new_tokens=4)
    assert answer["answer"] and 0 < answer["score"] <= 1

    # The ranking equals the reference's, by the probability of each candidate with its end of text.
    text = "<|system|>You are a helpful assistant.<|endoftext|><|user|>", f"{question}<|endoftext|><|assistant|>"
    before, after = (processor.tokenizer(part)["input_ids"] for part in text)
    likelihoods = []
    for candidate in answers:
        words = [*processor.tokenizer(candidate)["input_ids"], 0]
        ids = [*before, IMAGE_PLACEHOLDER, *after, *words]
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
        logits = reference_logits(weights, config, "siglip", ids, pixels)
        rows = logits[-len(words) - 1 : -1, :382].log_softmax(-1)  # the tokenizer's tokens, without placeholders
        likelihoods.append(rows[range(len(words)), words].sum())
    expected = dict(zip(answers, torch.stack(likelihoods).softmax(0).tolist(), strict=True))
    ranked = qa(video=frames, question=question, candidates=answers)
    assert {entry["answer"]: pytest.approx(entry["score"], rel=1e-3) for entry in ranked} == expected


def test_options_of_the_processor(encoders):
    folder = write_checkpoint(encoders / "published", authors_config(encoders / "siglip"), {}, tiny_tokenizer())
    assert AutoProcessor.from_pretrained(folder, frame_rate=2.0).video_processor.fps == 2.0
    processor = AutoProcessor.from_pretrained(folder, fps=0.5, num_frames=8)
    assert (processor.video_processor.fps, processor.video_processor.num_frames) == (0.5, 8)
    assert list(processor.video_processor.image_mean) == [0.5, 0.5, 0.5]


def test_a_tokenizer_without_its_configuration(encoders):
    folder = write_checkpoint(encoders / "published", authors_config(encoders / "clip"), {}, tiny_tokenizer())
    (folder / "tokenizer_config.json").unlink()
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == (
        "<|endoftext|>",
        "<|padding|>",
        "left",
    )


def test_a_tokenizer_that_cannot_be_loaded(encoders):
    config = authors_config(encoders / "siglip", tokenizer_name=str(encoders / "no tokenizer"))
    folder = write_checkpoint(encoders / "published", config, {})
    with pytest.raises(ValueError, match="no tokenizer' cannot be loaded: .*tokenizer_name"):
        AutoProcessor.from_pretrained(folder)
