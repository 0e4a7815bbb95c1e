"""The Mamba-2 scan (arXiv:2405.21060, §6) in plain PyTorch, with a backward of its own: fast, in bounded memory.

Transformers' own fallback repeats B and C for every head, and autograd keeps several matrices of tokens times chunk
per head for the backward. Here the heads of a group share C Bᵀ, a few hundred tokens are worked on at a time, and the
backward makes anew whatever is as large as that; what is kept are the inputs and a state every few hundred tokens.

To `torch.compile`, forward and backward are operators, each one node of its graph: the loops over tokens are not
unrolled, and one graph serves every length.

Shape suffixes: B batch, T tokens, H heads, P channels of a head, G groups, N state size, K heads of a group,
C tiles of a span, Q tokens of a tile (twice where one stands for the target and one for the source).
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# The result does not depend on how tokens are cut into tiles. Work on pairs of tokens grows with the tile, work on
# states falls with it; `benchmarks/scan.py --tile` measures where they meet.
TILE = {"cpu": 64, "other": 128}
TILES_PER_SPAN = 8
# A span takes as many rows of the batch as keep its activations below this many numbers, and at least one.
NUMBERS_PER_SPAN = {"cpu": 1 << 20, "other": 1 << 24}


def ssd_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The state-space scan of Mamba-2, as Transformers' `mamba2_chunk_scan` means it (arXiv:2405.21060, §6).

    For every head, `state_t = exp(dt_t A) state_{t-1} + dt_t hidden_states_t B_tᵀ` and
    `y_t = state_t C_t + D hidden_states_t`. It computes in float64 if `hidden_states` is float64, else in float32.

    Args:
        hidden_states: `(batch_size, sequence_length, num_heads, head_dim)`.
        dt: `(batch_size, sequence_length, num_heads)`, step sizes; `dt_bias` is added, then softplus, then the limit.
        A: `(num_heads,)`, negative.
        B, C: `(batch_size, sequence_length, num_groups, state_size)`.
        chunk_size: accepted for the stock signature. The result does not depend on it, and the tile is chosen here.
        D, dt_bias: `(num_heads,)`.
        initial_states: `(batch_size, num_heads, head_dim, state_size)`, zero if not given.
        dt_softplus: whether `dt` goes through softplus.
        dt_limit: the least and the greatest step size.
        return_final_states: whether to return the state after the last token as well.

    Returns:
        `(batch_size, sequence_length, num_heads, head_dim)` in the type that it computes in and, if asked for, the
        final state, `(batch_size, num_heads, head_dim, state_size)`.

    Raises:
        ValueError: for a gate `z` or packed sequences, which this form does not know, and for shapes that do not fit.
    """
    if kwargs.get("z") is not None:
        raise ValueError("ssd_scan has no gate: multiply its output by silu(z) instead of passing z.")
    if kwargs.get("seq_idx") is not None or kwargs.get("cu_seqlens") is not None:
        raise ValueError("ssd_scan cannot keep packed sequences apart: pad them, or install mamba-ssm.")
    if hidden_states.numel() == 0:
        raise ValueError(f"ssd_scan needs at least one token; got hidden_states of {tuple(hidden_states.shape)}.")
    batch_size, sequence_length, num_heads, head_dim = hidden_states.shape
    num_groups, state_size = B.shape[2:]
    if num_heads % num_groups:
        raise ValueError(f"{num_heads} heads cannot be shared out among {num_groups} groups of B and C.")
    expected = {
        "dt": (dt, (batch_size, sequence_length, num_heads)),
        "A": (A, (num_heads,)),
        "B": (B, (batch_size, sequence_length, num_groups, state_size)),
        "C": (C, (batch_size, sequence_length, num_groups, state_size)),
        "D": (D, (num_heads,)),
        "dt_bias": (dt_bias, (num_heads,)),
        "initial_states": (initial_states, (batch_size, num_heads, head_dim, state_size)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} to go with hidden_states of shape {tuple(hidden_states.shape)}; "
                f"got {tuple(tensor.shape)}."
            )

    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    # Small next to the rest, so left to autograd.
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    if tuple(dt_limit) != (-float("inf"), float("inf")):
        dt = dt.clamp(*dt_limit)
    state_BGNKP = None
    if initial_states is not None:
        state = initial_states.to(hidden_states.device, dtype)
        state_BGNKP = state.unflatten(1, (num_groups, -1)).permute(0, 1, 4, 2, 3)
    inputs = (hidden_states, dt, A.to(dtype), B, C, None if D is None else D.to(dtype), state_BGNKP)
    in_graph, num_starts = torch.compiler.is_compiling(), 0
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        num_starts = _num_spans(sequence_length, TILE[_kind(hidden_states.device)])
        # Without a state, the first span starts from nothing, and nothing is kept of it. In a graph there is room for
        # it all the same: a number that may be zero would make PyTorch compile a graph for zero alone.
        if state_BGNKP is None and not in_graph:
            num_starts -= 1
    y, final_BGNKP, _ = (_scan_operator if in_graph else _Scan.apply)(*inputs, return_final_states, num_starts)
    if not return_final_states:
        return y
    return y, final_BGNKP.permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()


def _no_autocast(device: torch.device):
    return torch.autocast(device.type if torch.amp.is_autocast_available(device.type) else "cpu", enabled=False)


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "other"


def _num_spans(sequence_length: int, tile: int) -> int:
    """How many spans `_spans` makes of a sequence, without a branch: then torch.compile need not know its length."""
    whole, left_over = sequence_length // tile, sequence_length % tile
    return (whole + TILES_PER_SPAN - 1) // TILES_PER_SPAN + (left_over + tile - 1) // tile


def _spans(hidden_states_BTHP: torch.Tensor) -> list[list[tuple[slice, slice, int]]]:
    """For some rows of the batch at a time: which rows, which tokens, how many tiles, in order of time.

    The tokens left over at the end are a tile of their own, so that nothing needs padding.
    """
    batch_size, sequence_length, num_heads, head_dim = hidden_states_BTHP.shape
    kind = _kind(hidden_states_BTHP.device)
    tile = TILE[kind]
    span = tile * TILES_PER_SPAN
    full = sequence_length - sequence_length % tile
    times = [(slice(start, min(start + span, full)), tile) for start in range(0, full, span)]
    if full < sequence_length:
        times.append((slice(full, sequence_length), sequence_length - full))
    rows = NUMBERS_PER_SPAN[kind] // (num_heads * max(head_dim, tile) * min(span, sequence_length))
    rows = min(max(rows, 1), batch_size)
    return [
        [(slice(row, row + rows), time, (time.stop - time.start) // length) for time, length in times]
        for row in range(0, batch_size, rows)
    ]


def _by_head(tensor_BTH_: torch.Tensor, rows: slice, time: slice, tiles: int, num_groups: int, dtype: torch.dtype):
    """The span of a `(B, T, H, ...)` tensor as a contiguous `(B, C, G, K, Q, ...)` one."""
    tensor = tensor_BTH_[rows, time].unflatten(1, (tiles, -1)).unflatten(3, (num_groups, -1))
    return tensor.movedim(2, 4).to(dtype).contiguous()


def _decay(exponents: torch.Tensor) -> torch.Tensor:
    """`exp` in place, with zero for less than 1e-28 (in float64, 1e-230).

    Below, products soon are subnormal numbers, on which processors are slower by an order of magnitude, in `exp` and
    in the matrix products alike.
    """
    least = 0.75 * math.log(torch.finfo(exponents.dtype).tiny)
    return torch.threshold_(exponents.clamp_(min=least - 1).exp_(), math.exp(least), 0.0)


class _Span:
    """Some tiles of some rows: what both forward and backward make of the inputs."""

    def __init__(self, where, hidden_states, dt, A, B, C):
        rows, time, tiles = where
        dtype, num_groups = dt.dtype, B.shape[2]
        self.x_BCGKQP = _by_head(hidden_states, rows, time, tiles, num_groups, dtype)
        self.dt_BCGKQ = _by_head(dt, rows, time, tiles, num_groups, dtype)
        self.B_BCGQN = _by_head(B, rows, time, tiles, num_groups, dtype).squeeze(3)
        self.C_BCGQN = _by_head(C, rows, time, tiles, num_groups, dtype).squeeze(3)

        # In float64, as differences of these sums are taken, which lose digits where decay is strong.
        wide = torch.float32 if dt.device.type == "mps" else torch.float64
        sums = (self.dt_BCGKQ.to(wide) * A.to(wide).view(num_groups, -1, 1)).cumsum(-1)
        self.sums_BCGKQ = sums
        self.decay_in_BCGQK1 = _decay(sums.to(dtype, copy=True)).transpose(-1, -2)[..., None]
        self.decay_out_BCGKQ = _decay((sums[..., -1:] - sums).to(dtype))
        self.decay_BCG1K1 = _decay(sums[..., -1].to(dtype, copy=True))[:, :, :, None, :, None]

    def decays_between(self) -> torch.Tensor:
        """`exp` of the sum of dt A over the tokens after the source up to the target, zero for sources to come."""
        sums = self.sums_BCGKQ
        exponents = (sums[..., :, None] - sums[..., None, :]).to(self.x_BCGKQP.dtype)
        # Masked before exp, which might overflow.
        future = torch.full(exponents.shape[-2:], -torch.inf, dtype=exponents.dtype, device=exponents.device).triu(1)
        return _decay(exponents.add_(future))

    def written(self) -> torch.Tensor:
        """What every token writes, as it arrives at the end of its tile: `(B, C, G, Q, K, P)`."""
        weights_BCGKQ = self.decay_out_BCGKQ * self.dt_BCGKQ
        x_BCGQKP = self.x_BCGKQP.transpose(3, 4)
        written_BCGQKP = torch.empty(x_BCGQKP.shape, dtype=x_BCGQKP.dtype, device=x_BCGQKP.device)
        return torch.mul(x_BCGQKP, weights_BCGKQ.transpose(3, 4)[..., None], out=written_BCGQKP)

    def states(self, state_BGNKP: torch.Tensor | None, written_BCGQKP: torch.Tensor, end_BGNKP=None):
        """The states in which the tiles start, `(B, C, G, N, K, P)`, and that in which the last of them ends, which is
        written to `end_BGNKP` if given."""
        added = self.B_BCGQN.transpose(-1, -2) @ written_BCGQKP.flatten(-2)
        added_BCGNKP = added.unflatten(-1, written_BCGQKP.shape[-2:])
        return _run(added_BCGNKP, self.decay_BCG1K1, state_BGNKP, end_BGNKP)


def _run(added_BCGNKP, decay_BCG1K1, state_BGNKP, after_BGNKP=None, reverse: bool = False):
    """`state = decay * state + added` from tile to tile: the states before each of them, and that after all, which is
    written to `after_BGNKP` if given."""
    tiles = added_BCGNKP.shape[1]
    before_BCGNKP = torch.empty_like(added_BCGNKP)
    order = list(reversed(range(tiles)) if reverse else range(tiles))
    if state_BGNKP is None:
        before_BCGNKP[:, order[0]].zero_()
    else:
        before_BCGNKP[:, order[0]] = state_BGNKP
    if after_BGNKP is None:
        after_BGNKP = torch.empty_like(added_BCGNKP[:, 0])
    for tile, following in zip(order, order[1:] + [None], strict=True):
        target = after_BGNKP if following is None else before_BCGNKP[:, following]
        torch.addcmul(added_BCGNKP[:, tile], before_BCGNKP[:, tile], decay_BCG1K1[:, tile], out=target)
    return before_BCGNKP, after_BGNKP


def _state_shape(hidden_states, B) -> tuple[int, ...]:
    """`(B, G, N, K, P)`, in which reading and writing states is one matrix product for all heads of a group."""
    batch_size, _, num_heads, head_dim = hidden_states.shape
    num_groups, state_size = B.shape[2:]
    return batch_size, num_groups, state_size, num_heads // num_groups, head_dim


def _outputs(hidden_states, dt, B, return_final_states: bool, num_starts: int):
    """The tensors that `_forward` writes. A final state not wanted is empty, as an operator returns as many always."""
    y = dt.new_empty(hidden_states.shape)
    final_BGNKP = dt.new_empty(_state_shape(hidden_states, B) if return_final_states else 0)
    # In one dimension, of which torch.compile knows that it is neither 0 nor 1: for these it would make other graphs.
    return y, final_BGNKP, dt.new_empty(num_starts * math.prod(_state_shape(hidden_states, B)))


def _each_start(starts, hidden_states, B):
    """`(S, B, G, N, K, P)`: the states in which the last S spans start, as `_outputs` has them in one dimension."""
    state_shape = _state_shape(hidden_states, B)
    return starts.view(starts.numel() // math.prod(state_shape), *state_shape)


def _forward(hidden_states, dt, A, B, C, D, state, return_final_states, num_starts):
    """Outputs, final state, and the states in which the last `num_starts` spans start: all, or all but the first, or
    none. `dt` is the final step size here."""
    num_groups = B.shape[2]
    y, final_BGNKP, starts = _outputs(hidden_states, dt, B, return_final_states, num_starts)
    starts_SBGNKP = _each_start(starts, hidden_states, B)
    with _no_autocast(dt.device):
        for spans in _spans(hidden_states):
            state_BGNKP = None if state is None else state[spans[0][0]]
            if num_starts == len(spans):
                # A copy: caches update their states in place, and the backward needs this one.
                starts_SBGNKP[0, spans[0][0]] = 0 if state is None else state_BGNKP
            for index, where in enumerate(spans):
                rows, time, tiles = where
                last = index + 1 == len(spans)
                span = _Span(where, hidden_states, dt, A, B, C)

                # Within a tile: like attention, masked and decaying, with C for queries, B for keys.
                scores = span.decays_between().mul_((span.C_BCGQN @ span.B_BCGQN.transpose(-1, -2)).unsqueeze(3))
                scores.mul_(span.dt_BCGKQ.unsqueeze(-2))
                if D is not None:
                    scores.diagonal(dim1=-2, dim2=-1).add_(D.view(num_groups, -1, 1))
                y_BCGQKP = (scores @ span.x_BCGKQP).transpose(3, 4)
                del scores

                # From tile to tile, through the state.
                reads = tiles > 1 or state_BGNKP is not None
                writes = return_final_states or not last
                if reads or writes:
                    end_BGNKP = None
                    if last and return_final_states:
                        end_BGNKP = final_BGNKP[rows]
                    elif not last and num_starts:
                        end_BGNKP = starts_SBGNKP[index + 1 - len(spans), rows]
                    states_BCGNKP, state_BGNKP = span.states(state_BGNKP, span.written(), end_BGNKP)
                target = y[rows, time].unflatten(1, (tiles, -1)).unflatten(3, (num_groups, -1)).movedim(2, 3)
                if reads:
                    read = (span.C_BCGQN @ states_BCGNKP.flatten(-2)).view(y_BCGQKP.shape)
                    torch.addcmul(y_BCGQKP, read, span.decay_in_BCGQK1, out=target)
                else:
                    target.copy_(y_BCGQKP)
    return y, final_BGNKP, starts


def _backward(hidden_states, dt, A, B, C, D, starts, has_state, dy, dfinal):
    """Gradients of the first five, of D and of the state if there are any, span by span, the last first."""
    with _no_autocast(dt.device):
        return _backward_without_autocast(hidden_states, dt, A, B, C, D, starts, has_state, dy, dfinal)


def _backward_without_autocast(hidden_states, dt, A, B, C, D, starts, has_state, dy, dfinal):
    num_groups, dtype = B.shape[2], dt.dtype
    if dy is None:
        dy = torch.zeros((), dtype=dtype, device=dt.device).expand(hidden_states.shape)
    dx, dB, dC = (torch.empty(tensor.shape, dtype=tensor.dtype, device=dt.device) for tensor in (hidden_states, B, C))
    # Gradients of the step sizes as factors of what is written, and of the exponents dt A.
    ddt, dexponents = torch.empty_like(dt), torch.empty_like(dt)
    dD = None if D is None else torch.zeros_like(D)
    starts_SBGNKP = _each_start(starts, hidden_states, B)
    dstate = torch.empty_like(starts_SBGNKP[0]) if has_state else None

    for spans in _spans(hidden_states):
        dstate_BGNKP = None if dfinal is None else dfinal[spans[0][0]]
        for index, where in reversed(list(enumerate(spans))):
            rows, time, tiles = where
            start = starts_SBGNKP[index - len(spans), rows] if index > 0 or has_state else None
            span = _Span(where, hidden_states, dt, A, B, C)
            x, dt_BCGKQ, C_BCGQN, B_BCGQN = span.x_BCGKQP, span.dt_BCGKQ, span.C_BCGQN, span.B_BCGQN
            dy_BCGKQP = _by_head(dy, rows, time, tiles, num_groups, dtype)

            # Within a tile.
            decays = span.decays_between()
            between = (C_BCGQN @ B_BCGQN.transpose(-1, -2)).unsqueeze(3)
            dwritten = (decays * between).transpose(-1, -2) @ dy_BCGKQP
            products = dy_BCGKQP @ (x * dt_BCGKQ[..., None]).transpose(-1, -2)
            products.mul_(decays)
            dbetween = products.sum(3)
            dC_BCGQN = dbetween @ B_BCGQN
            dB_BCGQN = dbetween.transpose(-1, -2) @ C_BCGQN
            dexponents_BCGKQ = _crossing_sums(products.mul_(between))
            del decays, products

            # From tile to tile: the states again, from the one that was kept, and their gradients in reverse. If all
            # is one tile, there may be neither.
            reads = tiles > 1 or start is not None
            if reads or dstate_BGNKP is not None:
                written_BCGQKP = span.written()
                if reads:
                    states_BCGNKP = span.states(start, written_BCGQKP)[0]
                    dread_BCGQKP = (dy_BCGKQP.transpose(3, 4) * span.decay_in_BCGQK1).contiguous()
                    dadded = (C_BCGQN.transpose(-1, -2) @ dread_BCGQKP.flatten(-2)).view(states_BCGNKP.shape)
                    dstates_BCGNKP, dstate_BGNKP = _run(dadded, span.decay_BCG1K1, dstate_BGNKP, reverse=True)
                    dC_BCGQN += dread_BCGQKP.flatten(-2) @ states_BCGNKP.flatten(-2).transpose(-1, -2)
                    # What a token reads from the state decayed by all exponents up to its own ...
                    read_BCGQKP = (C_BCGQN @ states_BCGNKP.flatten(-2)).view(dread_BCGQKP.shape)
                    by_target = read_BCGQKP.mul_(dread_BCGQKP).sum(-1).transpose(-1, -2)
                    dexponents_BCGKQ += by_target.flip(-1).cumsum(-1).flip(-1)
                    # ... what stays in the state by those of the whole tile ...
                    kept = states_BCGNKP.mul_(dstates_BCGNKP).sum(3, keepdim=True).sum(-1, keepdim=True)
                    dexponents_BCGKQ += (kept * span.decay_BCG1K1)[:, :, :, 0]
                else:
                    dstates_BCGNKP = dstate_BGNKP.unsqueeze(1)
                # ... and what a token writes by all after its own.
                dB_BCGQN += written_BCGQKP.flatten(-2) @ dstates_BCGNKP.flatten(-2).transpose(-1, -2)
                dend_BCGQKP = (B_BCGQN @ dstates_BCGNKP.flatten(-2)).view(written_BCGQKP.shape)
                dwritten.addcmul_(dend_BCGQKP.transpose(3, 4), span.decay_out_BCGKQ[..., None])
                by_source = dend_BCGQKP.mul_(written_BCGQKP).sum(-1).transpose(-1, -2)
                dexponents_BCGKQ[..., 1:] += by_source.cumsum(-1)[..., :-1]

            ddt_BCGKQ = (x * dwritten).sum(-1)
            dwritten.mul_(dt_BCGKQ[..., None])
            if D is not None:
                dwritten.addcmul_(dy_BCGKQP, D.view(num_groups, -1, 1, 1))
                dD += (x * dy_BCGKQP).sum((-1, -2)).sum((0, 1)).flatten()
            for whole, part in (
                (dx, dwritten),
                (ddt, ddt_BCGKQ),
                (dexponents, dexponents_BCGKQ),
                (dB, dB_BCGQN.unsqueeze(3)),
                (dC, dC_BCGQN.unsqueeze(3)),
            ):
                whole[rows, time].unflatten(1, (tiles, -1)).unflatten(3, (num_groups, -1)).copy_(part.movedim(4, 2))
        if dstate is not None:
            dstate[spans[0][0]] = dstate_BGNKP
    dA = (dexponents * dt).sum((0, 1))
    gradients = [dx, ddt.addcmul_(dexponents, A), dA, dB, dC, dD, dstate]
    return [gradient for gradient in gradients if gradient is not None]


def _crossing_sums(products_BCGKQQ: torch.Tensor) -> torch.Tensor:
    """For every token, the sum over the pairs of a source before it and a target that is not.

    These are the pairs whose decay has the token's exponent. The sum of all rows less that of all columns from there
    on is the same and takes less work, but pairs on one side of the token, which may be larger by far, would have to
    cancel out: where decay is strong, nothing would be left in float32.
    """
    length = products_BCGKQQ.shape[-1]
    ones = torch.ones(length, length, dtype=products_BCGKQQ.dtype, device=products_BCGKQQ.device)
    sums = (products_BCGKQQ.view(-1, length) @ ones.triu(1)).view(products_BCGKQQ.shape)
    return sums.mul_(ones.tril()).sum(-2)


def _keep_for_backward(ctx, inputs, output):
    *tensors, state, _, _ = inputs
    _, _, starts = output
    ctx.has_state = state is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(starts)
    ctx.save_for_backward(*tensors, starts)


def _gradients_of_inputs(ctx, dy, dfinal, backward):
    """One for each tensor that there was, and none for the two settings."""
    saved = ctx.saved_tensors
    gradients = iter(backward(*saved, ctx.has_state, dy, dfinal))
    present = *(tensor is not None for tensor in saved[:6]), ctx.has_state
    return *(next(gradients) if there else None for there in present), None, None


class _Scan(torch.autograd.Function):
    """`_forward`, differentiable by `_backward`."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _keep_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal, _):
        return _gradients_of_inputs(ctx, dy, dfinal, _backward)


# The same again as operators, for graphs. Called without one, they would take their time: PyTorch's Python around an
# operator is 6% of a training step's scan in the demo.
@torch.library.custom_op(
    "transformers_ma2mba::ssd_scan",
    mutates_args=(),
    schema="(Tensor hidden_states, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? state, "
    "bool return_final_states, SymInt num_starts) -> (Tensor, Tensor, Tensor)",
)
def _scan_operator(*inputs):
    return _forward(*inputs)


@_scan_operator.register_fake
def _(hidden_states, dt, A, B, C, D, state, return_final_states, num_starts):
    return _outputs(hidden_states, dt, B, return_final_states, num_starts)


@torch.library.custom_op(
    "transformers_ma2mba::ssd_scan_backward",
    mutates_args=(),
    schema="(Tensor hidden_states, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor starts, bool has_state, "
    "Tensor? dy, Tensor? dfinal) -> Tensor[]",
)
def _backward_operator(*inputs):
    return _backward(*inputs)


@_backward_operator.register_fake
def _(hidden_states, dt, A, B, C, D, starts, has_state, dy, dfinal):
    gradients = [t.new_empty(t.shape) for t in (hidden_states, dt, A, B, C, D) if t is not None]
    if has_state:
        gradients.append(dt.new_empty(_state_shape(hidden_states, B)))
    return gradients


def _operator_backward(ctx, dy, dfinal, _):
    return _gradients_of_inputs(ctx, dy, dfinal, _backward_operator)


_scan_operator.register_autograd(_operator_backward, setup_context=_keep_for_backward)
