"""The judge of `objective.judge`: a frozen sequence scorer, whole on every rank, read from its checkpoint once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dlm_scale import ops
from dlm_scale.checkpoint.reader import Checkpoint, open_checkpoint
from dlm_scale.config import config_from_text
from dlm_scale.data.meta import TOKENIZER_DOCUMENT
from dlm_scale.diffusion.modifiers import Judge
from dlm_scale.errors import UsageError
from dlm_scale.model.parameters import parameter_table
from dlm_scale.model.transformer import Transformer


def check_judge(path: Path, config: Any, meta: Any) -> Checkpoint:
    """The checkpoint in `path`, of a scorer that can judge a run of `config` on data of `meta`.

    Raises UsageError where it is no scorer, reads shorter rows or other ids, or lacks a tensor.
    """
    checkpoint = open_checkpoint(path, verify=False)  # inspected just now
    where, theirs = f"objective.judge: {path}", _config_of(checkpoint)
    if theirs.objective.kind != "sequence_scoring":
        raise UsageError(f"{where} is no sequence scorer (its objective.kind is {theirs.objective.kind}): train one "
                         "with objective.kind=sequence_scoring model.score=true")
    if json.loads(checkpoint.document(TOKENIZER_DOCUMENT)) != json.loads(json.dumps(meta.tokenizer_dict())):
        raise UsageError(f"{where} has another tokenizer than data.train: its ids mean other texts; train it on data "
                         "of the same tokenizer")
    if theirs.model.seq_len < config.model.seq_len:
        raise UsageError(f"{where} has read rows of {theirs.model.seq_len} tokens, and model.seq_len is "
                         f"{config.model.seq_len}: train it on rows as long")
    slot = _slot(checkpoint)
    for name, spec in parameter_table(theirs.model, meta.vocabulary).items():
        stored = checkpoint.tensors.get((name, slot))
        if stored is None or tuple(stored.shape) != spec.shape:
            raise UsageError(f"{where}: tensor {name} ({slot}) is missing or not of shape {spec.shape}: config.yaml "
                             "and weights do not belong together; take another checkpoint")
    return checkpoint


def load_judge(checkpoint: Checkpoint, vocabulary: Any, device: torch.device, precision: str) -> Judge:
    """judge(ids [B, L], attention) -> [S] float32: the share of wrong tokens that the scorer sees in each row, or where
    documents are packed in each segment. Nothing of it is ever trained or saved."""
    config, slot = _config_of(checkpoint), _slot(checkpoint)
    dtype = torch.bfloat16 if precision == "bf16" and device.type == "cuda" else torch.float32
    with torch.device(device):
        model = Transformer(config.model, vocabulary).to(device, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stored = checkpoint.read(name, slot)
            parameter.zero_()[: len(stored)].copy_(stored)  # the rest is padding of a table
    model.eval().requires_grad_(False)

    @torch.no_grad()
    def judge(ids_BL: torch.Tensor, attention: Any) -> torch.Tensor:
        rows_N = torch.arange(ids_BL.numel(), device=ids_BL.device)
        score_N = model(ids_BL, rows_N=rows_N, readout=lambda head: head.score(), attention=attention)
        return ops.segment_means(score_N.view(ids_BL.shape), attention).sigmoid()

    return judge


def _config_of(checkpoint: Checkpoint) -> Any:
    return config_from_text(checkpoint.document("config.yaml").decode(), f"{checkpoint.path}/config.yaml")


def _slot(checkpoint: Checkpoint) -> str:
    return "ema" if ("embedding.weight", "ema") in checkpoint.tensors else "param"
