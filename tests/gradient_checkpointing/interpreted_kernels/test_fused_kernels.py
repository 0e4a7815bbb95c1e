"""The fused layer with mamba-ssm's own kernels against the stock layer in float64.

The kernels run on a CUDA device, or in Triton's interpreter on the CPU, with `stand_ins` for the compiled extensions
of mamba-ssm and causal-conv1d; `make test-kernels` sets this up. These tests run apart from the others because
Transformers calls mamba-ssm's kernels wherever it can import them.
"""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from double_precision import compute_in_double
from kept_memory import kept_beside
from tiny import tiny_text_config
from transformers import Mamba2Model
from transformers.models.mamba2 import modeling_mamba2

from transformers_ma2mba.gradient_checkpointing.fused_layer import FusedLayer
from transformers_ma2mba.gradient_checkpointing.memory_model import TrainingStep, kept_bytes_per_token
from transformers_ma2mba.gradient_checkpointing.multi_axis import enable_multi_axis_checkpointing
from transformers_ma2mba.mamba2 import kernel_choice
from transformers_ma2mba.mamba2.recurrent_state import LayerState, carried_cache, read_state, write_state
from transformers_ma2mba.mamba2.ssd_scan import ssd_scan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = kernel_choice.mamba_ssm_kernels()
pytestmark = pytest.mark.skipif(KERNELS.missing is not None, reason=f"{KERNELS.missing}; see make test-kernels")

# Relative to the norm of each tensor: three times the errors measured on a CPU. Tensor cores round float32 to TF32,
# which has as many digits as float16; bfloat16 has three bits fewer.
TOLERANCE = {
    ("cpu", torch.float32): 3e-5,
    ("cpu", torch.float16): 6e-3,
    ("cuda", torch.float32): 6e-3,
    ("cuda", torch.bfloat16): 0.05,
}
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter cannot multiply bfloat16 matrices
SMALLEST_NORM = 1e-3  # relative to smaller norms, rounding errors are large; norms of gradients are around 1
if DEVICE.type == "cuda":
    CONFIG = dict(hidden_size=512, num_heads=16, head_dim=64, state_size=128, chunk_size=256)
    LENGTHS = {
        torch.float32: [[1], [2], [255], [256], [257], [1000], [4096 + 13], [3, 1, 2, 5], [5, 252], [5, 253, 254]],
        HALF: [[257], [1000], [4096 + 13], [1000, 257, 4096 + 13]],
    }
    GRID = [("layer-major", 1, 1000, 4096 + 13), ("sequence-major", 2, 4096, 10_000)]
    PADDED = [300, 257, 443]
else:  # as small as possible, because the interpreter is slow
    CONFIG = dict(hidden_size=16, num_heads=2, head_dim=16, state_size=16, chunk_size=16)
    LENGTHS = {
        torch.float32: [[1], [2], [15], [16], [17], [3, 1, 2, 5], [5, 13], [5, 14], [7, 37]],
        HALF: [[17], [7, 37]],
    }
    GRID = [("layer-major", 1, 5, 14), ("sequence-major", 2, 18, 20)]
    PADDED = [6, 3, 11]


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Whether each call of the kernel starts from a state."""
    calls = []

    def recorded(*args, **kwargs):
        calls.append(kwargs["initial_states"] is not None)
        return KERNELS.split_conv1d_scan(*args, **kwargs)

    monkeypatch.setattr(kernel_choice, "mamba_ssm_kernels", lambda: KERNELS._replace(split_conv1d_scan=recorded))
    return calls


def causal_conv1d(hidden_states, weight, bias=None, activation=None, **kwargs):
    padded = F.pad(hidden_states, (weight.shape[-1] - 1, 0))
    assert activation == "silu"
    return F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=len(weight)))


@pytest.fixture
def in_double(monkeypatch):
    """A context in which the stock model computes in float64, in plain PyTorch."""

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patched:
            compute_in_double(patched)
            patched.setattr(modeling_mamba2, "causal_conv1d_fn", causal_conv1d)
            patched.setattr(modeling_mamba2, "mamba2_chunk_scan", lambda *args, **kwargs: ssd_scan(*args, **kwargs))
            patched.setattr(modeling_mamba2, "mamba2_split_conv1d_scan_combined", lambda *args, **kwargs: None)
            yield

    return context


def trunk(dtype, num_hidden_layers=1, **options) -> Mamba2Model:
    torch.manual_seed(0)
    model = Mamba2Model(tiny_text_config(num_hidden_layers=num_hidden_layers, **{**CONFIG, **options}))
    with torch.no_grad():
        for parameter in model.parameters():  # some are all zeros or ones
            parameter += 0.1 * torch.randn_like(parameter)
    return model.to(DEVICE, dtype).train()


def in_float64(module):
    return copy.deepcopy(module).to(torch.float64)


def random_state(config, dtype, batch_size=2) -> LayerState:
    conv_dim = config.expand * config.hidden_size + 2 * config.n_groups * config.state_size
    conv = torch.randn(batch_size, conv_dim, config.conv_kernel)
    recurrent = torch.randn(batch_size, config.num_heads, config.head_dim, config.state_size)
    return LayerState(conv.to(DEVICE, dtype), recurrent.to(DEVICE))


def weighted(tensors):
    """A loss with a random weight for each element."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(tensor.shape, generator=generator).to(DEVICE) for tensor in tensors]
    return sum((tensor * weight.to(tensor.dtype)).sum() for tensor, weight in zip(tensors, weights, strict=True))


def run(layer, call, inputs, lengths, state, attention_mask=None):
    """Outputs, final states and gradients of a sequence that is cut into segments of the given lengths."""
    layer.zero_grad()
    inputs = inputs.clone().requires_grad_()
    state = LayerState(*(tensor if tensor is None else tensor.clone().requires_grad_() for tensor in state))
    cache = carried_cache(1)
    write_state(cache.layers[0], state)
    masks = [None] * len(lengths) if attention_mask is None else attention_mask.split(lengths, dim=1)
    outputs = [
        call(segment, cache_params=cache, attention_mask=mask)
        for segment, mask in zip(inputs.split(lengths, dim=1), masks, strict=True)
    ]
    outputs = [torch.cat(outputs, dim=1), *read_state(cache.layers[0])]
    weighted(outputs).backward()
    results = dict(zip(["output", "final conv", "final recurrent"], outputs, strict=True))
    results |= {f"initial {name}": tensor.grad for name, tensor in state._asdict().items() if tensor is not None}
    return results | {"inputs": inputs.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()}


def assert_close(actual, expected, dtype):
    tolerance = TOLERANCE[DEVICE.type, dtype]
    assert actual.keys() == expected.keys()
    errors = {
        name: ((actual[name] - tensor).norm() / tensor.norm().clamp(min=SMALLEST_NORM)).item()
        for name, tensor in expected.items()
    }
    assert all(error <= tolerance for error in errors.values()), errors  # and so no NaN


@pytest.mark.parametrize(
    "lengths, dtype", [(lengths, dtype) for dtype in LENGTHS for lengths in LENGTHS[dtype]], ids=str
)
def test_segments_equal_the_whole_sequence(lengths, dtype, in_double, calls):
    layer = trunk(dtype).layers[0]
    inputs = torch.randn(1, sum(lengths), CONFIG["hidden_size"]).to(DEVICE, dtype)
    with in_double():
        exact = in_float64(layer)
        expected = run(exact, exact, inputs.double(), [sum(lengths)], LayerState())
    assert not calls
    assert_close(run(layer, FusedLayer(layer), inputs, lengths, LayerState()), expected, dtype)
    assert calls == [False] + [True] * (len(lengths) - 1)


@pytest.mark.parametrize("options", [{"n_groups": 2, "use_bias": True}, {"use_conv_bias": False}], ids=str)
def test_given_state(options, in_double, calls):
    model = trunk(torch.float32, **options)
    layer = model.layers[0]
    inputs = torch.randn(2, 3, CONFIG["hidden_size"]).to(DEVICE)
    state = random_state(model.config, torch.float32)
    with in_double():
        exact = in_float64(layer)
        double = LayerState(*(tensor.double() for tensor in state))
        expected = run(exact, exact, inputs.double(), [3], double)
    assert_close(run(layer, FusedLayer(layer), inputs, [3], state), expected, torch.float32)
    assert calls == [True]


def left_padding(length):
    """A mask of three samples: padded within the first chunk, beyond it, and entirely."""
    padded = torch.tensor([length // 5, length * 4 // 5, length])
    return (torch.arange(length) >= padded[:, None]).long().to(DEVICE)


def between_real_tokens(length):
    mask = left_padding(length)
    mask[0, length // 2 : length * 4 // 5] = 0
    mask[1, -(length // 8) :] = 0
    return mask


@pytest.mark.parametrize(
    "lengths, options, dtype",
    [
        (PADDED, {"n_groups": 2, "use_bias": True}, torch.float32),
        ([sum(PADDED)], {"use_conv_bias": False}, torch.float32),
        ([sum(PADDED)], {"use_bias": True}, HALF),
    ],
    ids=str,
)
def test_left_padding(lengths, options, dtype, in_double, calls):
    layer = trunk(dtype, **options).layers[0]
    mask = left_padding(sum(lengths))
    inputs = torch.randn(*mask.shape, CONFIG["hidden_size"]).to(DEVICE, dtype)
    with in_double():
        exact = in_float64(layer)
        expected = run(exact, exact, inputs.double(), [sum(lengths)], LayerState(), mask)
    assert not calls
    assert_close(run(layer, FusedLayer(layer), inputs, lengths, LayerState(), mask), expected, dtype)
    assert calls == [False] + [True] * (len(lengths) - 1)


def test_state_before_padding(in_double, calls):
    """The result equals the stock layer with steps of size zero at padding on the left, on the right and between."""
    model = trunk(torch.float32, n_groups=2, use_bias=True)
    layer = model.layers[0]
    mask = between_real_tokens(sum(PADDED))
    inputs = torch.randn(*mask.shape, CONFIG["hidden_size"]).to(DEVICE)
    state = random_state(model.config, torch.float32, len(mask))

    def zero_steps(module, args, projected):
        gate_and_convolved, dt = projected.tensor_split([-CONFIG["num_heads"]], dim=-1)
        return torch.cat([gate_and_convolved, dt.masked_fill((mask == 0)[..., None], -torch.inf)], dim=-1)

    with in_double():
        exact = in_float64(layer)
        exact.mixer.in_proj.register_forward_hook(zero_steps)
        double = LayerState(*(tensor.double() for tensor in state))
        expected = run(exact, exact, inputs.double(), [sum(PADDED)], double, mask)
    assert_close(run(layer, FusedLayer(layer), inputs, PADDED, state, mask), expected, torch.float32)
    assert calls == [True] * len(PADDED)


@pytest.mark.parametrize("padding", [False, True], ids=["real", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_fused_layer_keeps_the_planned_memory(dtype, padding):
    model = trunk(dtype, residual_in_fp32=True)
    mask = torch.ones(2, 3 * CONFIG["chunk_size"], dtype=torch.long, device=DEVICE)
    mask[1, :5] = 0

    def kept_bytes(length):
        cache = carried_cache(1)
        write_state(cache.layers[0], random_state(model.config, dtype))
        rows = torch.randn(2, length, CONFIG["hidden_size"], device=DEVICE, requires_grad=True)
        with kept_beside(model) as kept:
            # The mask is a slice, as in the grid: backward keeps the batch's mask.
            given = mask[:, :length] if padding else None
            output = FusedLayer(model.layers[0])(rows, cache_params=cache, attention_mask=given)
        assert output.dtype == torch.float32
        return sum(kept.values())

    shorter, longer = (kept_bytes(chunks * CONFIG["chunk_size"]) for chunks in (1, 3))
    per_token = (longer - shorter) / (2 * 2 * CONFIG["chunk_size"])
    assert per_token == kept_bytes_per_token(model.config, TrainingStep(1, dtype=dtype, fused=True))


def step(model, embeds, attention_mask=None):
    model.zero_grad()
    embeds = embeds.clone().requires_grad_()
    output = model(inputs_embeds=embeds, attention_mask=attention_mask).last_hidden_state
    weighted([output]).backward()
    gradients = {name: parameter.grad for name, parameter in model.layers.named_parameters()}
    return {"output": output.detach(), "inputs": embeds.grad, **gradients}


@pytest.mark.parametrize("padding", [False, True], ids=["real", "padded"])
@pytest.mark.parametrize("order, layer_interval, sequence_interval, length", GRID)
def test_multi_axis_checkpointing(order, layer_interval, sequence_interval, length, padding, in_double, calls):
    model = trunk(torch.float32, num_hidden_layers=2)
    mask = left_padding(length)[:2] if padding else None
    embeds = torch.randn(2 if padding else 1, length, CONFIG["hidden_size"]).to(DEVICE)
    with in_double():
        expected = step(in_float64(model), embeds.double(), mask)
    assert not calls
    grid = enable_multi_axis_checkpointing(model, layer_interval, sequence_interval, order=order)
    assert_close(step(grid, embeds, mask), expected, torch.float32)
    assert True in calls and False in calls
