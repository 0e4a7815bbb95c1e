"""The fused layer against the stock layer in float64: outputs, states and gradients.

A naive double replaces mamba-ssm's kernel; `interpreted_kernels` tests the kernels themselves.
"""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_same
from kept_memory import kept_beside
from peft import LoraConfig, inject_adapter_in_model
from tiny import tiny_text_config
from torch import nn
from torch.nn.utils import parametrize
from transformers import Mamba2Model
from transformers.models.mamba2.modeling_mamba2 import Mamba2Block

from transformers_ma2mba.gradient_checkpointing import fused_layer
from transformers_ma2mba.gradient_checkpointing.fused_layer import FusedLayer, forwards_of, why_not_fused
from transformers_ma2mba.gradient_checkpointing.multi_axis import enable_multi_axis_checkpointing
from transformers_ma2mba.mamba2 import kernel_choice
from transformers_ma2mba.mamba2.kernel_choice import Kernels
from transformers_ma2mba.mamba2.recurrent_state import LayerState, carried_cache, read_state, write_state

WIDTH = 32
CHUNK = 8
EXACT = 1e-10  # relative, in float64
pytestmark = pytest.mark.usefixtures("in_double")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def split_conv1d_scan(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    initial_states=None,
    seq_idx=None,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-6,
    outproj_weight=None,
    outproj_bias=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
):
    """Compute token by token the result of mamba-ssm's kernel of this signature."""
    assert seq_idx is None and activation in ("silu", "swish") and not norm_before_gate
    conv_dim, width = conv1d_weight.shape
    num_heads = len(D)
    inner = num_heads * headdim
    gate, conv_inputs, dt = zxbcdt.split([inner, conv_dim, num_heads], dim=-1)
    padded = F.pad(conv_inputs.transpose(1, 2), (width - 1, 0))
    convolved = F.silu(F.conv1d(padded, conv1d_weight.unsqueeze(1), conv1d_bias, groups=conv_dim)).transpose(1, 2)
    x, B, C = convolved.split([inner, (conv_dim - inner) // 2, (conv_dim - inner) // 2], dim=-1)
    x = x.unflatten(-1, (num_heads, headdim))
    B, C = (tensor.unflatten(-1, (ngroups, -1)).repeat_interleave(num_heads // ngroups, dim=2) for tensor in (B, C))
    dt = F.softplus(dt + dt_bias).clamp(*dt_limit)
    state = x.new_zeros(len(x), num_heads, headdim, B.shape[-1]) if initial_states is None else initial_states
    y = []
    for t in range(x.shape[1]):
        written = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + written
        y.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]) + D[:, None] * x[:, t])
    y = (torch.stack(y, dim=1).flatten(2) * F.silu(gate)).unflatten(-1, (ngroups, -1))
    y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + rmsnorm_eps)).flatten(2) * rmsnorm_weight
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    else:
        assert outproj_bias is None
    return (y, state) if return_final_states else y


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The keyword arguments of each call of the kernel."""
    calls = []

    def recorded(*args, **kwargs):
        calls.append(kwargs)
        return split_conv1d_scan(*args, **kwargs)

    monkeypatch.setattr(kernel_choice, "mamba_ssm_kernels", lambda: Kernels(split_conv1d_scan=recorded))
    return calls


def trunk(num_hidden_layers=1, **options) -> Mamba2Model:
    torch.manual_seed(0)
    config = tiny_text_config(num_hidden_layers=num_hidden_layers, hidden_size=WIDTH, chunk_size=CHUNK, **options)
    model = Mamba2Model(config).double().train()
    with torch.no_grad():
        for parameter in model.parameters():  # some are all zeros or ones
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def block(**options) -> Mamba2Block:
    return trunk(**options).layers[0]


def random_state(config, batch_size=2) -> LayerState:
    conv_dim = config.expand * config.hidden_size + 2 * config.n_groups * config.state_size
    conv = torch.randn(batch_size, conv_dim, config.conv_kernel, dtype=torch.float64)
    recurrent = torch.randn(batch_size, config.num_heads, config.head_dim, config.state_size, dtype=torch.float64)
    return LayerState(conv.requires_grad_(), recurrent.requires_grad_())


def inputs_of(length, batch_size=2):
    return torch.randn(batch_size, length, WIDTH, dtype=torch.float64)


def run(layer, call, inputs, lengths=None, state=None, attention_mask=None, without=(), **options):
    """Run a sequence, cut into segments of the given lengths, and the backward of a loss with random weights.

    Returns the outputs and the final states, except those named by `without`, on which the loss does not depend
    either, and the gradients.
    """
    layer.zero_grad()
    inputs = inputs.clone().requires_grad_()
    state = LayerState(*(tensor.detach().clone().requires_grad_() for tensor in state)) if state else LayerState()
    cache = carried_cache(layer.layer_idx + 1)
    write_state(cache.layers[layer.layer_idx], state)
    lengths = lengths or [inputs.shape[1]]
    masks = [None] * len(lengths) if attention_mask is None else attention_mask.split(lengths, dim=1)
    output = torch.cat(
        [
            call(segment, cache_params=cache, attention_mask=mask, **options)
            for segment, mask in zip(inputs.split(lengths, dim=1), masks, strict=True)
        ],
        dim=1,
    )
    outputs = {"output": output}
    outputs |= {
        f"final {name}": tensor for name, tensor in read_state(cache.layers[layer.layer_idx])._asdict().items()
    }
    outputs = {name: tensor for name, tensor in outputs.items() if name not in without}
    generator = torch.Generator().manual_seed(1)
    sum(
        (tensor * torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)).sum()
        for tensor in outputs.values()
    ).backward()
    results = {name: tensor.detach() for name, tensor in outputs.items()}
    results |= {f"initial {name}": None if t is None else t.grad for name, t in state._asdict().items()}
    return results | {"inputs": inputs.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()}


LENGTHS = [1, 2, 3, 4, 5, CHUNK - 1, CHUNK, CHUNK + 1, 29]


@pytest.mark.parametrize("length", LENGTHS)
def test_first_segment(length, calls):
    layer, inputs = block(), inputs_of(length)
    assert_same(run(layer, FusedLayer(layer), inputs), run(layer, layer, inputs))
    assert len(calls) == 1


@pytest.mark.parametrize("length", LENGTHS)
def test_second_segment(length, calls):
    layer, inputs = block(), inputs_of(6 + length)
    assert_same(run(layer, FusedLayer(layer), inputs, [6, length]), run(layer, layer, inputs))
    assert len(calls) == 2


@pytest.mark.parametrize("length", LENGTHS[1:])  # the stock layer takes a single token for a decoding step
def test_given_state(length):
    layer, inputs = block(), inputs_of(length)
    state = random_state(trunk().config)
    assert_same(run(layer, FusedLayer(layer), inputs, state=state), run(layer, layer, inputs, state=state))


OPTIONS = [
    {"n_groups": 2},
    {"use_conv_bias": False},
    {"use_bias": True},
    {"conv_kernel": 2},
    {"conv_kernel": 3},
    {"residual_in_fp32": False},
    {"time_step_limit": (0.0, 0.5)},
    {"time_step_limit": (-1.0, 2.0)},
    {"layer_norm_epsilon": 1e-2, "expand": 4, "num_heads": 8},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_segments_equal_the_whole_sequence(options, calls):
    lengths = [3, 1, 1, 7, 2, 13, 4]
    layer, inputs = block(**options), inputs_of(sum(lengths))
    assert_same(run(layer, FusedLayer(layer), inputs, lengths), run(layer, layer, inputs))
    assert len(calls) == len(lengths)
    if layer.mixer.conv_kernel_size < 4:
        lengths = [1, 1, 2]  # each shorter than the convolution's state
        inputs = inputs[:, :4]
        assert_same(run(layer, FusedLayer(layer), inputs, lengths), run(layer, layer, inputs))


def test_without_a_cache(calls):
    layer, inputs = block(), inputs_of(11)
    torch.testing.assert_close(FusedLayer(layer)(inputs), layer(inputs), rtol=EXACT, atol=EXACT)
    assert not calls[0]["return_final_states"]


def test_packed_sequences_go_through_the_stock_layer(calls):
    layer, inputs = block(), inputs_of(11)
    taken = []
    for keyword in ("seq_idx", "cu_seqlens"):
        fused = FusedLayer(layer)
        fused.plain_forward = lambda hidden_states, **kwargs: taken.append(kwargs)
        fused(inputs, **{keyword: torch.zeros(1, 11, dtype=torch.int32)})
        assert taken.pop()[keyword] is not None
    assert not calls


def test_norm_in_a_kernel(monkeypatch):
    layer, inputs = block(), inputs_of(11)

    def rms_norm(x, weight, bias, eps):
        assert bias is None and x.dtype == weight.dtype
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    monkeypatch.setattr(kernel_choice, "mamba_ssm_kernels", lambda: Kernels(None, split_conv1d_scan, rms_norm))
    expected = run(layer, layer, inputs)
    assert_same(run(layer, FusedLayer(layer), inputs), expected)
    normed = []
    layer.norm.register_forward_hook(lambda *args: normed.append(args[-1]))
    assert_same(run(layer, FusedLayer(layer), inputs), expected)
    assert len(normed) == 1


@pytest.mark.parametrize("wanted", ["conv", "recurrent"])
@pytest.mark.parametrize("with_state, length", [(False, 1), (False, 2), (False, 5), (True, 2), (True, 5)])
def test_loss_of_one_final_state(with_state, length, wanted):
    layer = block()
    inputs, given = inputs_of(length), random_state(layer.config)
    gradients = []
    for call in (layer, FusedLayer(layer)):
        layer.zero_grad()
        leaf, cache = inputs.clone().requires_grad_(), carried_cache(1)
        state = LayerState(*(tensor.detach().clone().requires_grad_() for tensor in given))
        write_state(cache.layers[0], state if with_state else LayerState())
        call(leaf, cache_params=cache)
        final = getattr(read_state(cache.layers[0]), wanted)
        (final * torch.linspace(-1, 1, final.numel(), dtype=final.dtype).view_as(final)).sum().backward()
        gradients.append([leaf.grad, state.conv.grad, state.recurrent.grad, layer.mixer.in_proj.weight.grad.clone()])
    for expected, actual in zip(*gradients, strict=True):
        if expected is None or not expected.any():  # the loss does not depend on it
            assert actual is None or not actual.any()
        else:
            assert (actual - expected).norm() <= EXACT * expected.norm()


def test_kept_states_have_storage_of_their_own():
    layer = block()
    for length in (2, 30):
        cache = carried_cache(1)
        FusedLayer(layer)(inputs_of(length), cache_params=cache)
        for _ in range(2):
            for tensor in read_state(cache.layers[0]):
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            FusedLayer(layer)(inputs_of(length), cache_params=cache)


# Padding


def left_padded(real, length):
    """A mask of samples that end in as many real tokens as `real` says."""
    return (torch.arange(length) >= length - torch.tensor(real)[:, None]).long()


LENGTHS_OF_SEGMENTS = [None, [9, 3, 9], [9, 1, 1, 4, 6]]
# For segments of 9, 3 and 9 tokens: no padding, part of a segment, up to a border, beyond it, all but a token, all.
LEFT = left_padded([21, 17, 12, 11, 1, 0], 21)
RIGHT = LEFT.flip(1)
ANY = torch.cat([LEFT[1:4], RIGHT[1:4]])
ANY[0, 12:16] = ANY[3, 8:10] = 0  # between real tokens, within a segment and across a border
ANY[5, 15:] = 1
MIXERS = [
    {},
    {"n_groups": 2},
    {"use_conv_bias": False},
    {"use_bias": True},
    {"conv_kernel": 2, "use_bias": True},
    {"time_step_limit": (0.0, 0.5), "residual_in_fp32": False},
]


def zero_steps_at_padding(layer, mask):
    """Make a stock layer take steps of size zero at padded positions, until the returned handle is removed."""
    num_heads = layer.mixer.num_heads

    def hook(module, args, projected):
        dt = projected[..., -num_heads:].masked_fill((mask == 0)[..., None], -torch.inf)
        return torch.cat([projected[..., :-num_heads], dt], dim=-1)

    return layer.mixer.in_proj.register_forward_hook(hook)


@pytest.mark.parametrize("lengths", LENGTHS_OF_SEGMENTS, ids=str)
@pytest.mark.parametrize("options", MIXERS, ids=str)
def test_left_padding_equals_the_stock_layer(options, lengths, calls):
    layer, inputs = block(**options), inputs_of(21, len(LEFT))
    expected = run(layer, layer, inputs, attention_mask=LEFT)
    assert_same(run(layer, FusedLayer(layer), inputs, lengths, attention_mask=LEFT), expected)
    assert len(calls) == len(lengths or [21])


@pytest.mark.parametrize("lengths", LENGTHS_OF_SEGMENTS, ids=str)
@pytest.mark.parametrize("options", MIXERS, ids=str)
def test_right_padding_leaves_the_state_unchanged(options, lengths, calls):
    layer, inputs = block(**options), inputs_of(21, len(RIGHT))
    fused, without = FusedLayer(layer), ["final recurrent"]
    expected = run(layer, layer, inputs, attention_mask=RIGHT, without=without)
    assert_same(run(layer, fused, inputs, lengths, attention_mask=RIGHT, without=without), expected)
    assert len(calls) == len(lengths or [21])
    final = run(layer, fused, inputs, lengths, attention_mask=RIGHT)["final recurrent"]
    for sample, real in enumerate(RIGHT.sum(1)):
        alone = run(layer, layer, inputs[[sample], :real])["final recurrent"] if real else torch.zeros_like(final[:1])
        assert (final[[sample]] - alone).norm() <= EXACT * alone.norm()
    stock = run(layer, layer, inputs, attention_mask=RIGHT)["final recurrent"]
    assert (final - stock).norm() > 0.01 * stock.norm()  # the stock layer decays its state


@pytest.mark.parametrize("with_state", [False, True], ids=["empty", "state"])
@pytest.mark.parametrize("lengths", LENGTHS_OF_SEGMENTS, ids=str)
@pytest.mark.parametrize("options", MIXERS, ids=str)
def test_any_padding_equals_the_stock_layer_with_zero_steps_at_padding(options, lengths, with_state):
    layer, inputs = block(**options), inputs_of(21, len(ANY))
    state = random_state(layer.config, len(ANY)) if with_state else None
    actual = run(layer, FusedLayer(layer), inputs, lengths, state, attention_mask=ANY)
    handle = zero_steps_at_padding(layer, ANY)
    expected = run(layer, layer, inputs, state=state, attention_mask=ANY)
    handle.remove()
    assert_same(actual, expected)
    decayed = run(layer, layer, inputs, state=state, attention_mask=ANY)
    assert (actual["output"] - decayed["output"]).norm() > 1e-4 * decayed["output"].norm()


def test_real_tokens_after_padding_continue_the_state_before_it():
    """Without biases, their convolution sees padding as a state of zeros."""
    layer, inputs = block(), inputs_of(13)
    state, padding = random_state(layer.config), 5
    mask = (torch.arange(13) >= padding).long().expand(2, -1)
    padded = run(layer, FusedLayer(layer), inputs, [3, 10], state, attention_mask=mask)
    state = LayerState(torch.zeros_like(state.conv), state.recurrent)
    alone = run(layer, layer, inputs[:, padding:], state=state)
    for name in ("output", "final conv", "final recurrent"):
        actual = padded[name][:, padding:] if name == "output" else padded[name]
        assert (actual - alone[name]).norm() <= EXACT * alone[name].norm()


def test_padding_without_a_cache(calls):
    layer, inputs = block(), inputs_of(21, len(LEFT))
    fused = FusedLayer(layer)(inputs, attention_mask=LEFT)
    torch.testing.assert_close(fused, layer(inputs, attention_mask=LEFT), rtol=EXACT, atol=EXACT)
    assert not calls[0]["return_final_states"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32], ids=str)
def test_mask_of_any_type(dtype):
    layer, inputs = block(), inputs_of(21, len(LEFT))
    expected = run(layer, FusedLayer(layer), inputs, [9, 12], attention_mask=LEFT)
    assert_same(run(layer, FusedLayer(layer), inputs, [9, 12], attention_mask=LEFT.to(dtype)), expected, tolerance=0)


@pytest.mark.parametrize("length, wanted", [(2, "conv"), (2, "recurrent"), (9, "conv"), (9, "recurrent")])
def test_loss_of_one_final_state_after_padding(length, wanted):
    layer = block(use_bias=True)
    inputs, mask = inputs_of(length), left_padded([length - 1, length], length)
    without = {"output", "final conv", "final recurrent"} - {f"final {wanted}"}
    expected = run(layer, layer, inputs, attention_mask=mask, without=without)
    actual = run(layer, FusedLayer(layer), inputs, attention_mask=mask, without=without)
    involved = [name for name, tensor in expected.items() if tensor is not None and tensor.any()]
    assert_same({name: actual[name] for name in involved}, {name: expected[name] for name in involved})
    for name in expected.keys() - involved:
        assert actual[name] is None or not actual[name].any()


@pytest.mark.parametrize("lengths", LENGTHS_OF_SEGMENTS[:2], ids=str)
@pytest.mark.parametrize("targets", [["in_proj"], ["out_proj"], ["in_proj", "out_proj"]], ids="+".join)
def test_padding_with_adapters(targets, lengths, calls):
    (layer,), inputs = lora(trunk(use_bias=True), *targets), inputs_of(21, len(LEFT))
    expected = run(layer, layer, inputs, attention_mask=LEFT)
    assert expected[f"mixer.{targets[0]}.lora_A.default.weight"].norm() > 0
    assert_same(run(layer, FusedLayer(layer), inputs, lengths, attention_mask=LEFT), expected)
    assert len(calls) == len(lengths or [21])


@pytest.mark.parametrize("kind", ["plain", "frozen", "view", "adapter", "hook"])
def test_padding_overwrites_a_plain_projection(kind, monkeypatch):
    """The layer copies the projection only if something else may refer to it."""
    model = trunk()
    if kind == "adapter":
        lora(model, "in_proj")
    layer, inputs = model.layers[0], inputs_of(21, len(LEFT))
    layer.mixer.in_proj.requires_grad_(kind != "frozen")
    if kind == "hook":  # autograd keeps the output of tanh
        layer.mixer.in_proj.register_forward_hook(lambda *args: args[-1].tanh())
    expected = run(layer, layer, inputs, attention_mask=LEFT)
    projected, given, linear = [], [], F.linear

    def recorded(*args):
        result = linear(*args)
        # Some releases of PyTorch return a view if there is a bias.
        projected.append(result.flatten(0, 1).view(result.shape) if kind == "view" else result)
        return projected[-1]

    def kernel(zxbcdt, *args, **kwargs):
        given.append(zxbcdt.data_ptr())
        return split_conv1d_scan(zxbcdt, *args, **kwargs)

    monkeypatch.setattr(F, "linear", recorded)
    monkeypatch.setattr(kernel_choice, "mamba_ssm_kernels", lambda: Kernels(split_conv1d_scan=kernel))
    assert_same(run(layer, FusedLayer(layer), inputs, attention_mask=LEFT), expected)
    assert (projected[0].data_ptr() == given[0]) == (kind in ("plain", "frozen"))


@pytest.mark.parametrize("with_state", [False, True], ids=["empty", "state"])
@pytest.mark.parametrize("options", [{}, {"use_bias": True}], ids=str)
def test_padding_keeps_only_its_mask_for_backward(options, with_state):
    """Apart from the mask, the double keeps as much with padding as without.

    In the grid, a segment's mask is a slice of the batch's, and takes no memory of its own.
    """
    model = trunk(**options)
    mask = left_padded([9, 5], 9)

    def kept_bytes(mask):
        cache = carried_cache(1)
        write_state(cache.layers[0], random_state(model.config) if with_state else LayerState())
        rows = inputs_of(9).requires_grad_()
        with kept_beside(model) as kept:
            FusedLayer(model.layers[0])(rows, cache_params=cache, attention_mask=mask)
        return sum(kept.values())

    assert kept_bytes(mask) == kept_bytes(None) + mask.untyped_storage().nbytes()


def lora(model, *targets, r=3, **options):
    """Add adapters to a model's layers.

    For the whole model, PEFT would refuse modules whose adapters mamba-ssm's kernels may bypass.
    """
    torch.manual_seed(3)
    config = LoraConfig(r=r, lora_dropout=0.0, target_modules=list(targets), init_lora_weights=False, **options)
    return inject_adapter_in_model(config, model.layers).double()


@pytest.mark.parametrize("targets", [["in_proj"], ["out_proj"], ["in_proj", "out_proj"]], ids="+".join)
def test_adapters_on_the_projections(targets, calls):
    (layer,), inputs = lora(trunk(use_bias=True), *targets), inputs_of(13)
    expected = run(layer, layer, inputs)
    assert expected[f"mixer.{targets[0]}.lora_A.default.weight"].norm() > 0
    assert_same(run(layer, FusedLayer(layer), inputs, [6, 7]), expected)
    assert len(calls) == 2
    assert all(
        call["outproj_weight"] is None and call["outproj_bias"] is None for call in calls
    )  # not stock, or frozen


def test_kernel_multiplies_by_a_plain_trained_output_projection(calls):
    layer, inputs = block(), inputs_of(5)
    run(layer, FusedLayer(layer), inputs)
    assert calls.pop()["outproj_weight"] is layer.mixer.out_proj.weight
    for change in (
        lambda projection: projection.requires_grad_(False),
        lambda projection: projection.requires_grad_().register_forward_hook(lambda *args: 2 * args[-1]),
        lambda projection: parametrize.register_parametrization(projection, "weight", nn.Softplus(), unsafe=True),
    ):
        change(layer.mixer.out_proj)
        assert_same(run(layer, FusedLayer(layer), inputs), run(layer, layer, inputs))
        assert calls.pop()["outproj_weight"] is None


# Choice of the layers


@pytest.fixture
def interpreter(monkeypatch):
    monkeypatch.setattr(kernel_choice, "runs_kernels", lambda device: True)


def single(**options):
    return block(**options).to(torch.float32)


def test_stock_layers_are_fused(interpreter):
    model = trunk(3).to(torch.float32)
    assert why_not_fused(list(model.layers), CPU) is None
    assert why_not_fused(list(lora(model, "in_proj", "out_proj").to(torch.float32)), CPU) is None
    forwards, fused = forwards_of(list(model.layers), CPU)
    assert fused and all(isinstance(forward, FusedLayer) for forward in forwards)
    assert [forward.layer for forward in forwards] == list(model.layers)


def parts_of(layer):
    return {
        "layers.0": layer,
        "layers.0.mixer": layer.mixer,
        "layers.0.mixer.conv1d": layer.mixer.conv1d,
        "layers.0.mixer.norm": layer.mixer.norm,
    }


CHANGES = {
    "forward hook": lambda module: module.register_forward_hook(lambda *args: None),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(lambda *args: None),
    "backward hook": lambda module: module.register_full_backward_hook(lambda *args: None),
    "backward pre-hook": lambda module: module.register_full_backward_pre_hook(lambda *args: None),
    "another forward": lambda module: setattr(module, "forward", module.forward),
    "parametrization": lambda module: parametrize.register_parametrization(
        module, next(name for name, _ in module.named_parameters(recurse=False)), nn.Identity()
    ),
    "class of its own": lambda module: setattr(module, "__class__", type("Own", (type(module),), {})),
}


# A block has no parameter of its own that could be parametrized.
@pytest.mark.parametrize(
    "name, change",
    [pair for pair in itertools.product(parts_of(single()), CHANGES) if pair != ("layers.0", "parametrization")],
)
def test_modules_that_the_kernels_would_bypass(name, change, interpreter):
    layer = single()
    CHANGES[change](parts_of(layer)[name])
    reason = why_not_fused([single(), layer], CPU)
    assert reason.startswith(f"{name} ") and "bypass" in reason


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_adapters_that_the_kernels_would_bypass(interpreter):
    layers = lora(trunk(2), "conv1d", r=96, exclude_modules=["0.mixer.conv1d"]).to(torch.float32)
    assert why_not_fused(list(layers), CPU).startswith("layers.1.mixer.conv1d has")
    layers = lora(trunk(2), "in_proj", modules_to_save=["mixer.norm"]).to(torch.float32)
    assert why_not_fused(list(layers), CPU).startswith("layers.0.mixer.norm has")


def test_layers_that_the_kernels_cannot_compute(interpreter):
    for reason, options in {
        "activation": {"hidden_act": "gelu"},
        "2 to 4 tokens": {"conv_kernel": 5},
        "multiples of 8": {"state_size": 15, "n_groups": 2},
        "least step size": {"time_step_limit": (0.01, 1.0)},
    }.items():
        assert reason in why_not_fused([single(**options)], CPU)
    assert "float64" in why_not_fused([block()], CPU)
    assert "Linear is not the stock layer" in why_not_fused([single(), nn.Linear(2, 2)], CPU)


def test_mamba_ssm_is_not_imported_without_cuda(monkeypatch):
    monkeypatch.setattr(kernel_choice, "mamba_ssm_kernels", lambda: pytest.fail("imported"))
    layer = single()
    assert "CUDA" in why_not_fused([layer], CPU)
    assert forwards_of([layer], CPU) == ([layer], False)


def test_choice_is_logged_once(monkeypatch):
    logged = []
    for level in ("info_once", "warning_once"):
        monkeypatch.setattr(fused_layer.logger, level, lambda message, level=level: logged.append((level, message)))
    layer = single()
    forwards_of([layer], CUDA)
    monkeypatch.setattr(kernel_choice, "mamba_ssm_kernels", lambda: Kernels(missing="mamba-ssm cannot be imported"))
    assert forwards_of([layer], CUDA) == ([layer], False)
    forwards_of([layer], CPU)
    assert logged == [
        ("info_once", "MA-GC runs Mamba-2 layers with mamba-ssm's fused kernels."),
        ("warning_once", "MA-GC runs Mamba-2 layers without mamba-ssm's fused kernels: mamba-ssm cannot be imported."),
    ]


def test_sharded_layer(monkeypatch, interpreter):
    """Its hooks run around MA-GC's whole run, for which `forward` is replaced."""
    layer = single()
    layer.ds_id = 0
    layer.register_forward_pre_hook(lambda *args: pytest.fail("gathered again"))
    assert why_not_fused([layer], CPU) is None
    fused = FusedLayer(layer)
    layer.forward = lambda *args: pytest.fail("called itself")
    layer.double()
    inputs = inputs_of(4)
    fused(inputs)
    fused(inputs, attention_mask=torch.ones(2, 4))


# The engine


def step(model, inputs, mask=None):
    model.zero_grad()
    embeds = inputs.clone().requires_grad_()
    output = model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    loss = output.square().sum()
    loss.backward()
    return {"loss": loss.detach(), "output": output.detach(), "inputs": embeds.grad} | {
        name: parameter.grad for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("order", ["layer-major", "sequence-major"])
@pytest.mark.parametrize("length", [1, 9, 23])
def test_gradients_equal_the_plain_run(length, order, calls, monkeypatch):
    model, inputs = trunk(3), inputs_of(length)
    monkeypatch.setattr(fused_layer, "why_not_fused", lambda *args: None)
    expected = step(model, inputs)
    assert not calls
    for layer_interval, sequence_interval in [(1, 4), (2, 3), (3, 100)]:
        grid = enable_multi_axis_checkpointing(copy.deepcopy(model), layer_interval, sequence_interval, order=order)
        assert_same(step(grid, inputs), expected)
        assert calls
        calls.clear()


@pytest.mark.parametrize("order", ["layer-major", "sequence-major"])
@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("options", [{}, {"use_bias": True, "n_groups": 2}], ids=str)
def test_gradients_equal_the_plain_run_of_a_padded_batch(options, mask, order, calls, monkeypatch):
    model, inputs = trunk(3, **options), inputs_of(21, len(mask))
    monkeypatch.setattr(fused_layer, "why_not_fused", lambda *args: None)
    expected = step(model, inputs, mask)
    assert not calls
    for layer_interval, sequence_interval in [(1, 9), (2, 3), (3, 100)]:
        grid = enable_multi_axis_checkpointing(copy.deepcopy(model), layer_interval, sequence_interval, order=order)
        assert_same(step(grid, inputs, mask), expected)
        with_padding = len(calls)
        calls.clear()
        step(grid, inputs)
        assert with_padding == len(calls) > 0  # all segments run in the kernel
        calls.clear()
