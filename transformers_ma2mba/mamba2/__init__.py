"""Additions to the stock Mamba-2 layer: dimensions, carried states, the scan, and the choice of kernels."""

from . import kernel_choice
from .adapted_layers import has_special_projection, refuse_bypassed_adapters
from .kernel_choice import hold, release
from .recurrent_state import (
    LayerState,
    cache_for,
    cache_layers_of,
    copy_cache,
    empty_cache,
    join_caches,
    read_state,
    with_own_storage,
    write_state,
)
from .shape import Mamba2Shape, indexable_tokens, segment_bounds, segments_of
from .ssd_scan import ELEMENTS_PER_SPAN, TILE, TILES_PER_SPAN
