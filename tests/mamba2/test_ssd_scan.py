"""The scan against its recurrence, token by token in float64, and against Transformers' own."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from comparison import LargestTensor
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCABULARY, tiny_text_config
from torch.testing import assert_close
from transformers import Mamba2Model
from transformers.models.mamba2 import modeling_mamba2

from transformers_ma2mba.mamba2 import kernel_choice
from transformers_ma2mba.mamba2 import ssd_scan as module
from transformers_ma2mba.mamba2.ssd_scan import ssd_scan

EXACT = dict(rtol=1e-10, atol=1e-10)  # float64 throughout, values around one
ROUNDED = 2e-5  # relative to a tensor's largest value: float32 rounds in two ways, through two layers


def stock_scan():
    """Return Transformers' own scan, also while a model holds the dispatchers."""
    return inspect.unwrap(modeling_mamba2.mamba2_chunk_scan)


def naive_scan(
    hidden_states, dt, A, B, C, D=None, dt_bias=None, initial_states=None, dt_softplus=True, dt_limit=(0, 1e9)
):
    """Compute outputs and final state by the recurrence itself."""
    batch_size, sequence_length, num_heads, head_dim = hidden_states.shape
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    B, C = (tensor.repeat_interleave(num_heads // tensor.shape[2], dim=2) for tensor in (B, C))
    state = initial_states
    if state is None:
        state = hidden_states.new_zeros(batch_size, num_heads, head_dim, B.shape[-1])
    outputs = []
    for t in range(sequence_length):
        written = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], hidden_states[:, t], B[:, t])
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + written
        output = torch.einsum("bhpn,bhn->bhp", state, C[:, t])
        outputs.append(output if D is None else output + D[:, None] * hidden_states[:, t])
    return torch.stack(outputs, 1), state


def random_inputs(
    length, batch_size=2, heads=4, head_dim=3, groups=1, state_size=5, dtype=torch.float64, optional=True, decay=1.0
):
    """Make inputs like the mixer's: slices of the output of a convolution over time."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    widths = [heads * head_dim, groups * state_size, groups * state_size]
    hidden_states, B, C = normal(batch_size, sum(widths), length + 3)[..., :length].transpose(1, 2).split(widths, -1)
    inputs = dict(
        hidden_states=hidden_states.unflatten(-1, (heads, head_dim)),
        dt=normal(batch_size, length, heads),
        A=-decay * torch.arange(1, heads + 1).to(dtype),
        B=B.unflatten(-1, (groups, state_size)),
        C=C.unflatten(-1, (groups, state_size)),
    )
    if optional:
        inputs |= dict(
            D=normal(heads), dt_bias=normal(heads) - 2, initial_states=normal(batch_size, heads, head_dim, state_size)
        )
    return {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}


def with_gradients(scan, inputs, use=("y", "state"), **options):
    """Return output, final state and the gradients of all inputs, for the same output gradients with every scan."""
    if scan is not naive_scan:
        options |= dict(chunk_size=8, return_final_states=True, dt_softplus=options.get("dt_softplus", True))
    y, state = scan(**inputs, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for tensor in (y, state)]
    chosen = [(t, w) for t, w, name in zip((y, state), weights, ("y", "state"), strict=True) if name in use]
    loss = sum((tensor * weight.to(tensor.dtype)).sum() for tensor, weight in chosen)
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    # If the loss uses only the state, inputs of the output alone have no gradient, or zeros.
    gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted.values(), gradients, strict=True)]
    return {"y": y.detach(), "state": state.detach(), **dict(zip(wanted, gradients, strict=True))}


def assert_same(found, expected, **tolerance):
    for name in expected:
        assert_close(found[name], expected[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 8 tokens, spans of 16, so that short sequences have many."""
    monkeypatch.setattr(module, "TILE", {"cpu": 8, "other": 8})
    monkeypatch.setattr(module, "TILES_PER_SPAN", 2)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 17, 53])
def test_exact_at_any_length(small_tiles, length, groups):
    inputs = random_inputs(length, groups=groups)
    assert_same(with_gradients(ssd_scan, inputs), with_gradients(naive_scan, inputs), **EXACT)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 131, 1100])
def test_exact_with_default_tiles(length):
    inputs = random_inputs(length, batch_size=1, heads=2)
    assert_same(with_gradients(ssd_scan, inputs), with_gradients(naive_scan, inputs), **EXACT)


@pytest.mark.parametrize("use", ["y", "state"])
@pytest.mark.parametrize("length", [5, 8, 21, 40])
def test_exact_without_optional_inputs(small_tiles, length, use):
    inputs = random_inputs(length, optional=False)
    assert_same(with_gradients(ssd_scan, inputs, [use]), with_gradients(naive_scan, inputs, [use]), **EXACT)


@pytest.mark.parametrize("optional", ["D", "dt_bias", "initial_states"])
def test_each_option_alone(small_tiles, optional):
    inputs = random_inputs(21)
    inputs = {name: inputs[name] for name in ("hidden_states", "dt", "A", "B", "C", optional)}
    assert_same(with_gradients(ssd_scan, inputs), with_gradients(naive_scan, inputs), **EXACT)


def test_step_sizes_without_softplus_within_a_limit(small_tiles):
    options = dict(dt_softplus=False, dt_limit=(0.1, 0.9))
    inputs = random_inputs(21)
    assert_same(with_gradients(ssd_scan, inputs, **options), with_gradients(naive_scan, inputs, **options), **EXACT)


def test_growing_states(small_tiles):
    inputs = random_inputs(21, decay=-0.2)
    assert_same(with_gradients(ssd_scan, inputs), with_gradients(naive_scan, inputs), **EXACT)


@given(
    length=st.integers(1, 40),
    batch_size=st.integers(1, 3),
    groups=st.integers(1, 3),
    heads_per_group=st.integers(1, 3),
    head_dim=st.integers(1, 4),
    state_size=st.integers(1, 4),
    tile=st.integers(1, 12),
    tiles_per_span=st.integers(1, 3),
    elements_per_span=st.sampled_from([1, 1000, 10**6]),
    optional=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_exact_for_any_shape(
    length,
    batch_size,
    groups,
    heads_per_group,
    head_dim,
    state_size,
    tile,
    tiles_per_span,
    elements_per_span,
    optional,
):
    inputs = random_inputs(
        length, batch_size, groups * heads_per_group, head_dim, groups, state_size, optional=optional
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "TILE", {"cpu": tile})
        monkeypatch.setattr(module, "TILES_PER_SPAN", tiles_per_span)
        monkeypatch.setattr(module, "ELEMENTS_PER_SPAN", {"cpu": elements_per_span})
        found = with_gradients(ssd_scan, inputs)
    assert_same(found, with_gradients(naive_scan, inputs), **EXACT)


def test_nothing_is_read_before_it_is_written(small_tiles):
    inputs = random_inputs(53)
    expected = with_gradients(ssd_scan, inputs)
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        assert torch.empty(1).isnan()
        assert_same(with_gradients(ssd_scan, inputs), expected, rtol=0, atol=0)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["hidden_states", "dt", "A", "B", "C", "D", "dt_bias", "initial_states"])
def test_gradient_of_one_input_alone(small_tiles, name):
    inputs = random_inputs(21)
    expected = with_gradients(ssd_scan, inputs)
    found = with_gradients(
        ssd_scan, {key: value.detach().requires_grad_(key == name) for key, value in inputs.items()}
    )
    assert set(found) == {"y", "state", name}
    assert_close(found[name], expected[name], rtol=0, atol=0)


def errors(found, expected):
    """Return the largest error of each tensor, relative to its largest value."""
    return {name: ((found[name] - expected[name]).abs().max() / expected[name].abs().max()).item() for name in found}


@pytest.mark.parametrize("decay", [1e-3, 0.1, 1, 10, 100], ids="decay {}".format)
@pytest.mark.parametrize("groups", [1, 2], ids="{} groups".format)
def test_float32_is_as_accurate_as_stock(groups, decay):
    inputs = random_inputs(300, head_dim=8, groups=groups, state_size=16, dtype=torch.float32, decay=decay)
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    truth = with_gradients(naive_scan, wide)
    stock = with_gradients(stock_scan(), inputs)
    found = with_gradients(ssd_scan, inputs)
    assert_same(found, stock, rtol=1e-3, atol=1e-3)
    ours, theirs = errors(found, truth), errors(stock, truth)
    for name in truth:
        # One unit in the last place is allowed, because rounding differs.
        assert ours[name] <= 4 * theirs[name] + 1.2e-7, f"{name}: {ours[name]:.1e}, stock {theirs[name]:.1e}"


def test_strong_decay_gives_no_subnormal_numbers():
    exponents = torch.linspace(-150, 0, 3001)
    decays = module._decay(exponents.clone())
    kept = decays > 0
    assert decays[kept].min() > 1e-29 and exponents[~kept].max() < -65
    assert_close(decays[kept], exponents[kept].exp())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_computed_in_float32(small_tiles, dtype):
    inputs = random_inputs(21, dtype=dtype)
    wide = {name: tensor.detach().float().requires_grad_() for name, tensor in inputs.items()}
    found, expected = with_gradients(ssd_scan, inputs), with_gradients(ssd_scan, wide)
    for name in ("y", "state"):
        assert_close(found[name], expected[name], rtol=0, atol=0)
    for name, tensor in inputs.items():
        assert_close(found[name], expected[name].to(dtype), rtol=0, atol=0)
        assert found[name].dtype == tensor.dtype


def test_autocast_has_no_effect(small_tiles):
    inputs = random_inputs(21, dtype=torch.float32)
    expected = with_gradients(ssd_scan, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(with_gradients(ssd_scan, inputs), expected, rtol=0, atol=0)


def test_state_overwritten_before_the_backward(small_tiles):
    """Caches overwrite states. With sizes of one, the scan's own layout would need no copy."""
    inputs = random_inputs(21, batch_size=1, heads=1, head_dim=1, state_size=1)
    inputs["initial_states"].requires_grad_(False)
    (expected,) = torch.autograd.grad(ssd_scan(**inputs, chunk_size=8).sum(), inputs["A"])
    y = ssd_scan(**inputs, chunk_size=8)
    inputs["initial_states"].zero_()
    (found,) = torch.autograd.grad(y.sum(), inputs["A"])
    assert_close(found, expected, rtol=0, atol=0)


# In a graph of torch.compile: an operator, and another for its backward.


@pytest.fixture
def as_in_a_graph(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.parametrize("use", [["y"], ["state"], ["y", "state"]], ids=" and ".join)
@pytest.mark.parametrize("optional", [False, True], ids=["required inputs", "all inputs"])
@pytest.mark.parametrize("length", [7, 53])
def test_operator_equals_the_function(small_tiles, as_in_a_graph, length, optional, use, monkeypatch):
    monkeypatch.setattr(module, "ELEMENTS_PER_SPAN", {"cpu": 16 * 4 * 8})  # one row at a time
    inputs = random_inputs(length, groups=2, optional=optional)
    found = with_gradients(ssd_scan, inputs, use)
    monkeypatch.undo()
    monkeypatch.setattr(module, "TILE", {"cpu": 8})
    monkeypatch.setattr(module, "TILES_PER_SPAN", 2)
    monkeypatch.setattr(module, "_scan_operator", None)
    assert_same(found, with_gradients(ssd_scan, inputs, use), **EXACT)
    assert_same(found, with_gradients(naive_scan, inputs, use), **EXACT)


@pytest.mark.parametrize("optional", [False, True], ids=["required inputs", "all inputs"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_operators_pass_pytorchs_checks(small_tiles, as_in_a_graph, monkeypatch, dtype, optional):
    """PyTorch checks shapes, strides, types, aliases and gradients, on the arguments of the scan and of autograd."""
    calls = {}

    def recorded(operator):
        def call(*args):
            calls[operator] = args
            return operator(*args)

        return call

    for name in ("_scan_operator", "_backward_operator"):
        monkeypatch.setattr(module, name, recorded(getattr(module, name)))
    inputs = random_inputs(37, groups=2, dtype=dtype, optional=optional)
    with_gradients(ssd_scan, inputs)
    assert len(calls) == 2
    for operator, args in calls.items():
        torch.library.opcheck(operator, args)


@pytest.mark.parametrize("tile, tiles_per_span", [(1, 1), (4, 1), (4, 3)])
def test_number_of_spans(monkeypatch, tile, tiles_per_span):
    monkeypatch.setattr(module, "TILE", {"cpu": tile})
    monkeypatch.setattr(module, "TILES_PER_SPAN", tiles_per_span)
    for length in range(1, 50):
        (spans,) = module._spans(torch.empty(1, length, 1, 1))
        assert module._num_spans(length, tile) == len(spans)


def test_states_are_kept_for_gradients_only(small_tiles, monkeypatch):
    kept, outputs = [], module._outputs

    def recorded(*args):
        kept.append(outputs(*args)[2].numel())
        return outputs(*args)

    monkeypatch.setattr(module, "_outputs", recorded)
    inputs = random_inputs(53, optional=False)
    with torch.no_grad():
        expected = ssd_scan(**inputs, chunk_size=8)
    assert_close(ssd_scan(**inputs, chunk_size=8), expected, rtol=0, atol=0)
    assert kept == [0, 3 * 2 * 4 * 3 * 5]  # spans after the first, rows, heads, channels, state size


def test_gradients_of_gradients_are_refused():
    inputs = random_inputs(5)
    y = ssd_scan(**inputs, chunk_size=8)
    (gradient,) = torch.autograd.grad(y.square().sum(), inputs["A"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_tensors_kept_for_backward(small_tiles):
    """The inputs, the step sizes, and a state every 16 tokens: nothing as large as pairs of tokens."""
    length, heads, head_dim, state_size = 512, 4, 3, 2
    inputs = random_inputs(length, 1, heads, head_dim, 1, state_size)
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ssd_scan(**inputs, chunk_size=8, dt_softplus=True)
    states = (length // 16) * heads * head_dim * state_size
    steps = 5 * length * heads  # with the bias, after softplus, after the limit, and the limit's masks
    assert states < sum(kept.values()) <= states + steps
    assert max(kept.values()) < length * heads * 8


@pytest.mark.parametrize("batch_size", [1, 4])
def test_no_tensor_is_as_large_as_pairs_of_tokens(small_tiles, monkeypatch, batch_size):
    monkeypatch.setattr(module, "ELEMENTS_PER_SPAN", {"cpu": 16 * 4 * 8})
    inputs = random_inputs(512, batch_size, heads=4, head_dim=2, state_size=2)
    with LargestTensor() as largest:
        with_gradients(ssd_scan, inputs)
    widest = inputs["hidden_states"].untyped_storage().nbytes() // 8
    assert 0 < largest.numel <= widest < 512 * 8 * 4 * batch_size / 2


def test_refuses_unsupported_arguments():
    inputs = random_inputs(5)
    with pytest.raises(ValueError, match="no gate"):
        ssd_scan(**inputs, chunk_size=8, z=inputs["hidden_states"])
    for name in ("seq_idx", "cu_seqlens"):
        with pytest.raises(ValueError, match="packed sequences"):
            ssd_scan(**inputs, chunk_size=8, **{name: torch.zeros(2, 5)})
    with pytest.raises(ValueError, match="at least one token"):
        ssd_scan(**inputs | dict(hidden_states=torch.zeros(2, 0, 4, 3)), chunk_size=8)
    with pytest.raises(ValueError, match="4 heads cannot be divided among 3 groups"):
        ssd_scan(**inputs | dict(B=torch.zeros(2, 5, 3, 5), C=torch.zeros(2, 5, 3, 5)), chunk_size=8)


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "D", "dt_bias", "initial_states"])
def test_error_names_the_tensor_of_the_wrong_shape(name):
    inputs = random_inputs(5)
    inputs[name] = torch.zeros([size + 1 for size in inputs[name].shape])
    with pytest.raises(ValueError, match="must have shape" if name != "B" else "must have shape|heads cannot"):
        ssd_scan(**inputs, chunk_size=8)


def text_model(**options):
    torch.manual_seed(0)
    model = Mamba2Model(tiny_text_config(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.eval()


def run_model(model, input_ids, cache_params=None, **options):
    """Return hidden states, gradients of all parameters, and the states in the cache."""
    model.zero_grad()
    outputs = model(input_ids, cache_params=copy.deepcopy(cache_params), **options)
    hidden_states = outputs.last_hidden_state
    weights = torch.randn(hidden_states.shape, generator=torch.Generator().manual_seed(1))
    (hidden_states * weights).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    if outputs.cache_params is not None:
        for index in range(model.config.num_hidden_layers):
            found[f"state {index}"] = outputs.cache_params.get_recurrent_state(index, state_idx=0).detach()
    return {"hidden_states": hidden_states.detach(), **found}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_model_without_the_keyword_is_unchanged(monkeypatch, training):
    model = text_model().train(training)
    input_ids = torch.arange(2 * 21).view(2, 21) % VOCABULARY
    with monkeypatch.context() as patched:
        patched.setattr(modeling_mamba2, "mamba2_chunk_scan", stock_scan())
        expected = run_model(model, input_ids)
    kernel_choice.hold(model)
    monkeypatch.setattr(kernel_choice, "ssd_scan", None)
    assert_same(run_model(model, input_ids), expected, rtol=0, atol=0)
    assert_same(run_model(model, input_ids, ssd_scan=False), expected, rtol=0, atol=0)


def assert_rounded(found, expected):
    for name in expected:
        limit = ROUNDED * expected[name].abs().max().item()
        assert_close(found[name], expected[name], rtol=0, atol=limit, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def called(monkeypatch):
    """The sequence lengths of all calls of `ssd_scan`."""
    lengths = []

    def counted(hidden_states, *args, **kwargs):
        lengths.append(hidden_states.shape[1])
        return ssd_scan(hidden_states, *args, **kwargs)

    monkeypatch.setattr(kernel_choice, "ssd_scan", counted)
    return lengths


@pytest.mark.parametrize("padding", [0, 5], ids=["no padding", "left padding"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("groups", [1, 2], ids="{} groups".format)
@pytest.mark.parametrize("length, chunk_size", [(1, 8), (21, 8), (67, 32), (131, 64)])
def test_model_with_the_keyword_equals_stock(called, length, chunk_size, groups, training, padding):
    model = text_model(chunk_size=chunk_size, n_groups=groups).train(training)
    kernel_choice.hold(model)
    input_ids = torch.arange(2 * length).view(2, length) % VOCABULARY
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, : min(padding, length - 1)] = 0
    expected = run_model(model, input_ids, attention_mask=attention_mask)
    assert not called
    found = run_model(model, input_ids, attention_mask=attention_mask, ssd_scan=True)
    assert called == [length] * model.config.num_hidden_layers
    assert_rounded(found, expected)


@pytest.mark.parametrize("groups", [1, 2], ids="{} groups".format)
@pytest.mark.parametrize("length", [2, 21])
def test_model_with_a_cache_equals_stock(called, length, groups):
    model = text_model(n_groups=groups)
    kernel_choice.hold(model)
    input_ids = torch.arange(2 * (13 + length)).view(2, -1) % VOCABULARY
    with torch.no_grad():
        cache = model(input_ids[:, :13], use_cache=True).cache_params
    expected = run_model(model, input_ids[:, 13:], cache, use_cache=True)
    assert not called
    found = run_model(model, input_ids[:, 13:], cache, use_cache=True, ssd_scan=True)
    assert called == [length] * model.config.num_hidden_layers
    assert_rounded(found, expected)


def test_signature_is_that_of_transformers_scan():
    assert list(inspect.signature(ssd_scan).parameters) == list(inspect.signature(stock_scan()).parameters)
