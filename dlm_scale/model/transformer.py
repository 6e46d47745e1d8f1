"""The bidirectional transformer.

Shapes: B rows, L positions, D width, H heads, G key/value heads, E head width, F MLP width, N selected positions of
the flattened batch, V output vocabulary.

The model knows neither ranks nor sharding: its layers come from a `Layers` value (parallel/layers.py). All reading of
the output table happens inside `Head.forward`, because under ZeRO-3 the weight exists only there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dlm_scale import ops
from dlm_scale.model.parameters import BIASES, TIME_FEATURES, TIME_WIDTH, ModelShape, has_first_norm
from dlm_scale.parallel.layers import Embedding, Linear, LocalLayers, identity


class RMSNorm(nn.Module):
    """x / rms(x) * gain (Zhang and Sennrich, 2019).

    `whole_gradient` wraps the gain where this rank sees only a part of what it is applied to.
    """

    def __init__(self, width: int, eps: float, whole_gradient: Callable = identity):
        super().__init__()
        self.gain = nn.Parameter(torch.empty(width))
        self.eps, self.whole_gradient = eps, whole_gradient

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.whole_gradient(self.gain), self.eps)


class LayerNorm(nn.Module):
    """Layer norm (Ba et al., 2016), with or without a bias."""

    def __init__(self, width: int, eps: float, has_bias: bool, whole_gradient: Callable = identity):
        super().__init__()
        self.gain = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if has_bias else None
        self.eps, self.whole_gradient = eps, whole_gradient

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.whole_gradient(self.bias)
        return F.layer_norm(x, (x.shape[-1],), self.whole_gradient(self.gain), bias, self.eps)


def make_norm(config: ModelShape, whole_gradient: Callable = identity) -> nn.Module:
    """The norm of hidden states that the shape names."""
    if config.norm == "rms":
        return RMSNorm(config.hidden_size, config.norm_eps, whole_gradient)
    return LayerNorm(config.hidden_size, config.norm_eps, config.norm_bias, whole_gradient)


def bias_of(config: ModelShape, part: str) -> dict[str, bool]:
    """What to ask of `layers` for a biased projection; without one nothing, for sharded layers know no biases."""
    return {"has_bias": True} if part in BIASES[config.bias] else {}


def rotary_tables(position_BL: torch.Tensor, head_dim: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [B or 1, L, 1, E/2] in float32 (Su et al., 2021)."""
    exponent = torch.arange(0, head_dim, 2, device=position_BL.device, dtype=torch.float32) / head_dim
    angle = position_BL[:, :, None, None].float() * base**-exponent
    return angle.cos(), angle.sin()


def queries_of(mask: ops.AttentionMask, position_BS: torch.Tensor) -> ops.AttentionMask:
    """The mask as the positions that are computed see it; keys stand at all positions."""
    if isinstance(mask, ops.Segments):
        raise ValueError("keys cannot be kept between passes over packed documents: leave out the cache")
    return mask if isinstance(mask, ops.Full) else ops.Queries(mask, position_BS)


def rotate(x_BLHE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of each head by the position's angle."""
    first, second = x_BLHE.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BLHE.dtype)


class Attention(nn.Module):
    """Multi-head attention with grouped keys, QK-norm and rotary positions; with a `window` nearer keys only.

    Rows of `qkv` are grouped by key/value head: its queries, its key, its value. So a slice of whole groups is a
    smaller attention, which is what a tensor-parallel rank holds.
    """

    backend: str | None = None  # of ops.attention; None: what is best here

    def __init__(self, config: ModelShape, layers: Any, window: int | None = None):
        super().__init__()
        self.head_dim, self.has_qk_norm, self.window = config.head_dim, config.qk_norm, window
        shape = config.hidden_size, config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim
        self.qkv, self.queries_per_group = layers.qkv(*shape, **bias_of(config, "qkv"))
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, config.norm_eps, layers.over_heads)
            self.key_norm = RMSNorm(config.head_dim, config.norm_eps, layers.over_heads)
        self.out = layers.row(config.num_heads * config.head_dim, config.hidden_size, **bias_of(config, "out"))

    def forward(
        self, x_BLD: torch.Tensor, rotary: tuple | None, mask: ops.AttentionMask, join: Callable | None = None
    ) -> torch.Tensor:
        """`join(k, v)` gives the keys and values to attend to, where these are not the ones of x alone."""
        fused = self.qkv(x_BLD)
        batch, length, _ = fused.shape
        grouped = fused.view(batch, length, -1, self.queries_per_group + 2, self.head_dim)
        q_BLHE = grouped[:, :, :, : self.queries_per_group].reshape(batch, length, -1, self.head_dim)
        k_BLGE, v_BLGE = grouped[:, :, :, -2], grouped[:, :, :, -1]
        if self.has_qk_norm:
            q_BLHE, k_BLGE = self.query_norm(q_BLHE), self.key_norm(k_BLGE)
        if rotary is not None:
            q_BLHE, k_BLGE = rotate(q_BLHE, *rotary), rotate(k_BLGE, *rotary)
        if join is not None:
            k_BLGE, v_BLGE = join(k_BLGE, v_BLGE)
        attended = ops.attention(q_BLHE, k_BLGE, v_BLGE, mask, self.backend, self.window)
        return self.out(attended.reshape(batch, length, -1))


class GatedMLP(nn.Module):
    """down(activation(gate x) * up x) (Shazeer, 2020); gate and up are one matmul."""

    def __init__(self, config: ModelShape, layers: Any, activation: Callable):
        super().__init__()
        self.gate_up = layers.column(config.hidden_size, 2 * config.ffn_size, **bias_of(config, "up"))
        self.down = layers.row(config.ffn_size, config.hidden_size, **bias_of(config, "down"))
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


class PlainMLP(nn.Module):
    """down(activation(up x))."""

    def __init__(self, config: ModelShape, layers: Any, activation: Callable):
        super().__init__()
        self.up = layers.column(config.hidden_size, config.ffn_size, **bias_of(config, "up"))
        self.down = layers.row(config.ffn_size, config.hidden_size, **bias_of(config, "down"))
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.up(x)))


MLPS = {
    "swiglu": partial(GatedMLP, activation=F.silu),
    "geglu": partial(GatedMLP, activation=F.gelu),
    "gelu": partial(PlainMLP, activation=F.gelu),
    "gelu_tanh": partial(PlainMLP, activation=partial(F.gelu, approximate="tanh")),
}


class TimeEmbedding(nn.Module):
    """Conditioning vector of the mask ratio: sinusoids, then a two-layer MLP."""

    def __init__(self):
        super().__init__()
        self.first = Linear(TIME_FEATURES, TIME_WIDTH)
        self.second = Linear(TIME_WIDTH, TIME_WIDTH)

    def forward(self, m_B: torch.Tensor) -> torch.Tensor:
        half = TIME_FEATURES // 2
        steps = torch.arange(half, device=m_B.device, dtype=torch.float32) / half
        angle = 1000.0 * m_B.float()[:, None] * torch.exp(-math.log(10000.0) * steps)
        features = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(features)))


class Block(nn.Module):
    """Attention and MLP, each after its norm, or with `norm_placement` post before it; with adaLN, scale, shift and
    gate of both from the conditioning vector.

    The modulation starts at zero, where it is the identity: the first step equals the time-agnostic model. The
    conditioning vectors are one a row, or with `segment_BL` one a segment, of which it tells each position's.
    """

    def __init__(self, config: ModelShape, layers: Any, number: int):
        super().__init__()
        self.is_post_norm = config.norm_placement == "post"
        self.is_local = config.window is not None and number % config.global_every > 0
        has_norm = has_first_norm(config, number)
        self.attention_norm = make_norm(config, layers.over_sequence) if has_norm else nn.Identity()
        self.attention = Attention(config, layers, config.window if self.is_local else None)
        self.mlp_norm = make_norm(config, layers.over_sequence)
        self.mlp = MLPS[config.mlp](config, layers)
        self.modulation = Linear(TIME_WIDTH, 6 * config.hidden_size) if config.time_conditioning == "adaln" else None
        self.over_sequence = layers.over_sequence

    def forward(self, x_BLD, rotaries, mask, condition_SC=None, segment_BL=None, join=None) -> torch.Tensor:
        rotary = rotaries[self.is_local]
        if self.is_post_norm:
            x_BLD = self.attention_norm(x_BLD + self.attention(x_BLD, rotary, mask, join))
            return self.mlp_norm(x_BLD + self.mlp(x_BLD))
        if self.modulation is None:
            x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), rotary, mask, join)
            return x_BLD + self.mlp(self.mlp_norm(x_BLD))
        modulation_SD = self.over_sequence(self.modulation(F.silu(condition_SC)))
        modulation_BLD = modulation_SD[:, None, :] if segment_BL is None else modulation_SD[segment_BL]
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation_BLD.chunk(6, dim=-1)
        attended = self.attention(self.attention_norm(x_BLD) * (1 + scale1) + shift1, rotary, mask, join)
        x_BLD = x_BLD + (1 + gate1) * attended
        return x_BLD + (1 + gate2) * self.mlp(self.mlp_norm(x_BLD) * (1 + scale2) + shift2)


class HeadTransform(nn.Module):
    """norm(gelu(dense x)): what BERT's kind puts before the output table."""

    def __init__(self, config: ModelShape):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, config.bias == "all")
        self.norm = make_norm(config)

    def forward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return self.norm(F.gelu(self.dense(hidden_ND)))


class SamplerHead(nn.Module):
    """Hidden states that know the ids beside them: h + second(norm(silu(first [left, h, right]))).

    left and right are embeddings, normalised (a table's rows are small beside h), or zero where the id is unknown:
    no embedding is zero then, so that takes no parameter. `second` starts at zero, where the law is the trunk's own.
    """

    def __init__(self, config: ModelShape):
        super().__init__()
        self.first = Linear(3 * config.hidden_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, has_bias=False)
        self.second = Linear(config.hidden_size, config.hidden_size)

    def forward(self, left_ND: torch.Tensor, hidden_ND: torch.Tensor, right_ND: torch.Tensor) -> torch.Tensor:
        inputs = torch.cat([left_ND.to(hidden_ND.dtype), hidden_ND, right_ND.to(hidden_ND.dtype)], dim=-1)
        return hidden_ND + self.second(self.norm(F.silu(self.first(inputs))))


class HeadView:
    """What a readout may ask of the output head, while its weight is there. See docs/design.md, signature 2.

    `embed(ids_N)` gives rows [N, D] of the input table; `is_frozen`: nothing read here has gradients for the table.
    """

    def __init__(self, head: Head, hidden_ND: torch.Tensor, embed: Callable, is_frozen: bool = False):
        self.hidden_ND = hidden_ND
        self._head, self._embed, self._is_frozen = head, embed, is_frozen

    def _operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and table; a learned bias is one more column of the table, and meets a 1."""
        hidden_ND, weight_VD, bias_V = self.hidden_ND, self._head.weight, self._head.bias
        if self._is_frozen:
            weight_VD, bias_V = weight_VD.detach(), None if bias_V is None else bias_V.detach()
        if bias_V is None:
            return hidden_ND, weight_VD
        column_V1 = F.pad(bias_V, (0, weight_VD.shape[0] - bias_V.shape[0])).to(weight_VD.dtype)[:, None]
        return F.pad(hidden_ND, (0, 1), value=1.0), torch.cat([weight_VD, column_V1], dim=1)

    def cross_entropy(
        self, target_N: torch.Tensor, weight_N: torch.Tensor, z_loss: float = 0.0, label_smoothing: float = 0.0
    ):
        """(weighted sum and z-loss, ce [N], is_correct [N]) of the clean ids `target_N`."""
        head = self._head
        bias_V = head.local_bias(self.hidden_ND.device)
        return ops.linear_cross_entropy(
            *self._operands(), target_N, weight_N, bias_V, head.vocab_start, head.group,
            ops.LossTerms(head.softcap, z_loss, label_smoothing),
        )  # fmt: skip

    def critic(self) -> torch.Tensor:
        """Float32 [N]: logit of the probability that the id at each position is wrong. Needs `model.critic`."""
        return self._head.critic(self.hidden_ND)[:, 0].float()

    def labels(self) -> torch.Tensor:
        """Float32 [N, 2]: logits of the id at each position being as it was, and being replaced. Needs
        `model.labels`."""
        return self._head.labels(self.hidden_ND).float()

    def score(self) -> torch.Tensor:
        """Float32 [N]: each position's part of a text's score, which is their mean. Needs `model.score`."""
        return self._head.score(self.hidden_ND)[:, 0].float()

    def wrong_entropy(self, target_N: torch.Tensor) -> torch.Tensor:
        """Float32 [N], detached: entropy of the ids other than `target_N`, as a share of its largest value."""
        head = self._head
        bias_V = head.local_bias(self.hidden_ND.device)
        return ops.wrong_entropy(*self._operands(), target_N, bias_V, head.vocab_start, head.group, head.softcap)

    def local(self, left_N: torch.Tensor, right_N: torch.Tensor) -> HeadView:
        """The head for hidden states that know the ids beside them, -1 where unknown. Needs `model.sampler_head`.

        Only the sampler head has gradients: hidden states, embeddings and the output table are taken as they are.
        """
        left_ND, right_ND = (self._neighbours(ids_N) for ids_N in (left_N, right_N))
        return HeadView(self._head, self._head.sampler(left_ND, self.hidden_ND.detach(), right_ND), self._embed, True)

    @torch.no_grad()
    def _neighbours(self, ids_N: torch.Tensor) -> torch.Tensor:
        rows_ND = self._embed(ids_N.clamp(min=0)).float()
        return F.layer_norm(rows_ND, rows_ND.shape[-1:], eps=1e-12) * (ids_N >= 0)[:, None]

    def logits(self) -> torch.Tensor:
        """Float32 [N, V]; suppressed ids at -inf."""
        head = self._head
        bias_V = head.local_bias(self.hidden_ND.device)
        return ops.linear_logits(*self._operands(), bias_V, head.group, head.softcap)[:, : head.num_outputs]

    def log_probs(self) -> torch.Tensor:
        """Normalised float32 [N, V]."""
        return F.log_softmax(self.logits(), dim=-1)

    def over(self, hidden_ND: torch.Tensor) -> HeadView:
        """The same head over other final hidden states (only where its weight stays: not under ZeRO-3)."""
        return HeadView(self._head, hidden_ND, self._embed, self._is_frozen)


class Head(nn.Module):
    """The output table: its own weight, or the input table's when tied (one parameter, two places); and the cap of the
    logits, which all readings share."""

    def __init__(self, table: nn.Module, vocabulary: Any, layers: Any, config: ModelShape):
        super().__init__()
        self.weight, self.softcap = table.weight, config.logit_softcap
        num_rows = vocabulary.size if config.tied else vocabulary.num_outputs
        self.bias = nn.Parameter(torch.empty(num_rows)) if config.head_bias else None
        self.critic = Linear(config.hidden_size, 1) if config.critic else None
        self.labels = Linear(config.hidden_size, 2) if config.labels else None
        self.score = Linear(config.hidden_size, 1) if config.score else None
        self.sampler = SamplerHead(config) if config.sampler_head else None
        self.group = layers.group
        self.num_outputs = vocabulary.num_outputs
        self.rows = table.weight.ds_shape[0] if hasattr(table.weight, "ds_shape") else table.weight.shape[0]
        self.vocab_start = layers.rank * self.rows
        self.suppressed_ids = (vocabulary.mask_id, *vocabulary.suppressed_ids)

    def local_bias(self, device: torch.device) -> torch.Tensor:
        """0 for ids that may be predicted, -inf for the mask, suppressed ids and padding; this rank's rows [V]."""
        ids = torch.arange(self.vocab_start, self.vocab_start + self.rows, device=device)
        forbidden = torch.isin(ids, torch.tensor(self.suppressed_ids, device=device)) | (ids >= self.num_outputs)
        return torch.zeros(self.rows, device=device).masked_fill_(forbidden, -torch.inf)

    def forward(self, hidden_ND: torch.Tensor, readout: Callable[[HeadView], Any], embed: Callable) -> Any:
        return readout(HeadView(self, hidden_ND, embed))


def _latent() -> Any:
    """The ends of Gaussian diffusion, which are made of what is above."""
    from dlm_scale.model import latent

    return latent


class Transformer(nn.Module):
    """Noised ids in; what `readout` makes of the final hidden states at selected positions out.

    Args:
        config: a `ModelShape`.
        vocabulary: offers `size`, `num_outputs`, `mask_id`, `suppressed_ids`.
        layers: makes the sharded layers; whole ones by default.
        checkpoint_every: recompute every n-th block in the backward pass (0: none, 1: all).
    """

    def __init__(self, config: ModelShape, vocabulary: Any, layers: Any = None, checkpoint_every: int = 0):
        super().__init__()
        layers = layers or LocalLayers()
        self.head_dim, self.is_shifted, self.checkpoint_every = config.head_dim, config.logit_shift, checkpoint_every
        self.keeps_no_keys = config.logit_shift or config.window is not None
        self.rope_bases = (config.rope_base, config.window_rope_base if config.window else config.rope_base)
        width = config.hidden_size if config.gaussian is None else config.gaussian.embedding_dim
        self.embedding = layers.embedding(vocabulary.size, width)
        self.latent = _latent().LatentInput(config, layers) if config.gaussian else None
        self.positions = Embedding(config.seq_len, config.hidden_size) if config.position == "learned" else None
        has_norm = config.embedding_norm != "none"
        self.embedding_norm = make_norm(config, layers.over_sequence) if has_norm else nn.Identity()
        self.time_embedding = TimeEmbedding() if config.time_conditioning == "adaln" else None
        self.blocks = nn.ModuleList(Block(config, layers, number) for number in range(config.num_layers))
        self.final_norm = make_norm(config) if config.norm_placement == "pre" else nn.Identity()
        self.head_transform = HeadTransform(config) if config.head_transform else nn.Identity()
        if config.gaussian:
            self.head = _latent().LatentHead(self.embedding, vocabulary, layers, config)
        else:
            table = self.embedding if config.tied else layers.embedding(vocabulary.num_outputs, config.hidden_size)
            self.head = Head(table, vocabulary, layers, config)
        self.select_rows, self.own_positions = layers.select_rows, layers.own_positions
        self.num_parts = layers.size

    def forward(
        self,
        xt_BL: torch.Tensor,
        *,
        rows_N: torch.Tensor,
        readout: Callable[[HeadView], Any],
        m_B: torch.Tensor | None = None,
        attention: ops.AttentionMask | None = None,
        cache: Any = None,
        latent: Any = None,
    ) -> Any:
        """xt [B,L] int64, rows [N] flat positions, m the mask ratio [B] of each row, or with `Segments` [S] of each
        segment (used with time conditioning only).

        `cache`, for inference: `join(layer, k, v)` keeps keys and values or adds the kept ones; where `position_AS` is
        not None, only these positions are computed, and `rows_in_part` gives the rows' places among them.
        `latent`, of Gaussian diffusion: how the vectors of xt are noised, or the vectors that are read in their place.
        """
        if cache is not None and self.keeps_no_keys:
            raise ValueError("keys and values are kept for models of global attention without a shift of logits only: "
                             "leave the cache at none")
        mask = attention or ops.Full()
        positions = ops.positions_BL(mask, *xt_BL.shape, xt_BL.device)
        if cache is not None and cache.position_AS is not None:
            positions = cache.position_AS
            rows_N = cache.rows_in_part(rows_N, xt_BL.shape[1])
            xt_BL, mask = xt_BL.gather(1, positions), queries_of(mask, positions)
        condition_SC, segment_BL = None, None
        if self.time_embedding is not None:
            condition_SC = self.time_embedding(m_B)
            segment_BL = self.own_positions(mask.ids_BL(*xt_BL.shape)) if isinstance(mask, ops.Segments) else None
        hidden_BLD, clean_BLE = self.embedding(xt_BL), None
        if self.latent is not None:
            hidden_BLD, clean_BLE = self.latent(hidden_BLD, latent)
        hidden_BLD, rotaries = self._place(hidden_BLD, positions)
        for number, block in enumerate(self.blocks):
            join = None if cache is None else partial(cache.join, number)
            hidden_BLD = self._run(block, number, hidden_BLD, rotaries, mask, condition_SC, segment_BL, join)
        if self.is_shifted:  # position i is predicted from i - 1; the first of a text from itself
            rows_N = rows_N - (positions.expand(xt_BL.shape).flatten()[rows_N] > 0).long()
        selected_ND = self.final_norm(self.select_rows(hidden_BLD, rows_N))
        clean = () if clean_BLE is None else (self.select_rows(clean_BLE, rows_N),)
        return self.head(self.head_transform(selected_ND), readout, self._embeddings, *clean)

    def _embeddings(self, ids_N: torch.Tensor) -> torch.Tensor:
        """Rows [N, D] of the input table, whole on every rank: looked up as one text, which sequence parallelism cuts
        into equal parts."""
        padding = -len(ids_N) % self.num_parts if len(ids_N) else self.num_parts
        rows_1ND = self.embedding(F.pad(ids_N, (0, padding))[None])
        return self.select_rows(rows_1ND, torch.arange(len(ids_N), device=ids_N.device))

    def _place(self, hidden_BLD: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        """What the first block reads [B,L,D], and the rotary tables of global and of local attention."""
        if self.positions is not None:
            return self.embedding_norm(hidden_BLD + self.positions(positions)), (None, None)
        wide, near = self.rope_bases
        rotary = rotary_tables(positions, self.head_dim, wide)
        local = rotary if near == wide else rotary_tables(positions, self.head_dim, near)
        return self.embedding_norm(hidden_BLD), (rotary, local)

    def _run(self, block, number, *inputs) -> torch.Tensor:
        if self.checkpoint_every and number % self.checkpoint_every == 0 and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)
