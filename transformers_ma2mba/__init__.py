"""Video-Ma²mba for Transformers. Importing the package registers it with the Auto classes and `pipeline`."""

from . import auto  # noqa: F401  registers the classes
from .answering import VideoChat
from .checkpoint_plan import CheckpointPlan, plan_checkpoints
from .configuration_ma2mba import Ma2mbaConfig
from .data_collator import DataCollatorForVideoQA, conversation_to_messages
from .loss_in_pieces import causal_lm_loss
from .modeling_ma2mba import Ma2mbaForVideoQA, Ma2mbaModel
from .multi_axis_checkpointing import disable_multi_axis_checkpointing, enable_multi_axis_checkpointing
from .pipeline_video_question_answering import VideoQuestionAnsweringPipeline
from .processing_ma2mba import Ma2mbaProcessor
from .state_file import StateFileError
from .version import __version__
from .video_processing_ma2mba import Ma2mbaVideoProcessor
from .video_reader import VideoReadError, iter_frames, probe, read_video
from .video_session import VideoSession, VideoStreamError

__all__ = [
    "CheckpointPlan",
    "DataCollatorForVideoQA",
    "Ma2mbaConfig",
    "Ma2mbaForVideoQA",
    "Ma2mbaModel",
    "Ma2mbaProcessor",
    "Ma2mbaVideoProcessor",
    "StateFileError",
    "VideoChat",
    "VideoQuestionAnsweringPipeline",
    "VideoReadError",
    "VideoSession",
    "VideoStreamError",
    "__version__",
    "causal_lm_loss",
    "conversation_to_messages",
    "disable_multi_axis_checkpointing",
    "enable_multi_axis_checkpointing",
    "iter_frames",
    "plan_checkpoints",
    "probe",
    "read_video",
]
