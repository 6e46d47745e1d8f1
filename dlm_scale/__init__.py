"""dlm_scale: pretrain, fine-tune, evaluate and batch-sample diffusion language models."""

__version__ = "0.1.0"
