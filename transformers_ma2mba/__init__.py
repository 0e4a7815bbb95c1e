"""Video-Ma²mba for Transformers. Importing the package registers it with the Auto classes and `pipeline`."""

from . import auto  # noqa: F401  registers the classes
from .checkpoints import add_shim
from .configuration_ma2mba import Ma2mbaConfig
from .data import (
    BrokenSamples,
    DataCollatorForVideoQA,
    FrozenVisionFeatures,
    batches_by_tokens,
    conversation_to_messages,
    load_rows,
    rows_of,
    sample_name,
)
from .gradient_checkpointing import (
    CheckpointPlan,
    causal_lm_loss,
    disable_multi_axis_checkpointing,
    enable_multi_axis_checkpointing,
    plan_checkpoints,
)
from .modeling_ma2mba import Ma2mbaForVideoQA, Ma2mbaModel
from .pipeline_video_question_answering import VideoQuestionAnsweringPipeline
from .processing_ma2mba import Ma2mbaProcessor
from .session import StateFileError, VideoChat, VideoSession, VideoStreamError
from .version import __version__
from .video import VideoReadError, iter_frames, probe, read_video
from .video_processing_ma2mba import Ma2mbaVideoProcessor

__all__ = [
    "BrokenSamples",
    "CheckResumedRun",
    "CheckpointPlan",
    "DataCollatorForVideoQA",
    "FrozenVisionFeatures",
    "Ma2mbaConfig",
    "Ma2mbaForVideoQA",
    "Ma2mbaModel",
    "Ma2mbaProcessor",
    "Ma2mbaVideoProcessor",
    "StateFileError",
    "StopAtNonFinite",
    "StopWithoutAnswers",
    "TrainingMeter",
    "VideoChat",
    "VideoQuestionAnsweringPipeline",
    "VideoReadError",
    "VideoSession",
    "VideoStreamError",
    "__version__",
    "add_shim",
    "batches_by_tokens",
    "causal_lm_loss",
    "conversation_to_messages",
    "disable_multi_axis_checkpointing",
    "enable_multi_axis_checkpointing",
    "iter_frames",
    "load_rows",
    "last_whole_checkpoint",
    "parameter_groups",
    "plan_checkpoints",
    "probe",
    "read_video",
    "rows_of",
    "sample_name",
]


def __getattr__(name: str):
    """Import the names for the Trainer when they are first used: they bring in PEFT and more, which takes a while."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .training import (
        CheckResumedRun,
        StopAtNonFinite,
        StopWithoutAnswers,
        TrainingMeter,
        last_whole_checkpoint,
        parameter_groups,
    )

    names = (CheckResumedRun, StopAtNonFinite, StopWithoutAnswers, TrainingMeter, last_whole_checkpoint)
    return {value.__name__: value for value in (*names, parameter_groups)}[name]
    return {value.__name__: value for value in names}[name]
