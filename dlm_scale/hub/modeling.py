"""The transformer as a Hugging Face masked language model: the same modules, the same numbers.

Shapes: B rows, L positions, V ids of the vocabulary, N selected positions of the flattened batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from dlm_scale.hub.configuration import DlmScaleConfig
from dlm_scale.model.transformer import Transformer
from dlm_scale.ops import Segments, segment_means
from dlm_scale.parallel.layers import Embedding, LocalLayers
from dlm_scale.sampling.predict import Predict

BACKENDS = {  # attn_implementation -> the attention backend of ops.py
    "eager": "eager",
    "sdpa": "sdpa",
    "flash_attention_2": "flash_attn_2",
    "flash_attention_3": "flash_attn_3",
}


class ExactLayers(LocalLayers):
    """Tables without padding: an export holds logical tensors."""

    def embedding(self, num_rows: int, width: int) -> Embedding:
        return Embedding(num_rows, width)


class DlmScaleForMaskedLM(PreTrainedModel):
    """Ids with masks in, logits of the clean ids out. Every position sees every other that `attention_mask` keeps."""

    config_class = DlmScaleConfig
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"transformer.head.weight": "transformer.embedding.weight"}

    def __init__(self, config: DlmScaleConfig):
        super().__init__(config)
        self.transformer = Transformer(config, config.vocabulary, ExactLayers())
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        mask_ratio: Tensor | None = None,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> MaskedLMOutput | tuple:
        """Logits float32 [B, L, V], -inf for the mask and for suppressed ids.

        input_ids [B, L]; attention_mask [B, L], 0 for padding on either side of a text, which then counts as if it
        stood alone. labels [B, L]: the clean ids where the loss (mean cross-entropy in nats) is asked for, -100
        elsewhere. mask_ratio [B]: for models with time conditioning, by default the share of masks.
        """
        logits_BLV = self._read(input_ids, attention_mask, mask_ratio, None, lambda head: head.logits())
        logits_BLV = logits_BLV.view(*input_ids.shape, -1)
        missing = self.config.vocab_size - logits_BLV.shape[-1]
        logits_BLV = F.pad(logits_BLV, (0, missing), value=-torch.inf)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BLV.flatten(0, 1), labels.flatten(), ignore_index=-100)
        if return_dict is False:
            return (logits_BLV,) if loss is None else (loss, logits_BLV)
        return MaskedLMOutput(loss=loss, logits=logits_BLV)

    @property
    def predict(self) -> Predict:
        """predict(x_BL, rows_N) -> normalised log-probabilities [N, V] float32 at flat positions: what samplers ask for;
        with `critique` and `local` where the model has these heads."""
        return Predict(self._read_at, self.transformer.head)

    @torch.no_grad()
    def _read_at(self, x_BL: Tensor, rows_N: Tensor, readout: Any, attention: None = None, cache: None = None) -> Any:
        return self._read(x_BL.to(self.device), None, None, rows_N.to(self.device), readout)

    def _read(self, x_BL: Tensor, mask_BL: Tensor | None, m_B: Tensor | None, rows_N: Tensor | None, readout) -> Tensor:
        backend = BACKENDS[self.config._attn_implementation]
        for block in self.transformer.blocks:
            block.attention.backend = backend
        attention = segments_of(mask_BL)
        if m_B is None:
            m_B = segment_means((x_BL == self.config.mask_token_id).float(), attention)
        if rows_N is None:
            rows_N = torch.arange(x_BL.numel(), device=x_BL.device)
        return self.transformer(x_BL, rows_N=rows_N, readout=readout, m_B=m_B, attention=attention)

    def _set_gradient_checkpointing(self, enable: bool = True, every_n_layers: int = 1, **ignored: Any) -> None:
        self.transformer.checkpoint_every = every_n_layers if enable else 0

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.transformer.checkpoint_every > 0

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.transformer.embedding

    def get_output_embeddings(self) -> torch.nn.Module | None:
        return None if self.config.tied else self.transformer.head

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        """Weights of a model that starts from nothing: matrices and tables normal, gains 1, biases 0."""
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                parameter.normal_(0.0, self.config.init_std)
            else:
                parameter.fill_(float(name == "gain"))


def segments_of(mask_BL: Tensor | None) -> Segments | None:
    """Texts and the padding around them as segments that do not see one another; None where nothing is padded.

    Raises ValueError where padding stands inside a text.
    """
    if mask_BL is None or bool(mask_BL.all()):
        return None
    is_text_BL = mask_BL.bool()
    begins_BL = is_text_BL & ~F.pad(is_text_BL, (1, 0))[:, :-1]
    if bool((begins_BL.sum(1) > 1).any()):
        raise ValueError("attention_mask has padding inside a text: it may stand before and behind one only")
    changes_BL = is_text_BL != F.pad(is_text_BL, (1, 0))[:, :-1]
    changes_BL[:, 0] = True
    bounds = changes_BL.flatten().nonzero()[:, 0]
    return Segments(F.pad(bounds, (0, 1), value=mask_BL.numel()).int())
