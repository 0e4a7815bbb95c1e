"""MA-GC through its entry points: `gradient_checkpointing_enable`, Trainer, PEFT and stock models; and its errors."""

import copy
import warnings
from dataclasses import replace
from functools import partial

import comparison
import pytest
import torch
from datasets_in_memory import RowsDataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tiny import random_pixels, tiny_config, tiny_model, tiny_text_config
from torch.testing import assert_close
from transformers import (
    FalconMambaConfig,
    FalconMambaModel,
    LlamaConfig,
    LlamaModel,
    Mamba2ForCausalLM,
    Mamba2Model,
    MambaConfig,
    MambaForCausalLM,
    Trainer,
    TrainingArguments,
)

from transformers_ma2mba import Ma2mbaForVideoQA, enable_multi_axis_checkpointing
from transformers_ma2mba.gradient_checkpointing import multi_axis as multi_axis_checkpointing
from transformers_ma2mba.gradient_checkpointing.memory_model import TrainingStep
from transformers_ma2mba.gradient_checkpointing.multi_axis import (
    checkpointing_options,
    disable_multi_axis_checkpointing,
    is_multi_axis_checkpointed,
)
from transformers_ma2mba.gradient_checkpointing.plan import MultiAxisOptions, smallest_plan

SMALL_CELLS = {"layer_interval": 2, "sequence_interval": 8}
# Some gradients are zero except for rounding, such as that of the bias of an attention's keys.
assert_same = partial(comparison.assert_same, smallest_norm=1e-4)


@pytest.fixture
def qa_model():
    """Three layers, in training mode."""
    return tiny_model(tiny_config(text=dict(num_hidden_layers=3))).train()


def video_batch(model, frames=(3, 2), answer_length=4, text_length=6) -> dict:
    """Samples of one video, a question and a supervised answer, padded on the left."""
    torch.manual_seed(0)
    config = model.config
    rows = []
    for count in frames:
        video = torch.full((count * config.tokens_per_frame,), config.video_token_id)
        text = torch.randint(2, 300, (text_length + answer_length,))
        rows.append(torch.cat([text[:2], video, text[2:]]))
    length = max(map(len, rows))
    pad = [length - len(row) for row in rows]
    input_ids = torch.stack(
        [torch.nn.functional.pad(row, (extra, 0), value=1) for row, extra in zip(rows, pad, strict=True)]
    )
    labels = input_ids.clone()
    labels[:, :-answer_length] = -100
    mask = torch.stack([(torch.arange(length) >= extra).long() for extra in pad])
    return dict(
        input_ids=input_ids,
        labels=labels,
        attention_mask=mask,
        pixel_values_videos=random_pixels(sum(frames)),
    )


def gradients(model, batch) -> dict:
    model.zero_grad()
    outputs = model(**batch)
    outputs.loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": outputs.loss.detach()} | found


@pytest.mark.parametrize("order", ["layer-major", "sequence-major"])
def test_video_and_text_gradients_equal_the_plain_run(qa_model, order, in_double):
    qa_model.double()
    batch = video_batch(qa_model)
    expected = gradients(qa_model, batch)
    assert any("vision_tower" in name for name in expected)
    qa_model.gradient_checkpointing_enable({**SMALL_CELLS, "order": order})
    assert_same(gradients(qa_model, batch), expected)
    qa_model.gradient_checkpointing_disable()
    assert_same(gradients(qa_model, batch), expected, tolerance=0)


def test_the_vision_encoder_is_restored_in_pieces_of_frames(qa_model):
    batch = video_batch(qa_model, frames=(7,))
    encoded = []
    qa_model.model.vision_tower.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    qa_model.gradient_checkpointing_enable(SMALL_CELLS)
    loss = qa_model(**batch).loss
    assert encoded == [3, 3, 1]  # frames_per_vision_pass is 3
    loss.backward()
    assert sorted(encoded[3:]) == [1, 3, 3]


def test_the_vision_encoder_keeps_only_pixels(qa_model):
    qa_model.gradient_checkpointing_enable(SMALL_CELLS)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        qa_model.model.get_video_features(random_pixels(6))
    assert {tensor.dtype for tensor in kept if tensor.ndim == 4} <= {torch.uint8}
    assert all(tensor.numel() <= 6 * 4 * 32 for tensor in kept if tensor.dtype != torch.uint8)


def test_checkpointing_applies_only_in_training_with_gradients(qa_model):
    batch = video_batch(qa_model)
    expected = qa_model.eval()(**batch)
    qa_model.gradient_checkpointing_enable(SMALL_CELLS)
    assert torch.equal(qa_model(**batch).logits, expected.logits)
    with torch.no_grad():
        assert torch.equal(qa_model.train()(**batch).logits, expected.logits)
    inputs = dict(input_ids=batch["input_ids"][:, -6:], max_new_tokens=3, do_sample=False)
    plain = tiny_model(qa_model.config)
    assert torch.equal(qa_model.eval().generate(**inputs), plain.generate(**inputs))


def test_output_hidden_states_runs_without_checkpointing(qa_model):
    batch = video_batch(qa_model)
    expected = qa_model(**batch, output_hidden_states=True)
    qa_model.gradient_checkpointing_enable(SMALL_CELLS)
    outputs = qa_model(**batch, output_hidden_states=True)
    assert len(outputs.hidden_states) == 4
    assert_close(outputs.loss, expected.loss)


def test_use_cache_in_training_returns_the_final_state(qa_model):
    batch = video_batch(qa_model)
    expected = qa_model(**batch, use_cache=True).cache_params
    qa_model.gradient_checkpointing_enable(SMALL_CELLS)
    assert qa_model(**batch).cache_params is None
    actual = qa_model(**batch, use_cache=True).cache_params
    for layer, other in zip(actual.layers, expected.layers, strict=True):
        assert_close(layer.conv_states[0], other.conv_states[0])
        assert_close(layer.recurrent_states[0], other.recurrent_states[0])
    # The state is an ordinary cache, from which the text can continue.
    step = dict(input_ids=batch["input_ids"][:, -1:], use_cache=True)
    with torch.no_grad():
        actual, expected = (qa_model.eval()(**step, cache_params=cache).logits for cache in (actual, expected))
    assert_close(actual, expected)


def test_both_spellings_enable_and_disable(qa_model):
    for enable, disable in [
        (qa_model.gradient_checkpointing_enable, qa_model.gradient_checkpointing_disable),
        (qa_model.activation_checkpointing_enable, qa_model.activation_checkpointing_disable),
        (qa_model.model.activation_checkpointing_enable, qa_model.model.activation_checkpointing_disable),
    ]:
        assert not qa_model.is_activation_checkpointing
        enable()
        assert qa_model.is_activation_checkpointing and qa_model.is_gradient_checkpointing
        assert is_multi_axis_checkpointed(qa_model)
        assert not any(getattr(module, "gradient_checkpointing", False) for module in qa_model.modules())
        disable()
        disable()  # harmless
    assert "forward" not in vars(qa_model.model.language_model)


def test_each_length_gets_one_plan(qa_model):
    qa_model.gradient_checkpointing_enable()
    settings = qa_model.model.language_model._multi_axis_checkpointing
    for frames in [(3, 2), (2, 2), (3, 2)]:
        qa_model(**video_batch(qa_model, frames=frames)).loss.backward()
        qa_model.zero_grad()
    lengths = sorted(plan.sequence_length for plan in settings.plans.values())
    assert lengths == [18, 22]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layers": 2}, "'layers'.*layer_interval, sequence_interval, memory_budget, offload"),
        ({"layer_interval": 0}, "layer_interval.*0"),
        ({"sequence_interval": -8}, "sequence_interval.*-8"),
        ({"layer_interval": "half"}, "layer_interval.*'half'"),
        ({"sequence_interval": 2.5}, "sequence_interval.*2.5"),
        ({"layer_interval": True}, "layer_interval.*True"),
        ({"memory_budget": "20 parsecs"}, "20 parsecs"),
        ({"memory_budget": 0}, "memory_budget|memory size|0"),
        ({"offload": "yes"}, "offload.*'yes'"),
        ({"order": "diagonal"}, "order.*'diagonal'"),
        ({"every_n_layers": 2}, "every_n_layers=2"),
    ],
    ids=str,
)
def test_bad_kwargs_are_refused(qa_model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        qa_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    assert not qa_model.is_activation_checkpointing
    with pytest.raises(ValueError, match="every_n_layers=3"):
        qa_model.activation_checkpointing_enable(every_n_layers=3)


def test_offload_is_an_argument_or_a_key():
    assert checkpointing_options(None, offload=True)["offload"] is True
    assert checkpointing_options({"offload": True})["offload"] is True
    assert checkpointing_options({"use_reentrant": False}) == {"offload": False}


def test_a_budget_that_no_plan_fits_is_refused(qa_model):
    qa_model.gradient_checkpointing_enable({"memory_budget": "1KB"})
    with pytest.raises(ValueError, match="smallest needs"):
        qa_model(**video_batch(qa_model))


@pytest.mark.parametrize("offload", [False, True])
def test_gradients_of_a_stock_causal_lm_equal_the_plain_run(offload, in_double):
    torch.manual_seed(0)
    plain = Mamba2ForCausalLM(tiny_text_config(num_hidden_layers=3)).double().train()
    model = enable_multi_axis_checkpointing(copy.deepcopy(plain), 2, 4, offload=offload)
    assert list(model.state_dict()) == list(plain.state_dict())
    input_ids = torch.randint(2, 300, (2, 21))
    batch = dict(input_ids=input_ids, labels=input_ids)
    assert_same(gradients(model, batch), gradients(plain, batch))
    tuples = model(input_ids, return_dict=False), plain(input_ids, return_dict=False)
    assert_close(*tuples)
    disable_multi_axis_checkpointing(model)
    assert_same(gradients(model, batch), gradients(plain, batch), tolerance=0)


def test_bad_inputs_of_a_stock_model_are_refused():
    model = enable_multi_axis_checkpointing(Mamba2Model(tiny_text_config()).train())
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="packed"):
        model(torch.zeros(1, 8, dtype=torch.long), seq_idx=torch.zeros(1, 8, dtype=torch.int))


def test_a_checkpointed_model_is_saved_and_copied(qa_model, tmp_path):
    qa_model.gradient_checkpointing_enable(SMALL_CELLS)
    batch = video_batch(qa_model)
    expected = gradients(qa_model, batch)
    copied = copy.deepcopy(qa_model)
    assert copied.model.language_model.forward.__self__ is copied.model.language_model
    assert_same(gradients(copied, batch), expected, tolerance=0)
    qa_model.save_pretrained(tmp_path)
    loaded = Ma2mbaForVideoQA.from_pretrained(tmp_path)
    assert not loaded.is_activation_checkpointing
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, qa_model.get_parameter(name))


STATELESS = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)),
    "falcon_mamba": lambda: FalconMambaModel(
        FalconMambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    ),
}


@pytest.mark.parametrize("family", STATELESS)
def test_models_whose_passes_start_from_an_empty_state_are_refused(family):
    model = STATELESS[family]().eval()
    with pytest.raises(ValueError, match=f"'{family}' layers start every pass of more than one token from an empty"):
        enable_multi_axis_checkpointing(model)
    # The second segment does not see the first. If this ever fails, Transformers carries the state, and MA-GC could
    # support the family.
    trunk = model.backbone if family == "mamba" else model
    with torch.no_grad():
        for parameter in trunk.layers.parameters():
            parameter.uniform_(0.1, 0.5)
        embeds = torch.rand(1, 12, 16)
        whole = trunk(inputs_embeds=embeds).last_hidden_state
        cache = trunk(inputs_embeds=embeds[:, :6], use_cache=True).cache_params
        rest = trunk(inputs_embeds=embeds[:, 6:], cache_params=cache, use_cache=True).last_hidden_state
    assert (whole[:, 6:] - rest).abs().max() > 1e-3


def test_other_models_are_refused():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="one Mamba2Model inside.*LlamaModel has 0"):
        enable_multi_axis_checkpointing(LlamaModel(config))


def trained(model, output_dir, rows, max_steps=50, **options) -> dict:
    arguments = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=2,
        max_steps=max_steps,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    Trainer(model, arguments, train_dataset=rows, data_collator=rows.collate).train()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_fifty_trainer_steps_give_the_plain_run_s_weights(qa_model, tmp_path, in_double):
    """The run is in float64, because fifty steps of Adam in float32 would amplify the rounding differences."""
    qa_model.double()
    rows = RowsDataset([video_batch(qa_model, frames=(count,)) for count in (3, 3, 3, 3)])
    checked = copy.deepcopy(qa_model)
    before = copy.deepcopy(qa_model)
    expected = trained(qa_model, tmp_path / "plain", rows)
    actual = trained(
        checked,
        tmp_path / "checked",
        rows,
        activation_checkpointing=True,
        activation_checkpointing_kwargs=SMALL_CELLS,
    )
    assert checked.is_activation_checkpointing
    assert_same(actual, expected, tolerance=1e-7)
    moved = [(expected[name] - parameter).abs().max() for name, parameter in before.named_parameters()]
    assert max(moved) > 1e-2


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_training_arguments_work_in_both_spellings(qa_model, tmp_path, name, recwarn):
    rows = RowsDataset([video_batch(qa_model, frames=(3,))])
    kwargs = {**SMALL_CELLS, "offload": True, "memory_budget": "1GiB"}
    trained(qa_model, tmp_path, rows, max_steps=1, **{name: True, f"{name}_kwargs": kwargs})
    options = qa_model.model.language_model._multi_axis_checkpointing.options
    assert options == MultiAxisOptions(**kwargs) and options.layer_interval == 2
    assert not [warning for warning in recwarn if "transformers_ma2mba" in str(warning.filename)]


def lora(model):
    config = LoraConfig(r=4, target_modules=["in_proj", "q_proj", "linear_1"], init_lora_weights=False)
    torch.manual_seed(0)
    return get_peft_model(model, config)


def test_a_peft_model_is_checkpointed(qa_model, in_double):
    model = lora(qa_model.double())
    batch = video_batch(qa_model)
    expected = gradients(model, batch)
    assert expected.keys() > {"loss"} and all("lora" in name for name in expected if "." in name)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=SMALL_CELLS)
    assert is_multi_axis_checkpointed(qa_model)
    assert_same(gradients(model, batch), expected)


def test_an_adapter_joins_a_checkpointed_model(qa_model, in_double):
    qa_model.double()
    batch = video_batch(qa_model)
    expected = gradients(lora(copy.deepcopy(qa_model)), batch)
    qa_model.gradient_checkpointing_enable(SMALL_CELLS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lora(qa_model)
    actual = gradients(model, batch)
    assert_same(actual, expected)


def test_prepare_model_for_kbit_training_enables_checkpointing(qa_model):
    qa_model.is_loaded_in_4bit = True  # bitsandbytes sets this on the models that it loads
    model = prepare_model_for_kbit_training(qa_model, gradient_checkpointing_kwargs=dict(SMALL_CELLS))
    assert is_multi_axis_checkpointed(model)
    assert model.model.language_model._multi_axis_checkpointing.options.layer_interval == 2
    assert gradients(lora(model), video_batch(qa_model))


def test_without_a_budget_a_plan_fits_the_free_memory(monkeypatch):
    model = enable_multi_axis_checkpointing(Mamba2Model(tiny_text_config(num_hidden_layers=8)))
    settings = model._multi_axis_checkpointing
    ids = torch.zeros(1, 5000, dtype=torch.long)
    usual = settings.plan(model, ids)
    step = TrainingStep(5000, dtype=torch.float32, from_ids=True, whole_output=True, device="cpu")
    smallest = smallest_plan(model.config, step, MultiAxisOptions())
    assert smallest.device_bytes < 0.6 * usual.device_bytes
    for free, expected in [(None, usual), (usual.device_bytes, usual), (1, smallest)]:
        monkeypatch.setattr(multi_axis_checkpointing, "_free_bytes", lambda model, free=free: free)
        assert settings.plan(model, ids) == expected
    free = (usual.device_bytes + smallest.device_bytes) // 2
    monkeypatch.setattr(multi_axis_checkpointing, "_free_bytes", lambda model: free)
    assert smallest.device_bytes < settings.plan(model, ids).device_bytes <= free
    # A budget from the user applies whatever is free.
    settings.options = replace(settings.options, memory_budget=usual.device_bytes)
    assert settings.plan(model, ids) == usual
