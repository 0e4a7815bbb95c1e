"""The memory model of MA-GC, compared with the paper's figures and with a stock block."""

import itertools

import pytest
import torch
from kept_memory import kept_beside
from paper_formula import paper_constants, paper_memory
from peft import LoraConfig, inject_adapter_in_model
from tiny import tiny_text_config
from transformers.models.mamba2 import modeling_mamba2

from transformers_ma2mba.configuration_ma2mba import Ma2mbaConfig
from transformers_ma2mba.gradient_checkpointing.memory_model import (
    TrainedSizes,
    TrainingStep,
    kept_bytes_per_token,
    trained_sizes,
)
from transformers_ma2mba.mamba2.kernel_choice import hold
from transformers_ma2mba.mamba2.recurrent_state import carried_cache, read_state, write_state

GiB = 2**30


@pytest.mark.parametrize(
    ("preset", "constants"),
    [
        ("0.7b", (1024, 269_056, 6_432, 264_448)),
        ("1.8b", (2048, 537_344, 12_608, 528_640)),
        ("3.1b", (2560, 671_488, 15_696, 660_736)),
    ],
)
def test_constants_match_table_7(preset, constants):
    assert paper_constants(Ma2mbaConfig.from_preset(preset)) == constants


def test_formula_gives_the_paper_s_figure():
    large = Ma2mbaConfig.from_preset("3.1b")
    intervals = itertools.product(range(1, 65), range(256, 2**14, 256))
    layer_interval, sequence_interval = min(intervals, key=lambda cell: paper_memory(large, 2**19, *cell))
    elements = paper_memory(large, 2**19, layer_interval, sequence_interval)
    assert round(2 * elements / GiB, 1) == 17.4
    assert (layer_interval, sequence_interval) == (28, 7168)


@pytest.mark.parametrize("residual_in_fp32", [True, False], ids=["residual32", "residual"])
@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", ["everything", "adapters", "nothing"])
def test_a_stock_block_keeps_the_modelled_bytes(trained, dtype, n_groups, residual_in_fp32):
    tokens = 1024
    config = tiny_text_config(
        hidden_size=96, head_dim=24, num_heads=8, n_groups=n_groups, residual_in_fp32=residual_in_fp32
    )
    block = modeling_mamba2.Mamba2Block(config, layer_idx=0).to(dtype).train()
    block.requires_grad_(trained == "everything")
    if trained == "adapters":  # in float32, whatever the weights' type
        inject_adapter_in_model(LoraConfig(r=1, target_modules=["in_proj", "out_proj"]), torch.nn.ModuleList([block]))
    sizes = trained_sizes([block])
    hold(block)
    cache = carried_cache(1)
    with torch.no_grad():
        block(torch.randn(1, 8, config.hidden_size, dtype=dtype), cache_params=cache)
    state = read_state(cache.layers[0])
    write_state(cache.layers[0], type(state)(*(tensor.requires_grad_() for tensor in state)))

    row_dtype = torch.float32 if residual_in_fp32 else dtype
    hidden_states = torch.randn(1, tokens, config.hidden_size, dtype=row_dtype, requires_grad=True)
    with kept_beside(block) as kept:
        output = block(hidden_states, cache_params=cache, ssd_scan=True)
    assert output.dtype == row_dtype
    step = TrainingStep(tokens, dtype=dtype, trained=sizes, device="cpu")
    assert sum(kept.values()) == pytest.approx(tokens * kept_bytes_per_token(config, step), rel=0.015)


def test_trained_sizes_follow_requires_grad():
    config = tiny_text_config()
    embeddings = torch.nn.Embedding(10, config.hidden_size)
    for dtype in (torch.float32, torch.bfloat16):
        layers = [modeling_mamba2.Mamba2Block(config, layer_idx=index).to(dtype) for index in range(2)]
        assert trained_sizes(layers, embeddings) == TrainedSizes.everything(config, dtype, dtype)
    layers[0].mixer.in_proj.requires_grad_(False)
    in_proj = layers[1].mixer.in_proj.weight
    layers[1].requires_grad_(False)
    in_proj.requires_grad_(True)
    few = trained_sizes(layers[1:], embeddings.requires_grad_(False))
    assert few == TrainedSizes(in_proj.nbytes, in_proj.nbytes, False, 2, 0, False)
    # The first layer's other parameters are trained, but they take less than the second layer's `in_proj`.
    assert trained_sizes(layers) == TrainedSizes(in_proj.nbytes, in_proj.nbytes, True, 2, 2, False)
    in_proj.requires_grad_(False)
    assert trained_sizes(layers[1:]) == TrainedSizes(0, 0, False, 0, 0, False)
