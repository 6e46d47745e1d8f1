"""Models of this project as Hugging Face's classes: configuration, masked language model, pipeline.

`import dlm_scale.hub` registers them, so that AutoConfig, AutoModelForMaskedLM and pipeline("text-diffusion") know
exported folders without trust_remote_code. An export also carries these classes itself (convert/bundle.py).
"""

from transformers import AutoConfig, AutoModelForMaskedLM
from transformers.pipelines import PIPELINE_REGISTRY

from dlm_scale.hub.configuration import DlmScaleConfig
from dlm_scale.hub.modeling import DlmScaleForMaskedLM
from dlm_scale.hub.pipeline import TASK, TextDiffusionPipeline

__all__ = ["TASK", "DlmScaleConfig", "DlmScaleForMaskedLM", "TextDiffusionPipeline"]

AutoConfig.register(DlmScaleConfig.model_type, DlmScaleConfig, exist_ok=True)
AutoModelForMaskedLM.register(DlmScaleConfig, DlmScaleForMaskedLM, exist_ok=True)
if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
    PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=TextDiffusionPipeline, pt_model=AutoModelForMaskedLM)
