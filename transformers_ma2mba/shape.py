"""The dimensions of a Mamba-2, and how its sequences are cut.

Six words say of what a part is cut, each of one thing alone:

- *segment*: consecutive tokens that go through the layers by themselves, their state carried on to the next segment.
- *cell*: some layers times a segment, which MA-GC restores at a time (paper §3.2).
- *chunk*: the tokens that a kernel relates pairwise, `chunk_size` of the configuration.
- *tile*: the same for [`ssd_scan`], which chooses its own size.
- *span*: the tiles that [`ssd_scan`] holds at a time.
- *piece*: as much of anything else as memory allows at a time, such as frames in the vision tower.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

_INDEXABLE = 2**31  # elements of a tensor that kernels with 32-bit offsets can tell apart


class Mamba2Shape(NamedTuple):
    """The dimensions of a Mamba-2 (arXiv:2405.21060, §7; arXiv:2411.19460, Table 7), each with its symbol there."""

    num_hidden_layers: int  # L
    width: int  # D, `hidden_size`
    inner: int  # E, `expand * hidden_size`
    num_heads: int  # H
    head_dim: int  # P
    state_size: int  # N
    n_groups: int  # G, each with a B and a C of its own
    conv_kernel: int  # K, in tokens
    chunk_size: int  # Q, in tokens
    use_bias: bool
    use_conv_bias: bool
    residual_in_fp32: bool
    vocab_size: int  # V

    @classmethod
    def of(cls, config) -> "Mamba2Shape":
        """The dimensions that a configuration gives.

        Args:
            config: a `Mamba2Config`, or one with a `Mamba2Config` for its `text_config`.

        Raises:
            ValueError: if it is neither.
        """
        config = getattr(config, "text_config", None) or config
        names = [name for name in cls._fields if name not in ("width", "inner")]
        missing = [name for name in (*names, "hidden_size", "expand") if not hasattr(config, name)]
        if missing:
            raise ValueError(
                f"{type(config).__name__} is not the configuration of a Mamba-2 model: it has no {missing[0]}."
            )
        values = {name: getattr(config, name) for name in names}
        return cls(width=config.hidden_size, inner=int(config.expand * config.hidden_size), **values)

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C, E + 2·G·N."""
        return self.inner + 2 * self.n_groups * self.state_size

    @property
    def projected(self) -> int:
        """Output width of `in_proj`: gate, convolution and time step."""
        return self.inner + self.conv_dim + self.num_heads

    @property
    def recurrent(self) -> int:
        """Elements of one layer's recurrent state, H·P·N."""
        return self.num_heads * self.head_dim * self.state_size

    @property
    def layer_parameters(self) -> int:
        """Parameters of one block."""
        in_proj = self.projected * (self.width + self.use_bias)
        conv = self.conv_dim * (self.conv_kernel + self.use_conv_bias)
        out_proj = self.width * (self.inner + self.use_bias)
        return self.width + in_proj + conv + 3 * self.num_heads + self.inner + out_proj


def indexable_tokens(config, batch_size: int) -> int:
    """The longest segment for kernels with 32-bit offsets: its rows times their stride stay below 2^31.

    mamba-ssm's are such kernels: given more, they fail or return wrong numbers. Its largest tensors are `in_proj`'s
    output and those of each chunk, states and products of B and C. At batch size 1 the limit is about 203,000 tokens
    for the 2.7B.
    """
    shape = Mamba2Shape.of(config)
    per_chunk = max(shape.recurrent, shape.n_groups * shape.chunk_size**2)
    row = max(shape.projected, math.ceil(per_chunk / shape.chunk_size))
    # Besides whole chunks, a segment may have the convolution's tail, and a last lone token.
    tokens = (_INDEXABLE - 1) // (batch_size * row) - shape.chunk_size - shape.conv_kernel
    return max(tokens - tokens % shape.chunk_size, 2)


def segments_of(sequence_length, sequence_interval):
    """The number of segments of a sequence, and the tokens of the longest; for arrays as well as for numbers.

    No segment of several is a single token, which the stock layer would take for a step of decoding: it joins the
    segment before. An interval of one token is therefore taken for one of two.
    """
    sequence_interval = np.maximum(sequence_interval, 2)
    segments = -(-sequence_length // sequence_interval)
    lone = (sequence_length % sequence_interval == 1) & (segments > 1)
    return segments - lone, np.minimum(sequence_interval, sequence_length) + lone


def segment_bounds(sequence_length: int, sequence_interval: int) -> list[tuple[int, int]]:
    """Where each segment of a sequence starts and stops, by the rule of [`segments_of`]."""
    segments, _ = segments_of(sequence_length, sequence_interval)
    starts = [segment * max(sequence_interval, 2) for segment in range(segments)]
    return list(itertools.pairwise([*starts, sequence_length]))
