"""The paper's formula for the memory of MA-GC (§3.3 and Table 7), in elements."""

from typing import NamedTuple

from transformers_ma2mba.mamba2.shape import Mamba2Shape


class PaperConstants(NamedTuple):
    """Elements per checkpoint (paper, Table 7)."""

    C_L: int  # hidden states of one token
    C_S: int  # states of one layer at one border
    C_grid: int  # one token in one layer of the restored cell
    C_state: int  # the running state of one layer


def paper_constants(config) -> PaperConstants:
    """Compute the formula's constants from a configuration's dimensions (paper §3.3 and Table 7).

    C_L = D; C_S = H·P·N + (conv_kernel − 1)·conv_dim; C_grid = the width of `in_proj` + E; C_state = H·P·N + conv_dim.
    """
    shape = Mamba2Shape.of(config)
    return PaperConstants(
        C_L=shape.width,
        C_S=shape.recurrent + shape.conv_dim * (shape.conv_kernel - 1),
        C_grid=shape.projected + shape.inner,
        C_state=shape.recurrent + shape.conv_dim,
    )


def paper_memory(config, sequence_length: int, layer_interval: int, sequence_interval: int) -> float:
    """Compute the elements of layer-major MA-GC at batch size 1 by the paper's formula (paper §3.3).

    The formula is LS/l·C_L + LS/s·C_S + l·s·C_grid + C_state. The paper prints the last term as s·C_state. The
    smallest value for the 2.7B at 2^19 tokens would then be 24.0 GiB in bfloat16. The 17.4 GiB that agree with the
    paper's other figures result from counting the running state once. (Counting it once per layer of a cell gives 17.5
    GiB.)
    """
    C_L, C_S, C_grid, C_state = paper_constants(config)
    points = Mamba2Shape.of(config).num_hidden_layers * sequence_length
    return (
        points / layer_interval * C_L
        + points / sequence_interval * C_S
        + layer_interval * sequence_interval * C_grid
        + C_state
    )
