"""Published checkpoints: the authors' layout, read into ours."""

from .loading import (
    LlavaMambaConfig,
    LlavaMambaForVideoQA,
    LlavaMambaProcessor,
    PublishedMa2mbaConfig,
    published_renamings,
)
from .published import MODEL_TYPE
