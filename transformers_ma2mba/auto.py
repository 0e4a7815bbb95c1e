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
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_ma2mba import Ma2mbaConfig
from .modeling_ma2mba import Ma2mbaForVideoQA
from .pipeline_video_question_answering import VideoQuestionAnsweringPipeline
from .processing_ma2mba import Ma2mbaProcessor
from .video_processing_ma2mba import Ma2mbaVideoProcessor

DEFAULT_CHECKPOINT = Path(__file__).parent / "default_checkpoint"

AutoConfig.register("ma2mba", Ma2mbaConfig)
for auto_class in (AutoModel, AutoModelForMultimodalLM, AutoModelForImageTextToText):
    auto_class.register(Ma2mbaConfig, Ma2mbaForVideoQA)
AutoVideoProcessor.register(Ma2mbaConfig, Ma2mbaVideoProcessor)
AutoProcessor.register(Ma2mbaConfig, Ma2mbaProcessor)
PIPELINE_REGISTRY.register_pipeline(
    "video-question-answering",
    pipeline_class=VideoQuestionAnsweringPipeline,
    pt_model=AutoModelForMultimodalLM,
    default={"model": (str(DEFAULT_CHECKPOINT), "main")},
    type="multimodal",
)
