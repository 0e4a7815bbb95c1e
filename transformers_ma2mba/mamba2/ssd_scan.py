"""The Mamba-2 scan (arXiv:2405.21060, §6) in plain PyTorch, with a backward of its own: fast, in bounded memory.

Transformers' own fallback repeats B and C for every head, and autograd keeps several matrices of tokens times chunk
per head for the backward. Here the heads of a group share C Bᵀ, and both passes hold the activations of one span, a
few hundred tokens, at a time. The backward computes them again: autograd keeps the inputs and a state per span.

For one head and one tile of Q tokens, let h be the state before the tile and h' the state after it, let i, j and k
count tokens, and let

    a_k = dt_k A,  s_i = a_1 + … + a_i,  L_ij = exp(s_i - s_j) for j ≤ i and 0 for j > i,  u_j = dt_j x_j.

The steps of the scan are then, in the order of the paper:

1. outputs from the tile's own tokens: y_i = Σ_j (C_i·B_j) L_ij u_j + D x_i;
2. the states' inputs: w_j = exp(s_Q - s_j) u_j;
3. the recurrence from tile to tile: h' = exp(s_Q) h + Σ_j B_j w_jᵀ;
4. outputs from the state: y_i += exp(s_i) hᵀ C_i.

To `torch.compile`, forward and backward are one operator each: it does not unroll the loops over tokens, and one graph
serves every length.

Shape suffixes: B batch, T tokens, H heads, P channels of a head, G groups, N state size, K heads of a group,
C tiles of a span, Q tokens of a tile (twice in matrices of target and source tokens), S spans.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# The result does not depend on the tile. Work on pairs of tokens grows with it, and work on states falls;
# `benchmarks/scan.py --tile` measures the optimum.
TILE = {"cpu": 64, "other": 128}
TILES_PER_SPAN = 8
# A span takes as many rows of the batch as keep each of its activations below this size, and at least one row.
ELEMENTS_PER_SPAN = {"cpu": 1 << 20, "other": 1 << 24}


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
    """Run the state-space scan of Mamba-2, with the signature of Transformers' `mamba2_chunk_scan`.

    For every head, `state_t = exp(dt_t A) state_{t-1} + dt_t hidden_states_t B_tᵀ` and
    `y_t = state_t C_t + D hidden_states_t` (arXiv:2405.21060, §6). The scan computes in float64 if `hidden_states` is
    float64, else in float32.

    Args:
        hidden_states: `(batch_size, sequence_length, num_heads, head_dim)`.
        dt: `(batch_size, sequence_length, num_heads)`, step sizes before bias, softplus and limit.
        A: `(num_heads,)`, negative.
        B, C: `(batch_size, sequence_length, num_groups, state_size)`.
        chunk_size: ignored, because the scan chooses its own tile, on which the result does not depend.
        D: `(num_heads,)`, zero if not given.
        dt_bias: `(num_heads,)`, added to `dt`, zero if not given.
        initial_states: `(batch_size, num_heads, head_dim, state_size)`, zero if not given.
        dt_softplus: whether `dt + dt_bias` goes through softplus.
        dt_limit: the smallest and the largest step size.
        return_final_states: whether to return the state after the last token as well.
        kwargs: other arguments of `mamba2_chunk_scan`. Those that would change the result are refused.

    Returns:
        The output, `(batch_size, sequence_length, num_heads, head_dim)`, in the type that the scan computes in. With
        `return_final_states`, also the final state, `(batch_size, num_heads, head_dim, state_size)`.

    Raises:
        ValueError: for a gate `z` or packed sequences, which the scan does not support, and for shapes that do not
            match.
    """
    tensors = {"dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias, "initial_states": initial_states}
    _check_arguments(hidden_states, tensors, kwargs)
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    # Autograd differentiates these operations: their tensors are small beside the rest.
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
        state_BGNKP = state.unflatten(1, (B.shape[2], -1)).permute(0, 1, 4, 2, 3)
    inputs = (hidden_states, dt, A.to(dtype), B, C, None if D is None else D.to(dtype), state_BGNKP)
    in_graph, num_starts = torch.compiler.is_compiling(), 0
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        num_starts = _num_spans(hidden_states.shape[1], TILE[_kind(hidden_states.device)])
        # Without an initial state, the first span's is zero and need not be kept. A graph has room for it all the
        # same, because torch.compile would make another graph for a count that is zero.
        if state_BGNKP is None and not in_graph:
            num_starts -= 1
    y, final_BGNKP, _ = (_scan_operator if in_graph else _Scan.apply)(*inputs, return_final_states, num_starts)
    if not return_final_states:
        return y
    return y, final_BGNKP.permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()


def _check_arguments(hidden_states: torch.Tensor, tensors: dict[str, torch.Tensor | None], kwargs: dict) -> None:
    if kwargs.get("z") is not None:
        raise ValueError("ssd_scan has no gate: multiply its output by silu(z) instead of passing z.")
    if kwargs.get("seq_idx") is not None or kwargs.get("cu_seqlens") is not None:
        raise ValueError("ssd_scan cannot separate packed sequences: pad them, or install mamba-ssm.")
    if hidden_states.numel() == 0:
        raise ValueError(
            f"ssd_scan needs at least one token; got hidden_states of shape {tuple(hidden_states.shape)}."
        )
    batch_size, sequence_length, num_heads, head_dim = hidden_states.shape
    num_groups, state_size = tensors["B"].shape[2:]
    if num_heads % num_groups:
        raise ValueError(f"{num_heads} heads cannot be divided among {num_groups} groups of B and C.")
    shapes = {
        "dt": (batch_size, sequence_length, num_heads),
        "B": (batch_size, sequence_length, num_groups, state_size),
        "C": (batch_size, sequence_length, num_groups, state_size),
        "initial_states": (batch_size, num_heads, head_dim, state_size),
    }
    for name, tensor in tensors.items():
        shape = shapes.get(name, (num_heads,))
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} to match hidden_states of shape {tuple(hidden_states.shape)}; "
                f"got {tuple(tensor.shape)}."
            )


def _no_autocast(device: torch.device):
    return torch.autocast(device.type if torch.amp.is_autocast_available(device.type) else "cpu", enabled=False)


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "other"


def _num_spans(sequence_length: int, tile: int) -> int:
    """Count the spans that `_spans` makes of a sequence, without a branch, so that a graph serves every length."""
    whole, left_over = sequence_length // tile, sequence_length % tile
    return (whole + TILES_PER_SPAN - 1) // TILES_PER_SPAN + (left_over + tile - 1) // tile


def _spans(hidden_states_BTHP: torch.Tensor) -> list[list[tuple[slice, slice, int]]]:
    """Cut a batch into spans: for some rows at a time, each span's rows, tokens and number of tiles, in order of time.

    The last tokens, if too few for a tile, are a span of one shorter tile, so that nothing needs padding.
    """
    batch_size, sequence_length, num_heads, head_dim = hidden_states_BTHP.shape
    kind = _kind(hidden_states_BTHP.device)
    tile = TILE[kind]
    span = tile * TILES_PER_SPAN
    full = sequence_length - sequence_length % tile
    times = [(slice(start, min(start + span, full)), tile) for start in range(0, full, span)]
    if full < sequence_length:
        times.append((slice(full, sequence_length), sequence_length - full))
    rows = ELEMENTS_PER_SPAN[kind] // (num_heads * max(head_dim, tile) * min(span, sequence_length))
    rows = min(max(rows, 1), batch_size)
    return [
        [(slice(row, row + rows), time, (time.stop - time.start) // length) for time, length in times]
        for row in range(0, batch_size, rows)
    ]


def _in_tiles(tensor_BTH_: torch.Tensor, where: tuple[slice, slice, int], num_groups: int) -> torch.Tensor:
    """View the span of a `(B, T, H, ...)` tensor as `(B, C, Q, G, K, ...)`."""
    rows, time, tiles = where
    return tensor_BTH_[rows, time].unflatten(1, (tiles, -1)).unflatten(3, (num_groups, -1))


def _by_head(tensor_BTH_: torch.Tensor, where: tuple[slice, slice, int], num_groups: int, dtype: torch.dtype):
    """Copy the span of a `(B, T, H, ...)` tensor into a contiguous `(B, C, G, K, Q, ...)` one."""
    return _in_tiles(tensor_BTH_, where, num_groups).movedim(2, 4).to(dtype).contiguous()


def _decay(exponents: torch.Tensor) -> torch.Tensor:
    """Apply `exp` in place, and set results below 1e-28 (in float64, 1e-230) to zero.

    Products of smaller ones would soon be subnormal numbers, with which processors are slower by an order of
    magnitude, in `exp` and in matrix products alike.
    """
    least = 0.75 * math.log(torch.finfo(exponents.dtype).tiny)
    return torch.threshold_(exponents.clamp_(min=least - 1).exp_(), math.exp(least), 0.0)


class _Span:
    """The tensors of one span that both forward and backward compute from the inputs."""

    def __init__(self, where, hidden_states, dt, A, B, C):
        dtype, num_groups = dt.dtype, B.shape[2]
        self.x_BCGKQP = _by_head(hidden_states, where, num_groups, dtype)
        self.dt_BCGKQ = _by_head(dt, where, num_groups, dtype)
        self.B_BCGQN = _by_head(B, where, num_groups, dtype).squeeze(3)
        self.C_BCGQN = _by_head(C, where, num_groups, dtype).squeeze(3)

        # s_i, in float64 because differences of these sums lose digits where decay is strong.
        wide = torch.float32 if dt.device.type == "mps" else torch.float64
        sums = (self.dt_BCGKQ.to(wide) * A.to(wide).view(num_groups, -1, 1)).cumsum(-1)
        self.sums_BCGKQ = sums
        self.decay_in_BCGQK1 = _decay(sums.to(dtype, copy=True)).transpose(-1, -2)[..., None]  # exp(s_i)
        self.decay_out_BCGKQ = _decay((sums[..., -1:] - sums).to(dtype))  # exp(s_Q - s_j)
        self.decay_BCG1K1 = _decay(sums[..., -1].to(dtype, copy=True))[:, :, :, None, :, None]  # exp(s_Q)

    def decays_between(self) -> torch.Tensor:
        """L, `(B, C, G, K, Q, Q)`."""
        sums = self.sums_BCGKQ
        exponents = (sums[..., :, None] - sums[..., None, :]).to(self.x_BCGKQP.dtype)
        # Masked before exp, which might overflow.
        future = torch.full(exponents.shape[-2:], -torch.inf, dtype=exponents.dtype, device=exponents.device).triu(1)
        return _decay(exponents.add_(future))

    def written(self) -> torch.Tensor:
        """Step 2: w, `(B, C, G, Q, K, P)`."""
        weights_BCGKQ = self.decay_out_BCGKQ * self.dt_BCGKQ
        x_BCGQKP = self.x_BCGKQP.transpose(3, 4)
        written_BCGQKP = torch.empty(x_BCGQKP.shape, dtype=x_BCGQKP.dtype, device=x_BCGQKP.device)
        return torch.mul(x_BCGQKP, weights_BCGKQ.transpose(3, 4)[..., None], out=written_BCGQKP)

    def states(self, state_BGNKP: torch.Tensor | None, w_BCGQKP: torch.Tensor, end_BGNKP: torch.Tensor | None = None):
        """Step 3: the state before each tile, `(B, C, G, N, K, P)`, and the state after the last, as `_run` does."""
        added = self.B_BCGQN.transpose(-1, -2) @ w_BCGQKP.flatten(-2)
        return _run(added.unflatten(-1, w_BCGQKP.shape[-2:]), self.decay_BCG1K1, state_BGNKP, end_BGNKP)


def _run(added_BCGNKP, decay_BCG1K1, state_BGNKP, after_BGNKP=None, reverse: bool = False):
    """Run `state = decay * state + added` from tile to tile, or with `reverse` from the last tile to the first.

    Returns:
        The state before each tile in that order, and the state after all tiles, written to `after_BGNKP` if given.
    """
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
    """`(B, G, N, K, P)`: in this order, one matrix product reads or writes the states of all heads of a group."""
    batch_size, _, num_heads, head_dim = hidden_states.shape
    num_groups, state_size = B.shape[2:]
    return batch_size, num_groups, state_size, num_heads // num_groups, head_dim


def _outputs(hidden_states, dt, B, return_final_states: bool, num_starts: int):
    """Allocate the tensors that `_forward` writes; without `return_final_states`, the final state has no elements."""
    y = dt.new_empty(hidden_states.shape)
    final_BGNKP = dt.new_empty(_state_shape(hidden_states, B) if return_final_states else 0)
    # The starts have one dimension, which torch.compile knows not to be 0 or 1: for these it would make other graphs.
    return y, final_BGNKP, dt.new_empty(num_starts * math.prod(_state_shape(hidden_states, B)))


def _each_start(starts, hidden_states, B):
    """View the starts of `_outputs` as `(S, B, G, N, K, P)`: the states before the last S spans."""
    state_shape = _state_shape(hidden_states, B)
    return starts.view(starts.numel() // math.prod(state_shape), *state_shape)


def _forward(hidden_states, dt, A, B, C, D, state, return_final_states, num_starts):
    """Compute the outputs, the final state, and the states before the last `num_starts` spans.

    `dt` is the final step size, and `num_starts` is the number of spans, that number less one, or zero.
    """
    num_groups = B.shape[2]
    y, final_BGNKP, starts = _outputs(hidden_states, dt, B, return_final_states, num_starts)
    starts_SBGNKP = _each_start(starts, hidden_states, B)
    with _no_autocast(dt.device):
        for spans in _spans(hidden_states):
            rows = spans[0][0]
            state_BGNKP = None if state is None else state[rows]
            if num_starts == len(spans):
                # A copy, because caches update their states in place, and the backward needs this one.
                starts_SBGNKP[0, rows] = 0 if state is None else state_BGNKP
            for index, where in enumerate(spans):
                last = index + 1 == len(spans)
                span = _Span(where, hidden_states, dt, A, B, C)

                # 1. y_i = Σ_j (C_i·B_j) L_ij dt_j x_j + D x_i
                scores = span.decays_between().mul_((span.C_BCGQN @ span.B_BCGQN.transpose(-1, -2)).unsqueeze(3))
                scores.mul_(span.dt_BCGKQ.unsqueeze(-2))
                if D is not None:
                    scores.diagonal(dim1=-2, dim2=-1).add_(D.view(num_groups, -1, 1))
                y_BCGQKP = (scores @ span.x_BCGKQP).transpose(3, 4)
                del scores

                # 2. w_j = exp(s_Q - s_j) dt_j x_j
                # 3. h' = exp(s_Q) h + Σ_j B_j w_jᵀ
                reads = where[2] > 1 or state_BGNKP is not None
                writes = return_final_states or not last
                if reads or writes:
                    end_BGNKP = None
                    if last and return_final_states:
                        end_BGNKP = final_BGNKP[rows]
                    elif not last and num_starts:
                        end_BGNKP = starts_SBGNKP[index + 1 - len(spans), rows]
                    h_BCGNKP, state_BGNKP = span.states(state_BGNKP, span.written(), end_BGNKP)

                # 4. y_i += exp(s_i) hᵀ C_i
                target_BCGQKP = _in_tiles(y, where, num_groups).movedim(2, 3)
                if reads:
                    read_BCGQKP = (span.C_BCGQN @ h_BCGNKP.flatten(-2)).view(y_BCGQKP.shape)
                    torch.addcmul(y_BCGQKP, read_BCGQKP, span.decay_in_BCGQK1, out=target_BCGQKP)
                else:
                    target_BCGQKP.copy_(y_BCGQKP)
    return y, final_BGNKP, starts


def _backward(hidden_states, dt, A, B, C, D, starts, has_state, dy, dfinal):
    """Compute the gradients of x, dt, A, B, C, and of D and the initial state if there are any, from the last span on.

    `starts` is the third output of `_forward`. `dy` or `dfinal` is None where the loss does not depend on that output.
    """
    dx, dB, dC = (torch.empty(tensor.shape, dtype=tensor.dtype, device=dt.device) for tensor in (hidden_states, B, C))
    ddt, da = torch.empty_like(dt), torch.empty_like(dt)
    dD = None if D is None else torch.zeros_like(D)
    if dy is None:
        dy = torch.zeros((), dtype=dt.dtype, device=dt.device).expand(hidden_states.shape)
    starts_SBGNKP = _each_start(starts, hidden_states, B)
    dstate = torch.empty_like(starts_SBGNKP[0]) if has_state else None
    with _no_autocast(dt.device):
        for spans in _spans(hidden_states):
            rows = spans[0][0]
            dstate_BGNKP = None if dfinal is None else dfinal[rows]
            for index, where in reversed(list(enumerate(spans))):
                start_BGNKP = starts_SBGNKP[index - len(spans), rows] if index > 0 or has_state else None
                dstate_BGNKP = _backward_of_span(
                    where, (hidden_states, dt, A, B, C), D, start_BGNKP, dy, dstate_BGNKP, (dx, ddt, da, dB, dC, dD)
                )
            if dstate is not None:
                dstate[rows] = dstate_BGNKP
        # 6. The exponents, a_k = dt_k A: ddt_k += A da_k; dA = Σ_k dt_k da_k.
        ddt.addcmul_(da, A)
        dA = (da * dt).sum((0, 1))
    gradients = [dx, ddt, dA, dB, dC, dD, dstate]
    return [gradient for gradient in gradients if gradient is not None]


def _backward_of_span(where, inputs, D, start_BGNKP, dy, dend_BGNKP, gradients):
    """Write the gradients of one span into `gradients`.

    Symbols and steps 1 to 4 are those of the module's docstring, and dz is the gradient of the loss with respect to z.
    Gradients of B and C are also sums over the heads of a group.

    Args:
        where: an item of `_spans`.
        inputs: x, dt, A, B and C of all spans.
        start_BGNKP: the state before the span; None for zeros.
        dy: `(B, T, H, P)`, of all spans.
        dend_BGNKP: the gradient of the state after the span; None for zeros.
        gradients: of x, dt as a factor of u, a, B and C, in all spans, and of D, the sum over the spans so far.

    Returns:
        The gradient of the state before the span; None if that state is zero and the span has a single tile.
    """
    num_groups = inputs[3].shape[2]
    span = _Span(where, *inputs)
    x_BCGKQP, dt_BCGKQ, C_BCGQN, B_BCGQN = span.x_BCGKQP, span.dt_BCGKQ, span.C_BCGQN, span.B_BCGQN
    dy_BCGKQP = _by_head(dy, where, num_groups, dt_BCGKQ.dtype)

    # 1. Outputs from the tile's own tokens, y_i = Σ_j (C_i·B_j) L_ij u_j:
    #    du_j = Σ_i (C_i·B_j) L_ij dy_i
    decays_BCGKQQ = span.decays_between()
    products_BCG1QQ = (C_BCGQN @ B_BCGQN.transpose(-1, -2)).unsqueeze(3)
    du_BCGKQP = (decays_BCGKQQ * products_BCG1QQ).transpose(-1, -2) @ dy_BCGKQP
    #    M_ij = L_ij (dy_i·u_j); dC_i = Σ_j M_ij B_j; dB_j = Σ_i M_ij C_i
    M_BCGKQQ = dy_BCGKQP @ (x_BCGKQP * dt_BCGKQ[..., None]).transpose(-1, -2)
    M_BCGKQQ.mul_(decays_BCGKQQ)
    M_BCGQQ = M_BCGKQQ.sum(3)
    dC_BCGQN = M_BCGQQ @ B_BCGQN
    dB_BCGQN = M_BCGQQ.transpose(-1, -2) @ C_BCGQN
    #    da_k = Σ_{j<k≤i} (C_i·B_j) M_ij, as L_ij = exp(a_{j+1} + … + a_i)
    da_BCGKQ = _crossing_sums(M_BCGKQQ.mul_(products_BCG1QQ))
    del decays_BCGKQQ, M_BCGKQQ

    # A span of one tile may start without a state and end in one that nothing reads.
    dstart_BGNKP, reads = None, where[2] > 1 or start_BGNKP is not None
    if reads or dend_BGNKP is not None:
        w_BCGQKP = span.written()
        if reads:
            h_BCGNKP = span.states(start_BGNKP, w_BCGQKP)[0]
            # 4. Outputs from the state, y_i += exp(s_i) hᵀ C_i, with r_i = exp(s_i) dy_i:
            #    dC_i += h r_i; da_k += Σ_{i≥k} (hᵀ C_i)·r_i; dh = Σ_i C_i r_iᵀ
            r_BCGQKP = (dy_BCGKQP.transpose(3, 4) * span.decay_in_BCGQK1).contiguous()
            dC_BCGQN += r_BCGQKP.flatten(-2) @ h_BCGNKP.flatten(-2).transpose(-1, -2)
            read_BCGQKP = (C_BCGQN @ h_BCGNKP.flatten(-2)).view(r_BCGQKP.shape)
            by_target_BCGKQ = read_BCGQKP.mul_(r_BCGQKP).sum(-1).transpose(-1, -2)
            da_BCGKQ += by_target_BCGKQ.flip(-1).cumsum(-1).flip(-1)
            dh_BCGNKP = (C_BCGQN.transpose(-1, -2) @ r_BCGQKP.flatten(-2)).view(h_BCGNKP.shape)
            # 3. The recurrence, h' = exp(s_Q) h + Σ_j B_j w_jᵀ, in reverse from tile to tile:
            #    dh += exp(s_Q) dh'; da_k += exp(s_Q) ⟨h, dh'⟩
            dnext_BCGNKP, dstart_BGNKP = _run(dh_BCGNKP, span.decay_BCG1K1, dend_BGNKP, reverse=True)
            kept_BCG1K1 = h_BCGNKP.mul_(dnext_BCGNKP).sum(3, keepdim=True).sum(-1, keepdim=True)
            da_BCGKQ += (kept_BCG1K1 * span.decay_BCG1K1)[:, :, :, 0]
        else:
            dnext_BCGNKP = dend_BGNKP.unsqueeze(1)
        # 2. States from the tile's tokens, w_j = exp(s_Q - s_j) u_j:
        #    dB_j += dh' w_j; dw_j = dh'ᵀ B_j; du_j += exp(s_Q - s_j) dw_j; da_k += Σ_{j<k} w_j·dw_j
        dB_BCGQN += w_BCGQKP.flatten(-2) @ dnext_BCGNKP.flatten(-2).transpose(-1, -2)
        dw_BCGQKP = (B_BCGQN @ dnext_BCGNKP.flatten(-2)).view(w_BCGQKP.shape)
        du_BCGKQP.addcmul_(dw_BCGQKP.transpose(3, 4), span.decay_out_BCGKQ[..., None])
        by_source_BCGKQ = dw_BCGQKP.mul_(w_BCGQKP).sum(-1).transpose(-1, -2)
        da_BCGKQ[..., 1:] += by_source_BCGKQ.cumsum(-1)[..., :-1]

    # 5. Inputs, u_j = dt_j x_j, and D in y_j += D x_j:
    #    ddt_j = x_j·du_j; dx_j = dt_j du_j + D dy_j; dD = Σ_j x_j·dy_j
    ddt_BCGKQ = (x_BCGKQP * du_BCGKQP).sum(-1)
    dx_BCGKQP = du_BCGKQP.mul_(dt_BCGKQ[..., None])
    *gradients, dD = gradients
    if D is not None:
        dx_BCGKQP.addcmul_(dy_BCGKQP, D.view(num_groups, -1, 1, 1))
        dD += (x_BCGKQP * dy_BCGKQP).sum((-1, -2)).sum((0, 1)).flatten()
    of_span = (dx_BCGKQP, ddt_BCGKQ, da_BCGKQ, dB_BCGQN.unsqueeze(3), dC_BCGQN.unsqueeze(3))
    for whole, part in zip(gradients, of_span, strict=True):
        _in_tiles(whole, where, num_groups).copy_(part.movedim(4, 2))
    return dstart_BGNKP


def _crossing_sums(products_BCGKQQ: torch.Tensor) -> torch.Tensor:
    """For each token k, sum the products of all pairs of a target i and a source j with j < k ≤ i: `(B, C, G, K, Q)`.

    Sums of whole rows less sums of whole columns would give the same for less work. But pairs on one side of the token
    would have to cancel out, and where decay is strong, these are so much larger that float32 would lose the result.
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
    """Return a gradient or None for each input of `_forward`; its last two inputs are settings."""
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


# The same as operators, for graphs only: outside a graph, PyTorch's Python around an operator would take 6% of the
# scan's time in a training step of the demo.
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
