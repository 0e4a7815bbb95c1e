"""Training data: rows of a data set to batches."""

from .conversations import conversation_to_messages
from .data_collator import DataCollatorForVideoQA
from .frozen_features import FrozenVisionFeatures
from .token_batches import batches_by_tokens
