"""LoRA in every part of the model: adapters count on each path, and folders of adapters load everywhere."""

import warnings

import pytest
import torch
from comparison import assert_same
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny import lora, random_frames, tiny_config, tiny_model, tiny_processor
from transformers import AutoModel, pipeline
from transformers.models.mamba2 import modeling_mamba2
from video_step import CANDIDATES, QUESTION, gradients, video_batch

from transformers_ma2mba import VideoSession, enable_multi_axis_checkpointing
from transformers_ma2mba.session import StateFileError

TARGETS = {
    "in_proj": ["in_proj"],
    "out_proj": r".*mixer\.out_proj",
    "embeddings": ["language_model.embeddings"],
    "projector": ["linear_1", "linear_2"],
    "vision": ["q_proj", "k_proj", "v_proj"],
    "lm_head": ["lm_head"],
    "all-linear": "all-linear",
}


@pytest.fixture(scope="module")
def untied():
    """A head of its own: PEFT merges an adapter of a tied head into the embeddings, too."""
    return tiny_config(text=dict(tie_word_embeddings=False), tie_word_embeddings=False, tokens_per_pass=5)


def adapted_model(config, targets, **options):
    """A model in float64 with adapters everywhere in `targets` except where nothing would use them."""
    model = tiny_model(config, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of PEFT, about tied weights
        return lora(model, target_modules=targets, exclude_modules=model.unused_modules()).eval()


def plain_logits(model, config):
    with torch.enable_grad():  # in one piece
        return model(**video_batch(config)).logits


def logits_in_segments(model, config):
    with torch.no_grad():
        inputs = video_batch(config)
        del inputs["labels"]
        return model(**inputs).logits


def generated_scores(model, config):
    inputs = video_batch(config)
    del inputs["labels"]
    options = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return torch.stack(model.generate(**inputs, **options).logits).softmax(-1)  # placeholders have a logit of -inf


def session_scores(model, config):
    """Scores of a film that is watched in two parts, and whose questions continue from its state."""
    watched = VideoSession(model, tiny_processor(config), frames_per_piece=2)
    watched.extend(random_frames(3)).extend(random_frames(2, seed=1))
    ranked = watched.ask(QUESTION, CANDIDATES)
    return torch.tensor([next(e["score"] for e in ranked if e["answer"] == text) for text in CANDIDATES])


PATHS = {function.__name__: function for function in (plain_logits, logits_in_segments, generated_scores)}
PATHS["session_scores"] = session_scores


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", TARGETS)
def test_adapters_equal_merged_weights(target, path, untied, in_double):
    adapted = adapted_model(untied, TARGETS[target])
    found = PATHS[path](adapted, untied)
    with adapted.disable_adapter():
        assert not torch.allclose(PATHS[path](adapted, untied), found, rtol=1e-3)
    merged = adapted.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    in_float32 = path == "generated_scores"  # `generate` returns logits in float32
    assert_same([PATHS[path](merged, untied)], [found], tolerance=1e-6 if in_float32 else 1e-9)


@pytest.mark.parametrize("order", ["layer-major", "sequence-major"])
@pytest.mark.parametrize("target", TARGETS)
def test_gradients_of_adapters_under_checkpointing(target, order, untied, in_double):
    """All of the base model is frozen."""
    adapted, batch = adapted_model(untied, TARGETS[target]), video_batch(untied)
    expected = gradients(adapted, batch)
    assert all("lora" in name for name in expected if name != "loss")
    enable_multi_axis_checkpointing(adapted, 1, 8, order=order)
    # The bias of the keys has no effect, but their weight has: every adapter counts.
    assert_same(gradients(adapted, batch), expected, nonzero=True)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_unused_modules(kind):
    """Exactly the adapters in these modules would get no gradient."""
    model = tiny_model(tiny_config(kind), dtype=torch.float64)
    unused = model.unused_modules()
    assert "model.vision_tower.encoder.layers.2.mlp.fc1" in unused
    assert ("model.vision_tower.head.mlp.fc1" in unused) == (kind == "siglip")
    assert not any("layers.1" in name or "language_model" in name for name in unused)
    assert model.model.unused_modules() == [name.removeprefix("model.") for name in unused]
    targets = r".*(fc1|q_proj|mixer.in_proj)"
    lost = {
        name
        for name, grad in gradients(lora(model, target_modules=targets), video_batch(model.config)).items()
        if grad is None
    }
    assert lost and all(any(module in name for module in unused) for name in lost)


def test_unused_adapters_get_zeros_in_several_processes(config, monkeypatch):
    """DDP waits for a gradient of every trained parameter."""
    model = lora(tiny_model(config), target_modules="all-linear")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    found = gradients(model, video_batch(config))
    unused = [name for name in found if "vision_tower.encoder.layers.2" in name]
    assert unused and all(torch.count_nonzero(found[name]) == 0 for name in unused)
    assert None not in found.values()


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_adapters_of_the_convolution_are_refused(config):
    """A layer reads the convolution's weight without a call of the module."""
    adapted = lora(tiny_model(config), target_modules=["conv1d"], r=96)
    batch = video_batch(config)
    for model in (adapted, adapted.train(), enable_multi_axis_checkpointing(adapted)):
        with pytest.raises(ValueError, match=r"layers\.0\.mixer\.conv1d has an adapter, which would have no effect"):
            model(**batch)
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.conv1d has an adapter"):
        adapted.base_model.model.model.language_model(input_ids=batch["input_ids"][:, -6:])
    with adapted.disable_adapter():
        assert adapted(**batch).loss.isfinite()


@pytest.mark.parametrize("target", ["in_proj", "out_proj"])
def test_kernel_of_whole_layers_leaves_adapted_projections_alone(target, config, monkeypatch):
    """It reads the weight of `out_proj`, so that an adapter there would have no effect."""
    model, allowed = lora(tiny_model(config), target_modules=TARGETS[target]).train(), []
    name = "mamba2_split_conv1d_scan_combined"
    dispatcher = getattr(modeling_mamba2, name)

    def recorded(*args, **kwargs):
        allowed.append(kwargs.get("whole_layers", True))
        return dispatcher(*args, **kwargs)

    monkeypatch.setattr(modeling_mamba2, name, recorded)
    model(**video_batch(config))
    assert allowed == [target == "in_proj"] * 2


# Folders


@pytest.fixture(scope="module")
def folders(checkpoint, processor, tmp_path_factory):
    """An adapter's folder, and the answer of its model."""
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModel.from_pretrained(checkpoint)
    torch.manual_seed(4)
    targets = dict(target_modules="all-linear", exclude_modules=model.unused_modules(), modules_to_save=["norm_f"])
    adapted = get_peft_model(model, LoraConfig(r=3, init_lora_weights=False, **targets)).eval()
    with torch.no_grad():
        model.model.language_model.norm_f.weight.mul_(1.1)
    adapted.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, answers(adapted, processor)


def answers(model, processor=None) -> list[dict]:
    qa = pipeline("video-question-answering", model=model, processor=processor)
    return qa(video=random_frames(4), question=QUESTION, candidates=CANDIDATES)


def with_loaded_adapter(checkpoint, folder):
    model = AutoModel.from_pretrained(checkpoint)
    model.load_adapter(folder)
    return model


WAYS = {
    "pipeline": lambda checkpoint, folder: str(folder),
    "AutoModel": lambda checkpoint, folder: AutoModel.from_pretrained(folder),
    "PeftModel": lambda checkpoint, folder: PeftModel.from_pretrained(AutoModel.from_pretrained(checkpoint), folder),
    "load_adapter": with_loaded_adapter,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_of_adapters_answers_the_same(way, checkpoint, folders, processor, qa):
    folder, expected = folders
    assert expected != qa(video=random_frames(4), question=QUESTION, candidates=CANDIDATES)
    model = WAYS[way](checkpoint, folder)
    assert answers(model, None if way == "pipeline" else processor) == expected


def test_merged_weights_are_a_checkpoint_of_their_own(checkpoint, folders, processor, tmp_path):
    folder, expected = folders
    merged = PeftModel.from_pretrained(AutoModel.from_pretrained(checkpoint), folder).merge_and_unload()
    merged.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for entry, other in zip(answers(str(tmp_path)), expected, strict=True):
        assert entry == {**other, "score": pytest.approx(other["score"], rel=1e-4)}


def test_a_saved_session_belongs_to_its_adapters(checkpoint, folders, processor, tmp_path):
    folder, _ = folders
    load = WAYS["PeftModel"]
    path, model = tmp_path / "film", load(checkpoint, folder)
    watched = VideoSession(model, processor).extend(random_frames(4))
    watched.save(path)
    again = VideoSession.resume(path, load(checkpoint, folder), processor)
    assert again.ask(QUESTION, CANDIDATES) == watched.ask(QUESTION, CANDIDATES)
    assert VideoSession.resume(path, with_loaded_adapter(checkpoint, folder), processor).num_frames == 4
    with model.disable_adapter(), pytest.raises(StateFileError, match="was made by"):
        VideoSession.resume(path, model, processor)
    stronger = load(checkpoint, folder)
    for module in stronger.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 2.0)
    for other in (stronger, AutoModel.from_pretrained(checkpoint)):
        with pytest.raises(StateFileError, match="was made by"):
            VideoSession.resume(path, other, processor)


def test_prompt_learning_is_refused(checkpoint, processor):
    model = AutoModel.from_pretrained(checkpoint)
    text = model.config.text_config
    options = dict(num_virtual_tokens=2, token_dim=text.hidden_size, num_layers=2, num_attention_heads=1)
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_transformer_submodules=1, **options))
    with pytest.raises(ValueError, match="PROMPT_TUNING adds a prompt to each input"):
        VideoSession(tuned, processor)
