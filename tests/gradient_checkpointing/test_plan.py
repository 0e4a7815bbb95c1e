"""The choice of MA-GC's order and intervals: budgets, offloading, limits, and a search of the whole grid."""

import inspect
import itertools
import re
import time
from dataclasses import asdict, replace

import pytest
import torch
from paper_formula import paper_constants
from tiny import tiny_text_config
from transformers import CLIPVisionConfig
from transformers.models.mamba2 import modeling_mamba2

from transformers_ma2mba.configuration_ma2mba import Ma2mbaConfig
from transformers_ma2mba.gradient_checkpointing.memory_model import TrainedSizes, TrainingStep, kept_bytes_per_token
from transformers_ma2mba.gradient_checkpointing.memory_size import format_memory_size
from transformers_ma2mba.gradient_checkpointing.multi_axis import enable_multi_axis_checkpointing
from transformers_ma2mba.gradient_checkpointing.plan import (
    CheckpointPlan,
    MultiAxisOptions,
    longest_sequence,
    plan_checkpoints,
    smallest_plan,
)
from transformers_ma2mba.mamba2.shape import Mamba2Shape, indexable_tokens

GiB = 2**30


@pytest.fixture(scope="module")
def large():
    return Ma2mbaConfig.from_preset("3.1b")


def smallest(config, sequence_length, offload=False, **step) -> CheckpointPlan:
    return smallest_plan(config, TrainingStep(sequence_length, **step), MultiAxisOptions(offload=offload))


def test_a_stock_configuration_gives_the_same_plan(large):
    assert paper_constants(large.text_config) == paper_constants(large)
    assert plan_checkpoints(large.text_config, 5000) == plan_checkpoints(large, 5000)


def test_gradient_sums_count_a_layer_s_parameters():
    for options in (dict(), dict(n_groups=2, use_bias=True, use_conv_bias=False)):
        config = tiny_text_config(**options)
        block = modeling_mamba2.Mamba2Block(config, layer_idx=0)
        cell = dict(layer_interval=1, sequence_interval=64, order="layer-major")
        plan = plan_checkpoints(config, 128, dtype="float32", **cell)
        assert plan.accumulator_bytes == 4 * sum(parameter.numel() for parameter in block.parameters())
        # The gradients from a single segment need no sum.
        assert plan_checkpoints(config, 64, dtype="float32", **cell).accumulator_bytes == 0


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "8", None])
@pytest.mark.parametrize("name", ["layer_interval", "sequence_interval"])
def test_intervals_are_checked(name, value):
    with pytest.raises(ValueError, match=f'{name} must be "auto" or a whole number above 0; got {value!r}'):
        MultiAxisOptions(**{name: value})


def test_defaults_agree_everywhere():
    step, options = asdict(TrainingStep(1)), asdict(MultiAxisOptions())
    step["parameter_dtype"] = None  # the dataclass fills it in
    assert _defaults(plan_checkpoints) == {**options, **step, "sequence_length": inspect.Parameter.empty}
    assert _defaults(enable_multi_axis_checkpointing) == options


def _defaults(function) -> dict:
    parameters = inspect.signature(function).parameters.items()
    return {name: parameter.default for name, parameter in parameters if name not in ("config", "model")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sequence_length=0), "sequence_length must be a whole number above 0; got 0"),
        (dict(sequence_length=True), "sequence_length must be"),
        (dict(batch_size=0), "batch_size must be"),
        (dict(order="diagonal"), "order must be 'layer-major', 'sequence-major' or 'auto'; got 'diagonal'"),
        (dict(dtype="int8"), "dtype must be float16, bfloat16, float32 or float64; got 'int8'"),
        (dict(parameter_dtype=torch.int32), "parameter_dtype must be"),
        (dict(layer_interval=0), "layer_interval must be"),
        (dict(sequence_interval=True), "sequence_interval must be"),
        (dict(memory_budget="-1GiB"), "at least 1 byte"),
    ],
)
def test_arguments_are_checked(config, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_checkpoints(config, **{"sequence_length": 100, **arguments})


def test_other_configurations_are_refused():
    with pytest.raises(ValueError, match="CLIPVisionConfig is not the configuration of a Mamba-2 model"):
        plan_checkpoints(CLIPVisionConfig(), 100)


@pytest.mark.parametrize("length", [1, 2, 8, 255, 256, 257, 1000, 4097, 2**19, 2**22])
@pytest.mark.parametrize("offload", [False, True], ids=["device", "offload"])
def test_intervals_fit_the_model_and_the_sequence(large, length, offload):
    for plan in (plan_checkpoints(large, length, offload=offload), smallest(large, length, offload)):
        assert 1 <= plan.layer_interval <= 64
        assert min(length, 256) <= plan.sequence_interval <= length
        assert plan.sequence_interval % 256 == 0 or plan.sequence_interval == length
        assert plan.device_bytes > 0
        assert (plan.host_bytes > 0) == offload


def test_given_intervals_are_kept_or_clipped(large):
    plan = plan_checkpoints(large, 10_000, layer_interval=7, sequence_interval=777)
    assert (plan.layer_interval, plan.sequence_interval, plan.order) == (7, 777, "layer-major")
    assert (plan.num_layer_groups, plan.num_segments) == (10, 13)
    plan = plan_checkpoints(large, 10_000, layer_interval=100, sequence_interval=20_000)
    assert (plan.layer_interval, plan.sequence_interval) == (64, 10_000)
    assert plan.state_border_bytes == plan.segment_bytes == 0


def test_no_segment_is_a_single_token(large):
    assert plan_checkpoints(large, 513, sequence_interval=256).num_segments == 2
    assert plan_checkpoints(large, 514, sequence_interval=256).num_segments == 3
    assert plan_checkpoints(large, 7, sequence_interval=1).sequence_interval == 2
    assert plan_checkpoints(large, 1, sequence_interval=1).num_segments == 1


def test_extra_compute_depends_on_the_order(large):
    for order, layer_interval, passes in (("layer-major", 8, 1), ("sequence-major", 8, 2), ("sequence-major", 64, 1)):
        plan = plan_checkpoints(large, 9000, order=order, layer_interval=layer_interval)
        assert plan.extra_compute == pytest.approx(passes / 3)


def test_memory_grows_less_than_the_sequence(large):
    for offload in (False, True):
        sizes = [smallest(large, 2**power, offload).device_bytes for power in range(10, 23)]
        for shorter, longer in itertools.pairwise(sizes):
            assert shorter <= longer < 2 * shorter


def test_memory_grows_with_the_size_of_the_step(large):
    def size(**options):
        options = {"layer_interval": 8, "sequence_interval": 1024, "order": "layer-major", **options}
        return plan_checkpoints(large, options.pop("sequence_length", 2**15), **options).device_bytes

    assert size() < size(sequence_length=2**16) < size(sequence_length=2**17)
    assert size() < size(batch_size=2) < 2 * size()  # the sums of parameter gradients have no batch
    assert size(parameter_dtype="bfloat16") == size() < size(dtype="float32")
    assert size() < size(accumulating=True)
    for offload in (False, True):
        output_gradients = 2**15 * 2560 * 2
        assert size(offload=offload, whole_output=True) == size(offload=offload) + output_gradients
    assert size(device="cpu") < size()  # the scan works on fewer tokens at a time


def test_offloading_moves_checkpoints_to_the_host(large):
    options = dict(layer_interval=8, sequence_interval=1024)
    for order in ("layer-major", "sequence-major"):
        here = plan_checkpoints(large, 2**17, order=order, **options)
        there = plan_checkpoints(large, 2**17, order=order, offload=True, **options)
        assert there.device_bytes < here.device_bytes
        assert here.host_bytes == 0
        assert there.host_bytes >= there.hidden_border_bytes + there.state_border_bytes > 0


@pytest.mark.parametrize("order", ["layer-major", "sequence-major"])
def test_offloaded_plans_do_not_grow_with_the_sequence(large, order):
    options = dict(order=order, layer_interval=8, sequence_interval=1024, offload=True)
    assert len({plan_checkpoints(large, 2**power, **options).device_bytes for power in range(12, 23)}) == 1


def _all_plans(config, length, offload):
    chunk = config.chunk_size
    for order in ("layer-major", "sequence-major"):
        for layers in range(1, config.num_hidden_layers + 1):
            for tokens in {*range(chunk, length, chunk), length}:
                options = dict(order=order, layer_interval=layers, sequence_interval=tokens, offload=offload)
                yield plan_checkpoints(config, length, dtype="float32", **options)
                yield plan_checkpoints(config, length, "minimal", dtype="float32", **options)


@pytest.mark.parametrize("length", [5, 8, 65, 173])
@pytest.mark.parametrize("offload", [False, True], ids=["device", "offload"])
def test_a_budget_gets_the_fastest_plan_that_fits(length, offload):
    config = tiny_text_config(num_hidden_layers=6)

    def slowness(plan: CheckpointPlan):
        return plan.extra_compute, plan.num_layer_groups * plan.num_segments

    plans = list(_all_plans(config, length, offload))
    sizes = sorted({plan.device_bytes for plan in plans})
    assert smallest(config, length, offload, dtype="float32").device_bytes == sizes[0]
    for budget in {sizes[0], sizes[len(sizes) // 4], sizes[len(sizes) // 2], sizes[-1]}:
        plan = plan_checkpoints(config, length, budget, dtype="float32", offload=offload)
        assert plan.device_bytes <= budget
        fitting = [other for other in plans if other.device_bytes <= budget]
        fitting = [other for other in fitting if other.extra_compute == min(plan.extra_compute for plan in fitting)]
        least = min(other.host_bytes for other in fitting)
        assert slowness(plan) == min(slowness(other) for other in fitting if other.host_bytes <= 1.25 * least)
    with pytest.raises(ValueError, match="No plan"):
        plan_checkpoints(config, length, sizes[0] - 1, dtype="float32", offload=offload)


def test_without_a_budget_the_plan_is_fast_and_almost_the_smallest():
    config = tiny_text_config(num_hidden_layers=6)
    plans = [plan for plan in _all_plans(config, 1500, False) if plan.extra_compute < 0.5]
    plans = [plan for plan in plans if plan.sequence_interval >= 256]
    least = min(plan.device_bytes for plan in plans)
    plan = plan_checkpoints(config, 1500, dtype="float32")
    assert plan.extra_compute == pytest.approx(1 / 3)
    assert plan.device_bytes <= 1.05 * least
    assert plan.sequence_interval >= 256


def test_the_minimal_budget_gets_the_smallest_plan(large):
    for length in (5000, 2**17):
        plan = plan_checkpoints(large, length, "minimal")
        assert plan == smallest(large, length)
        assert plan.device_bytes <= plan_checkpoints(large, length).device_bytes
    offloaded = plan_checkpoints(large, 2**20, "minimal", offload=True)
    assert offloaded.host_bytes < 2 * plan_checkpoints(large, 2**20, "minimal").device_bytes


def test_the_error_names_the_needed_memory_and_the_changes_that_help(large):
    with pytest.raises(ValueError) as error:
        plan_checkpoints(large, 2**18, "12GiB")
    needed = smallest(large, 2**18).device_bytes
    length = longest_sequence(large, TrainingStep(2**18), MultiAxisOptions(memory_budget="12GiB"))
    message = str(error.value)
    assert f"fits a memory budget of 12.0 GiB: the smallest needs {format_memory_size(needed)}." in message
    assert re.search(r"offload=True would fit, with 1\d\.\d GiB and [\d.]+ GiB of host memory\.", message)
    assert message.endswith(f"Up to {length:,} tokens fit with these settings.")
    assert plan_checkpoints(large, length, "12GiB").device_bytes <= 12 * GiB
    assert plan_checkpoints(large, 2**18, "12GiB", offload=True).device_bytes <= 12 * GiB
    with pytest.raises(ValueError):
        plan_checkpoints(large, length + 256, "12GiB")

    with pytest.raises(ValueError, match=r"offload=True would still need .* No shorter sequence fits either\.$"):
        plan_checkpoints(large, 2**18, "100MiB")
    with pytest.raises(ValueError, match=r'Intervals and order left at "auto" would fit, with '):
        plan_checkpoints(large, 2**14, "20GiB", layer_interval=64, sequence_interval=2**14)


def test_scarce_memory_keeps_states_at_fewer_borders(large):
    options = dict(order="layer-major", layer_interval=8, sequence_interval=1024)
    every = plan_checkpoints(large, 2**17, **options)
    few = plan_checkpoints(large, 2**17, "minimal", **options)
    assert (every.state_interval, few.state_interval) == (1, 12)  # of 127 borders
    assert few.state_border_bytes * 127 == every.state_border_bytes * 10
    assert few.device_bytes < every.device_bytes
    assert few.extra_compute == every.extra_compute + 1 / 3
    assert "every 12 segments" in str(few) and "segments" not in str(every)
    assert plan_checkpoints(large, 2**17, "minimal", offload=True, **options).state_interval == 1
    assert plan_checkpoints(large, 2**11, "minimal", **options).state_interval == 1  # a single border


def test_token_ids_are_kept_instead_of_their_embeddings(large):
    options = dict(order="sequence-major", layer_interval=8, sequence_interval=1024)
    rows, ids = (plan_checkpoints(large, 2**17, from_ids=from_ids, **options) for from_ids in (False, True))
    assert rows.hidden_border_bytes == 2**17 * 2560 * 2
    assert ids.hidden_border_bytes == 2**17 * 8
    table = large.text_config.vocab_size * 2560
    assert ids.accumulator_bytes - rows.accumulator_bytes == table * 4  # the sum is in float32
    options["dtype"] = "float32"
    wide = [plan_checkpoints(large, 2**17, from_ids=from_ids, **options) for from_ids in (False, True)]
    assert wide[0].accumulator_bytes == wide[1].accumulator_bytes  # the sum itself becomes the gradient


def test_fused_kernels_keep_little_more_than_the_paper_s_constant(large):
    fused, plain = (kept_bytes_per_token(large, TrainingStep(1, fused=fused)) for fused in (True, False))
    assert 2 * paper_constants(large).C_grid < fused < 1.4 * 2 * paper_constants(large).C_grid < plain / 3
    assert smallest(large, 2**17, fused=True).device_bytes < smallest(large, 2**17).device_bytes


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("preset", ["0.7b", "1.8b", "3.1b"])
def test_no_segment_is_longer_than_kernels_can_index(preset, batch_size):
    config = Ma2mbaConfig.from_preset(preset)
    text = config.text_config
    widest = 2 * text.expand * text.hidden_size + 2 * text.n_groups * text.state_size + text.num_heads  # of in_proj
    for length in (2**17, 2**20, 2**22):
        for offload, fused in itertools.product((False, True), repeat=2):
            options = dict(batch_size=batch_size, offload=offload, fused=fused)
            for given in ({}, {"sequence_interval": length, "layer_interval": 1}, {"memory_budget": "900TiB"}):
                plan = plan_checkpoints(config, length, **given, **options)
                tokens = plan.sequence_interval + text.conv_kernel  # with the convolution's tail, and a lone token
                assert batch_size * tokens * widest < 2**31
    assert batch_size * (indexable_tokens(config, batch_size) + 2 * text.chunk_size) * widest > 0.98 * 2**31


def test_plans_of_the_27b_at_half_a_million_tokens(large):
    """The plans' expected memory with fused kernels; `benchmarks/gpu.sh` measures it on a GPU."""
    options = dict(fused=True, from_ids=True)
    assert plan_checkpoints(large, 2**19, "14GB", **options).device_bytes <= 14e9
    offloaded = plan_checkpoints(large, 2**19, "3GB", offload=True, **options)
    assert offloaded.device_bytes <= 3e9
    assert offloaded.host_bytes < 120e9
    assert offloaded.extra_compute == pytest.approx(1 / 3)
    longest = plan_checkpoints(large, 2**22, "60GB", offload=True, **options)
    assert longest.host_bytes < 100e9


def test_longest_sequence(large):
    options = MultiAxisOptions(memory_budget="1MiB")
    assert longest_sequence(large, TrainingStep(1), options) == 0
    # In sequence-major order with offload, all that grows with the length is in host memory.
    options = replace(options, memory_budget="20GiB", offload=True)
    assert longest_sequence(large, TrainingStep(1), options) is None


def test_a_plan_prints_as_a_table(large):
    lines = str(plan_checkpoints(large, 2**19, layer_interval=16, sequence_interval=4096)).splitlines()
    assert lines[0] == "MA-GC plan for 1 x 524,288 tokens, 64 layers"
    assert {len(line) for line in lines[1:]} == {64}
    table = dict(re.split(r"\s{2,}", line.strip()) for line in lines[1:])
    assert table["order"] == "layer-major"
    assert table["cell"] == "16 layers x 4,096 tokens"
    assert table["grid"] == "4 x 128 = 512 cells"
    assert table["hidden states kept"] == "17.5 GiB"  # 2^19 x 2560 x (2 + 3 x 4) bytes
    assert table["extra compute"] == "+33%"
    assert re.fullmatch(r"[\d.]+ GiB", table["device in all"])
    assert "hidden states kept (host)" in str(plan_checkpoints(large, 2**19, offload=True))


def test_planning_is_fast(large):
    plan_checkpoints(large, 1000)
    start = time.process_time()
    for length in range(2**21, 2**21 + 20):
        plan_checkpoints(large, length)
    assert (time.process_time() - start) / 20 < 0.02


def test_sharded_parameters_are_gathered_for_a_walk(large):
    layer = 2 * Mamba2Shape.of(large).layer_parameters
    options = dict(sequence_length=2**15, layer_interval=8, sequence_interval=2048)
    for order, layers in (("layer-major", 8), ("sequence-major", 64)):
        whole = plan_checkpoints(large, order=order, **options)
        sharded = plan_checkpoints(large, order=order, sharded=True, **options)
        assert sharded.gathered_bytes == layers * 2 * layer  # weights and gradients
        assert sharded.device_bytes == whole.device_bytes + sharded.gathered_bytes
        assert "gathered weights and gradients" in str(sharded) and "gathered" not in str(whole)
    frozen = TrainedSizes(0, 0, False, 0, 0, False)
    plan = plan_checkpoints(large, sharded=True, trained=frozen, order="layer-major", **options)
    assert plan.gathered_bytes == 8 * layer
    # Gathering all layers takes more memory than the hidden states between groups of layers.
    assert plan_checkpoints(large, 2**17, "minimal").order == "sequence-major"
    assert plan_checkpoints(large, 2**17, "minimal", sharded=True).order == "layer-major"


def test_frozen_parameters_have_no_gradient_sums(large):
    options = dict(sequence_length=2**15, layer_interval=8, order="layer-major", from_ids=True, dtype="bfloat16")
    everything = plan_checkpoints(large, **options)
    frozen = plan_checkpoints(large, trained=TrainedSizes(0, 0, False, 0, 0, False), **options)
    assert frozen.accumulator_bytes == 0 < everything.accumulator_bytes
    assert frozen.cell_bytes < everything.cell_bytes
    with_sums = plan_checkpoints(large, accumulating=True, **options)
    layers = 8 * 2 * Mamba2Shape.of(large).layer_parameters
    assert with_sums.accumulator_bytes >= everything.accumulator_bytes + layers
