"""Published weights: their layouts, and models loaded, built, converted and exported."""

from .building import build_model
from .converting import convert_published
from .exporting import LAYOUTS, export_model
from .loading import (
    LlavaMambaConfig,
    LlavaMambaForVideoQA,
    LlavaMambaProcessor,
    PublishedMa2mbaConfig,
    published_renamings,
)
from .published import MODEL_TYPE
from .shim import add_shim
