"""The two ends of a network of Gaussian diffusion: noised token vectors in, predictions of the clean ones out.

Token vectors E are the rows of the input table: of length 1 (`unit_norm`), the same and never trained (`fixed`), or as
they are (`free`). Shapes as in transformer.py; E also counts their dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dlm_scale import ops
from dlm_scale.diffusion.gaussian import SOFTMAX, Latent
from dlm_scale.model.transformer import Head, HeadView
from dlm_scale.parallel.collectives import sum_gradient, sum_partial
from dlm_scale.parallel.layers import Linear


def vectors_of(rows: torch.Tensor, kind: str) -> torch.Tensor:
    """Token vectors, float32, from rows of the table. A row of zeros (padding) stays zero."""
    if kind == "fixed":  # a zero gradient, not none: every rank reduces the same parameters
        rows = rows.detach() + 0 * rows
    return rows.float() if kind == "free" else F.normalize(rows.float(), dim=-1)


class LatentInput(nn.Module):
    """Hidden states [B, L, D] from token vectors and noise, or from vectors that are noised already."""

    def __init__(self, config: Any, layers: Any):
        super().__init__()
        self.kind, dim = config.gaussian.embeddings, config.gaussian.embedding_dim
        self.weight = nn.Parameter(torch.empty(config.hidden_size, dim))
        self.guess_weight = None
        if config.gaussian.self_conditioning:
            self.guess_weight = nn.Parameter(torch.empty(config.hidden_size, dim))
        self.own_positions, self.over_sequence = layers.own_positions, layers.over_sequence

    def forward(self, rows_BLE: torch.Tensor, latent: Latent) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden states, clean vectors) at the positions of this rank, of which rows_BLE are the table's rows."""
        clean_BLE = z_BLE = vectors_of(rows_BLE, self.kind)
        if latent.vectors_BLE is not None:
            z_BLE = self.own_positions(latent.vectors_BLE)
        else:
            noised_BLE = latent.alpha_B[:, None, None] * clean_BLE
            noised_BLE = noised_BLE + latent.sigma_B[:, None, None] * self.own_positions(latent.noise_BLE)
            z_BLE = torch.where(self.own_positions(latent.is_noised_BL)[..., None], noised_BLE, clean_BLE)
        hidden_BLD = F.linear(z_BLE.to(self.weight.dtype), self.over_sequence(self.weight))
        if self.guess_weight is None:
            return hidden_BLD, clean_BLE
        guess_BLE = torch.zeros_like(z_BLE) if latent.guess_BLE is None else self.own_positions(latent.guess_BLE)
        guess_BLD = F.linear(guess_BLE.to(self.weight.dtype), self.over_sequence(self.guess_weight))
        return hidden_BLD + guess_BLD, clean_BLE


class LatentView(HeadView):
    """What a readout may ask beside what any head offers (diffusion/gaussian_objective.py). clean_NE: E[id]."""

    def __init__(self, head: LatentHead, hidden_ND: torch.Tensor, embed: Callable, clean_NE: torch.Tensor):
        super().__init__(head, hidden_ND, embed)
        self.clean_NE = clean_NE

    def mean(self, temperature: float = 1.0) -> torch.Tensor:
        """Float32 [N, E]: sum over ids of softmax(logits / temperature) times their vectors; with gradients.

        Each rank sums over its part of the vocabulary: two all-reduces of [N] and one of [N, E].
        """
        head, (hidden_ND, weight_VD) = self._head, self._operands()
        if head.group is not None:
            hidden_ND = sum_gradient(hidden_ND, head.group)
        logits_NV = ops.linear_logits(hidden_ND, weight_VD, head.local_bias(hidden_ND.device), None, head.softcap)
        logits_NV = logits_NV / temperature
        best_N1 = logits_NV.detach().amax(-1, keepdim=True)
        if head.group is not None:
            torch.distributed.all_reduce(best_N1, torch.distributed.ReduceOp.MAX, head.group)
        share_NV = (logits_NV - best_N1).exp()
        sums_NE, total_N1 = share_NV @ head.vectors(), share_NV.sum(-1, keepdim=True)
        if head.group is not None:
            sums_NE, total_N1 = sum_partial(sums_NE, head.group), sum_partial(total_N1, head.group)
        return sums_NE / total_N1

    def output(self) -> torch.Tensor:
        """Float32 [N, E] of the linear head (v and eps)."""
        return self._head.output(self.hidden_ND).float()

    def best_ids(self) -> torch.Tensor:
        """Int64 [N]: the likeliest ids."""
        return self._scores(*self._operands(), self._head.softcap)

    def nearest(self, y_NE, sharpness_N, target_N, weight_N) -> tuple:
        """As `cross_entropy`, of p(id) proportional to exp(-sharpness |y - E[id]|^2 / 2)."""
        head, bias_V = self._head, self._head.local_bias(y_NE.device)
        y_NF, vectors_VF = self._distances(y_NE)
        return ops.linear_cross_entropy(
            y_NF * sharpness_N[:, None], vectors_VF, target_N, weight_N, bias_V, head.vocab_start, head.group
        )

    def nearest_ids(self, y_NE: torch.Tensor) -> torch.Tensor:
        """Int64 [N]: the ids of the nearest vectors."""
        return self._scores(*self._distances(y_NE), None)

    def _distances(self, y_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Operands whose product is <y, E> - |E|^2 / 2."""
        vectors_VE = self._head.vectors()
        return F.pad(y_NE, (0, 1), value=1.0), torch.cat([vectors_VE, -vectors_VE.square().sum(-1, True) / 2], dim=1)

    def _scores(self, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, softcap: float | None) -> torch.Tensor:
        head, bias_V = self._head, self._head.local_bias(hidden_ND.device)
        nothing_N = torch.zeros(len(hidden_ND), dtype=torch.long, device=hidden_ND.device)
        return ops.linear_scores(
            hidden_ND, weight_VD, nothing_N, bias_V, head.vocab_start, head.group, softcap
        ).best_id_N


class LatentHead(Head):
    """An output table over all ids for `x0_softmax`; for v and eps a linear head, and the input table for distances."""

    def __init__(self, embedding: nn.Module, vocabulary: Any, layers: Any, config: Any):
        has_table = config.gaussian.prediction == SOFTMAX
        # As many rows as the input table, so that a rank has the same ids of both.
        table = layers.embedding(vocabulary.size, config.hidden_size) if has_table else embedding
        super().__init__(table, vocabulary, layers, config)
        self.token_rows, self.kind = embedding.weight, config.gaussian.embeddings
        self.output = None if has_table else Linear(config.hidden_size, config.gaussian.embedding_dim)

    def vectors(self) -> torch.Tensor:
        """Float32 [V, E]: this rank's token vectors."""
        return vectors_of(self.token_rows, self.kind)

    def forward(self, hidden_ND: torch.Tensor, readout: Callable, embed: Callable, clean_NE: torch.Tensor) -> Any:
        return readout(LatentView(self, hidden_ND, embed, clean_NE))
