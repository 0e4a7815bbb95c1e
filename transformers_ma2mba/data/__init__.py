"""Training data: rows of a data set to batches."""

from .broken_samples import BrokenSamples, sample_name
from .conversations import conversation_to_messages
from .data_collator import DataCollatorForVideoQA
from .formats import rows_of
from .frozen_features import FrozenVisionFeatures
from .lists import load_rows
from .token_batches import batches_by_tokens
