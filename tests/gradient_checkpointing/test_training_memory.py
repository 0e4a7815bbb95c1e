"""The memory of a training step: its parts, the options that change them, and the longest film for a budget."""

import pytest
from peft import prepare_model_for_kbit_training
from quantization import why_not
from tiny import lora, tiny_config, tiny_model, tiny_text_config
from transformers import AutoModel, BitsAndBytesConfig, Mamba2ForCausalLM

from transformers_ma2mba.configuration_ma2mba import Ma2mbaConfig
from transformers_ma2mba.gradient_checkpointing.memory_model import TrainingStep, trained_sizes
from transformers_ma2mba.gradient_checkpointing.plan import (
    MultiAxisOptions,
    plan_checkpoints,
    plan_step,
    smallest_plan,
)
from transformers_ma2mba.gradient_checkpointing.training_memory import estimate_training_memory

GiB = 2**30


@pytest.fixture(scope="module")
def small():
    return Ma2mbaConfig.from_preset("0.7b")


@pytest.fixture(scope="module")
def large():
    return Ma2mbaConfig.from_preset("3.1b")


def test_parts_of_the_published_model(large):
    memory = estimate_training_memory(large, seconds=600)
    device = memory.device
    assert memory.frames == 600
    assert memory.tokens == 600 * 144 + 256
    assert device["weights: language model"] == 2 * 2_702_599_680
    assert device["weights: vision tower and projector"] == 2 * (303_507_456 + 9_180_160)
    # The vision tower's last layer and last norm are not trained, because no feature depends on them.
    assert memory.parameters - memory.trained_parameters == 12_596_224 + 2048
    assert device["gradients"] == 2 * memory.trained_parameters
    assert device["optimizer state"] == 12 * memory.trained_parameters
    assert memory.plan == plan_checkpoints(large, memory.tokens)
    assert device["activations of the language model (MA-GC)"] == memory.plan.device_bytes
    assert memory.host == {"checkpoints": 0, "pixels (uint8)": 600 * 3 * 336**2}
    # The vision tower's backward begins after the language model's.
    assert memory.device_total == sum(device.values()) - device["vision tower"]
    assert memory.fits is None


def test_parameters_are_those_of_the_model(config, model):
    memory = estimate_training_memory(config, tokens=100, dtype="float32")
    assert memory.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert memory.trained_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.device["optimizer state"] == 8 * memory.trained_parameters
    assert (memory.tokens, memory.frames) == (100, 25)


def test_a_language_model_alone():
    config = tiny_text_config()
    memory = estimate_training_memory(config, tokens=500, memory_budget="1GB")
    assert memory.parameters == sum(parameter.numel() for parameter in Mamba2ForCausalLM(config).parameters())
    assert memory.plan.device_bytes == memory.device["activations of the language model (MA-GC)"]
    assert memory.fits
    assert memory.frames == memory.device["vision tower"] == 0
    assert memory.frame_rate is memory.longest_seconds is None
    assert memory.longest_tokens > 500


def test_options_change_their_parts(small):
    plain = estimate_training_memory(small, seconds=100)
    frozen = estimate_training_memory(small, seconds=100, freeze_vision=True, optimizer="none")
    assert frozen.device["optimizer state"] == 0
    assert frozen.device["gradients"] < plain.device["gradients"]
    assert frozen.device["vision tower"] == plain.device["vision tower"] / 23
    faster = estimate_training_memory(small, seconds=100, fps=2.5, text_tokens=0)
    assert (faster.frames, faster.tokens, faster.frame_rate) == (250, 250 * 144, 2.5)
    twice = estimate_training_memory(small, seconds=100, batch_size=2)
    assert twice.host["pixels (uint8)"] == 2 * plain.host["pixels (uint8)"]
    offloaded = estimate_training_memory(small, seconds=100, offload=True)
    assert offloaded.host["checkpoints"] > 0
    assert offloaded.device_total < plain.device_total


def test_adapters_take_gradients_and_optimizer_for_themselves(config):
    options = dict(tokens=100, dtype="float32", lora_rank=3)
    model = tiny_model(config)
    unused, plain = model.unused_modules(), estimate_training_memory(config, tokens=100, dtype="float32")
    model = lora(model, r=3, target_modules="all-linear", exclude_modules=unused)
    memory = estimate_training_memory(config, **options)
    assert memory.parameters == plain.parameters
    assert memory.trained_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = {part: memory.device[part] for part in ("weights: adapters", "gradients", "optimizer state")}
    assert list(parts.values()) == [size * memory.trained_parameters for size in (4, 4, 8)]
    layers = model.base_model.model.model.language_model.layers.float()
    step = TrainingStep(100, dtype="float32", trained=trained_sizes(layers))
    assert memory.plan == plan_step(config, step, MultiAxisOptions())
    frozen = estimate_training_memory(config, **options, freeze_vision=True)
    tower = sum(p.numel() for name, p in model.named_parameters() if "lora" in name and "vision_tower" in name)
    assert memory.trained_parameters - frozen.trained_parameters == tower


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_weights_in_4_bits(checkpoint, config):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    model = AutoModel.from_pretrained(checkpoint, quantization_config=quantization)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    states = [parameter.quant_state for parameter in model.parameters() if hasattr(parameter, "quant_state")]
    expected = sum(p.nbytes for p in model.parameters())
    expected += sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)
    memory = estimate_training_memory(config, tokens=100, lora_rank=3, load_in_4bit=True)
    parts = ("language model", "vision tower and projector")
    assert sum(memory.device[f"weights: {part}"] for part in parts) == expected
    assert memory.device["weights: one of them, dequantized"] == 2 * 164 * 32  # the input projection of a layer


def test_published_model_trains_adapters_on_a_small_gpu(large):
    options = dict(seconds=600, freeze_vision=True, memory_budget="12GiB")
    assert not estimate_training_memory(large, **options).fits
    assert estimate_training_memory(large, **options, lora_rank=16, load_in_4bit=True, offload=True).fits


def test_fused_kernels_take_less(large):
    fused, plain = (estimate_training_memory(large, tokens=2**19, fused=fused).plan for fused in (True, False))
    assert fused.cell_bytes + fused.segment_bytes < plain.cell_bytes


def test_the_longest_film_fits_and_a_longer_one_does_not(small):
    def within_24_gib(seconds, **options):
        return estimate_training_memory(small, seconds=seconds, memory_budget="24GiB", **options)

    longest = within_24_gib(36_000).longest_seconds
    assert 0 < longest < 36_000
    fitting, longer = within_24_gib(longest), within_24_gib(longest + 10)
    assert fitting.fits and fitting.device_total <= 24 * GiB
    assert not longer.fits and longer.device_total > 24 * GiB
    assert longer.bytes_with_offload < longer.device_total
    # In sequence-major order with offload, all that grows with the length is in host memory.
    offloaded = within_24_gib(36_000, offload=True)
    assert offloaded.fits and offloaded.longest_seconds is None


def test_nothing_fits_a_budget_below_the_weights(large):
    memory = estimate_training_memory(large, seconds=60, memory_budget="8GiB")
    assert memory.fits is False
    assert memory.longest_tokens == memory.longest_seconds == 0
    assert memory.plan == smallest_plan(large, TrainingStep(memory.tokens), MultiAxisOptions())


def test_offloading_is_suggested_by_what_it_takes(large):
    budget = dict(seconds=7200, memory_budget="45GiB")
    without, offloaded = (
        estimate_training_memory(large, **budget),
        estimate_training_memory(large, offload=True, **budget),
    )
    assert not without.fits and offloaded.bytes_with_offload is None
    assert offloaded.fits == (without.bytes_with_offload <= 45 * GiB)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "Give either seconds or tokens, and not both."),
        (dict(seconds=3, tokens=3), "Give either seconds or tokens, and not both."),
        (dict(seconds=3, text_tokens=-1), "text_tokens cannot be negative; got -1."),
        (dict(seconds=3, optimizer="sgd"), "optimizer must be 'adamw' or 'none'; got 'sgd'."),
        (dict(seconds=3, dtype="int8"), "dtype must be float16, bfloat16, float32 or float64; got 'int8'."),
        (dict(seconds=3, memory_budget="lots"), "'lots' is not a size of memory"),
        (dict(seconds=3, lora_rank=0), "lora_rank must be a whole number above 0; got 0."),
        (dict(seconds=3, load_in_4bit=True), "Weights in 4 bits cannot be trained: give a lora_rank, too."),
        (dict(tokens=0), "sequence_length must be a whole number above 0; got 0."),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate_training_memory(tiny_config(), **arguments)


def test_seconds_need_a_vision_tower():
    with pytest.raises(ValueError, match="This model has no vision tower: give the length in tokens"):
        estimate_training_memory(tiny_text_config(), seconds=4)
