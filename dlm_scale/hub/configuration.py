"""The configuration of an exported model: its shape and its vocabulary."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import PretrainedConfig

SHAPE = {  # every field of a model's shape, and what it is where a config.json does not say
    "num_layers": 12,
    "hidden_size": 768,
    "num_heads": 12,
    "seq_len": 1024,
    "num_kv_heads": 12,
    "head_dim": 64,
    "mlp": "swiglu",
    "ffn_size": 2048,
    "qk_norm": True,
    "rope_base": 10_000.0,
    "norm_eps": 1e-6,
    "tied": True,
    "time_conditioning": "none",
    "logit_softcap": None,
    "init_std": 0.02,
    "norm": "rms",
    "norm_bias": False,
    "norm_placement": "pre",
    "bias": "none",
    "position": "rope",
    "window": None,
    "global_every": 3,
    "window_rope_base": 10_000.0,
    "embedding_norm": "none",
    "head_transform": False,
    "head_bias": False,
    "logit_shift": False,
    "critic": False,
    "labels": False,
    "score": False,
    "sampler_head": False,
}


class DlmScaleConfig(PretrainedConfig):
    """Fields of the model's shape (SHAPE), the vocabulary's size, its mask and the ids that are never predicted."""

    model_type = "dlm_scale"
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "intermediate_size": "ffn_size",
        "max_position_embeddings": "seq_len",
    }

    def __init__(self, vocab_size: int = 257, mask_token_id: int = 256, suppressed_ids: Any = (), **values: Any):
        for name, default in SHAPE.items():
            setattr(self, name, values.pop(name, default))
        self.vocab_size, self.mask_token_id, self.suppressed_ids = vocab_size, mask_token_id, list(suppressed_ids)
        values["tie_word_embeddings"] = self.tied
        if __name__.startswith("dlm_scale."):  # installed: the pipeline is registered, the export's own is not needed
            values.pop("custom_pipelines", None)
        super().__init__(**values)

    @property
    def gaussian(self) -> None:
        """Gaussian checkpoints are not exported."""

    @property
    def vocabulary(self) -> SimpleNamespace:
        """What a Transformer asks of a vocabulary. A mask that is the last id has no row in the output table."""
        num_outputs = self.vocab_size - (self.mask_token_id == self.vocab_size - 1)
        return SimpleNamespace(size=self.vocab_size, num_outputs=num_outputs, mask_id=self.mask_token_id,
                               suppressed_ids=tuple(self.suppressed_ids))  # fmt: skip
