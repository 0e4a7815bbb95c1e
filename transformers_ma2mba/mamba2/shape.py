"""The dimensions of a Mamba-2, and the cutting of its sequences.

Six words name the parts, and each has one meaning:

- *segment*: consecutive tokens that run through the layers together and pass their state on to the next segment.
- *cell*: some layers times one segment. MA-GC restores one cell at a time (paper §3.2).
- *chunk*: tokens that a kernel relates pairwise; their number is the configuration's `chunk_size`.
- *tile*: tokens that [`ssd_scan`] relates pairwise; it chooses their number itself.
- *span*: the tiles that [`ssd_scan`] holds in memory at a time.
- *piece*: a part of anything else that is in memory at a time, such as some frames in the vision tower.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

_INDEXABLE = 2**31  # elements of a tensor that 32-bit offsets can address


class Mamba2Shape(NamedTuple):
    """The dimensions of a Mamba-2 (arXiv:2405.21060, §7; arXiv:2411.19460, Table 7), each with its symbol there."""

    num_hidden_layers: int  # L
    width: int  # D, `hidden_size`
    inner: int  # E, `expand * hidden_size`
    num_heads: int  # H
    head_dim: int  # P
    state_size: int  # N
    n_groups: int  # G; each group has its own B and C
    conv_kernel: int  # K, in tokens
    chunk_size: int  # Q, in tokens
    use_bias: bool
    use_conv_bias: bool
    residual_in_fp32: bool
    vocab_size: int  # V

    @classmethod
    def of(cls, config) -> "Mamba2Shape":
        """Read the dimensions off a configuration.

        Args:
            config: a `Mamba2Config`, or a configuration with a `Mamba2Config` for its `text_config`.

        Raises:
            ValueError: if the configuration is neither.
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
        """Channels of the convolution, which are those of x, B and C: E + 2·G·N."""
        return self.inner + 2 * self.n_groups * self.state_size

    @property
    def projected(self) -> int:
        """Output width of `in_proj`, for the gate, the convolution and the time step: 2·E + 2·G·N + H."""
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
    """Compute the longest segment whose tensors have fewer than 2^31 elements, which 32-bit offsets can address.

    mamba-ssm's kernels use such offsets. With a longer segment they fail or return wrong numbers. Their largest
    tensors are `in_proj`'s output, the chunks' states, and the chunks' products of B and C. At batch size 1 the limit
    is about 203,000 tokens for the 2.7B.

    Args:
        config: as for [`Mamba2Shape.of`].
        batch_size: number of samples.

    Returns:
        Number of tokens.
    """
    shape = Mamba2Shape.of(config)
    per_chunk = max(shape.recurrent, shape.n_groups * shape.chunk_size**2)
    row = max(shape.projected, math.ceil(per_chunk / shape.chunk_size))
    # Beside whole chunks, a segment may contain the convolution's tail and a lone last token.
    tokens = (_INDEXABLE - 1) // (batch_size * row) - shape.chunk_size - shape.conv_kernel
    return max(tokens - tokens % shape.chunk_size, 2)


def segments_of(sequence_length, sequence_interval):
    """Count the segments of a sequence, and the tokens of the longest segment.

    The stock layer takes a single token for a decoding step. A single token at the end of a sequence therefore joins
    the segment before it, and an interval of one token counts as two.

    Args:
        sequence_length: number of tokens.
        sequence_interval: number of tokens in a segment; a number or an array.

    Returns:
        The number of segments, and the number of tokens in the longest; of the interval's shape.
    """
    sequence_interval = np.maximum(sequence_interval, 2)
    segments = -(-sequence_length // sequence_interval)
    lone = (sequence_length % sequence_interval == 1) & (segments > 1)
    return segments - lone, np.minimum(sequence_interval, sequence_length) + lone


def segment_bounds(sequence_length: int, sequence_interval: int) -> list[tuple[int, int]]:
    """List the start and the stop of each segment of a sequence, by the rule of [`segments_of`]."""
    segments, _ = segments_of(sequence_length, sequence_interval)
    starts = [segment * max(sequence_interval, 2) for segment in range(segments)]
    return list(itertools.pairwise([*starts, sequence_length]))
