"""Training data: rows of a data set to batches."""

from .broken_samples import BrokenSamples, sample_name
from .conversations import conversation_to_messages, files_in
from .data_collator import DataCollatorForVideoQA
from .formats import rows_of
from .frozen_features import FrozenVisionFeatures
from .list_report import RowLength, check_rows, histogram
from .lists import load_rows
from .token_batches import batches_by_tokens, count_text_tokens
