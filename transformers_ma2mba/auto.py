"""Registration with the Auto classes and `pipeline`. Only the package itself imports this module."""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoVideoProcessor,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.pipelines import PIPELINE_REGISTRY

from .checkpoints import (
    MODEL_TYPE,
    LlavaMambaConfig,
    LlavaMambaForVideoQA,
    LlavaMambaProcessor,
    PublishedMa2mbaConfig,
    published_renamings,
)
from .configuration_ma2mba import Ma2mbaConfig
from .modeling_ma2mba import Ma2mbaForVideoQA
from .pipeline_video_question_answering import VideoQuestionAnsweringPipeline
from .processing_ma2mba import Ma2mbaProcessor
from .video_processing_ma2mba import Ma2mbaVideoProcessor

DEFAULT_CHECKPOINT = Path(__file__).parent / "default_checkpoint"

AutoConfig.register("ma2mba", Ma2mbaConfig)
AutoConfig.register(MODEL_TYPE, LlavaMambaConfig)
for auto_class in (AutoModel, AutoModelForMultimodalLM, AutoModelForImageTextToText):
    auto_class.register(Ma2mbaConfig, Ma2mbaForVideoQA)
    auto_class.register(PublishedMa2mbaConfig, LlavaMambaForVideoQA)
AutoVideoProcessor.register(Ma2mbaConfig, Ma2mbaVideoProcessor)
AutoProcessor.register(Ma2mbaConfig, Ma2mbaProcessor)
AutoProcessor.register(PublishedMa2mbaConfig, LlavaMambaProcessor)
# By class name, so that the renaming is for this layout alone, and our own checkpoints load and save as they are.
register_checkpoint_conversion_mapping(LlavaMambaForVideoQA.__name__, published_renamings())
PIPELINE_REGISTRY.register_pipeline(
    "video-question-answering",
    pipeline_class=VideoQuestionAnsweringPipeline,
    pt_model=AutoModelForMultimodalLM,
    default={"model": (str(DEFAULT_CHECKPOINT), "main")},
    type="multimodal",
)
