"""Every parameter of a model as data: name, logical shape, how it shards, how it starts.

This table is what checkpoints, conversion, initialisation, parameter counts and the planner agree on; the modules in
transformer.py are checked against it. Names are those of `Transformer.named_parameters()`. Needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol


class ModelShape(Protocol):
    """What a config must offer, with nothing left open (dlm_scale.config.ModelConfig does; so can others)."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    mlp: str
    qk_norm: bool
    rope_base: float
    norm_eps: float
    tied: bool
    time_conditioning: str
    logit_softcap: float | None
    init_std: float
    seq_len: int
    norm: str
    norm_bias: bool
    norm_placement: str
    bias: str
    position: str
    window: int | None
    global_every: int
    window_rope_base: float
    embedding_norm: str
    head_transform: bool
    head_bias: bool
    logit_shift: bool
    critic: bool
    labels: bool
    score: bool
    sampler_head: bool
    gaussian: Any  # None, or what config_sections.GaussianConfig has


TIME_FEATURES = 256  # sinusoid features of the mask ratio
TIME_WIDTH = 128  # width of the conditioning vector
GATED_MLPS = ("swiglu", "geglu")
BIASES = {"none": (), "qkv": ("qkv",), "mlp": ("up", "down"), "all": ("qkv", "out", "up", "down")}


@dataclass(frozen=True)
class ParameterSpec:
    """One logical (unsharded, unpadded) parameter.

    `view` is `shape` with fused dimensions split, so that a tensor-parallel rank owns a rectangle of it: elements
    [a, b) of dimension `shard_dim`. `shard_dim` None means replicated. It starts as N(0, init_std), or as the
    constant `init_value`. `decays` says whether weight decay applies.
    """

    name: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    shard_dim: int | None
    init_std: float = 0.0
    init_value: float = 0.0
    decays: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_table(self) -> bool:
        """A vocabulary table: its rows are padded, and it is not a matrix that transforms hidden states."""
        return self.shard_dim == 0 and not self.decays

    @property
    def is_hidden_matrix(self) -> bool:
        """A matrix of a block that maps hidden states to hidden states: what Muon orthogonalises."""
        return self.decays and self.shard_dim is not None

    @property
    def is_grouped(self) -> bool:
        """A fused QKV projection: view (key/value heads, queries + 2, head width, width)."""
        return len(self.view) == 4


def parameter_table(config: ModelShape, vocabulary: Any) -> dict[str, ParameterSpec]:
    """All parameters in the order of the modules. `vocabulary` offers `size` and `num_outputs`."""
    width, std = config.hidden_size, config.init_std
    specs = [_table("embedding.weight", vocabulary.size, width, std)] if config.gaussian is None else (
        _latent_specs(config, vocabulary))
    if config.position == "learned":
        shape = (config.seq_len, width)
        specs.append(ParameterSpec("positions.weight", shape, shape, None, init_std=std))
    if config.embedding_norm != "none":
        specs += _norm_specs("embedding_norm", config)
    if config.time_conditioning == "adaln":
        specs += _time_specs(std)
    for layer in range(config.num_layers):
        specs += _block_specs(layer, config)
    # A tied table must not start at zero, so there the zero gain of the last norm makes the first loss exactly ln V.
    last_gain = 0.0 if config.tied else 1.0
    if config.norm_placement == "pre":
        specs += _norm_specs("final_norm", config, 1.0 if config.head_transform else last_gain)
    if config.head_transform:
        shape = (width, width)
        specs.append(_matrix("head_transform.dense.weight", shape, shape, None, std))
        specs += [_vector("head_transform.dense.bias", width, 0.0)] if config.bias == "all" else []
        specs += _norm_specs("head_transform.norm", config, last_gain)
    if config.gaussian is not None:
        specs.append(_latent_head_spec(config, vocabulary))
    elif not config.tied:
        specs.append(_table("head.weight", vocabulary.num_outputs, width, 0.0))
    if config.head_bias:
        specs.append(_vector("head.bias", vocabulary.size if config.tied else vocabulary.num_outputs, 0.0))
    specs += _extra_head_specs(config)
    return {spec.name: spec for spec in specs}


# What a model may lack that another is started from.
EXTRA_HEADS = ("head.critic.", "head.sampler.", "head.labels.", "head.score.")


def _extra_head_specs(config: ModelShape) -> list[ParameterSpec]:
    """The heads beside the output table; no tensor-parallel rank holds a part of one.

    The sampler head's second matrix starts at zero: what it adds to the hidden states is nothing at first.
    """
    width, std, specs = config.hidden_size, config.init_std, []
    for name, rows in (("critic", 1), ("labels", 2), ("score", 1)):
        if getattr(config, name):
            specs.append(_matrix(f"head.{name}.weight", (rows, width), (rows, width), None, std))
    if config.sampler_head:
        specs.append(_matrix("head.sampler.first.weight", (width, 3 * width), (width, 3 * width), None, std))
        specs.append(_vector("head.sampler.norm.gain", width, 1.0))
        specs.append(_matrix("head.sampler.second.weight", (width, width), (width, width), None, 0.0))
    return specs


def _latent_specs(config: ModelShape, vocabulary: Any) -> list[ParameterSpec]:
    """Of Gaussian diffusion: token vectors of about unit length, and what maps them to hidden states."""
    dim, std = config.gaussian.embedding_dim, config.init_std
    shape = (config.hidden_size, dim)
    specs = [_table("embedding.weight", vocabulary.size, dim, dim**-0.5)]
    specs.append(_matrix("latent.weight", shape, shape, None, std))
    return specs + ([_matrix("latent.guess_weight", shape, shape, None, 0.0)] if config.gaussian.self_conditioning else [])


def _latent_head_spec(config: ModelShape, vocabulary: Any) -> ParameterSpec:
    """An output table with a row for every id, as the token vectors have; for v and eps a linear head."""
    if config.gaussian.prediction == "x0_softmax":
        return _table("head.weight", vocabulary.size, config.hidden_size, 0.0)
    shape = (config.gaussian.embedding_dim, config.hidden_size)
    return _matrix("head.output.weight", shape, shape, None, 0.0)


def has_first_norm(config: ModelShape, layer: int) -> bool:
    """Whether a block's attention has a norm of its own: the first one's may be the norm of the embeddings."""
    return layer > 0 or config.embedding_norm != "first"


def _norm_specs(prefix: str, config: ModelShape, gain: float = 1.0) -> list[ParameterSpec]:
    specs = [_vector(f"{prefix}.gain", config.hidden_size, gain)]
    return specs + ([_vector(f"{prefix}.bias", config.hidden_size, 0.0)] if config.norm_bias else [])


def _block_specs(layer: int, config: ModelShape) -> list[ParameterSpec]:
    prefix, biased = f"blocks.{layer}", BIASES[config.bias]
    std, out_std = config.init_std, config.init_std / math.sqrt(2 * config.num_layers)
    width, ffn, group = config.hidden_size, config.ffn_size, config.num_heads // config.num_kv_heads + 2
    qkv_view = (config.num_kv_heads, group, config.head_dim, width)
    qkv_rows, attended = math.prod(qkv_view[:3]), config.num_heads * config.head_dim
    bias_of = {"qkv": ("attention.qkv", qkv_rows), "out": ("attention.out", width), "down": ("mlp.down", width)}
    bias_of["up"] = ("mlp.gate_up", 2 * ffn) if config.mlp in GATED_MLPS else ("mlp.up", ffn)
    specs = _norm_specs(f"{prefix}.attention_norm", config) if has_first_norm(config, layer) else []
    specs.append(_matrix(f"{prefix}.attention.qkv.weight", (qkv_rows, width), qkv_view, 0, std))
    if config.qk_norm:
        specs += [_vector(f"{prefix}.attention.{which}_norm.gain", config.head_dim, 1.0) for which in ("query", "key")]
    specs.append(_matrix(f"{prefix}.attention.out.weight", (width, attended), (width, attended), 1, out_std))
    specs += _norm_specs(f"{prefix}.mlp_norm", config)
    if config.mlp in GATED_MLPS:
        specs.append(_matrix(f"{prefix}.mlp.gate_up.weight", (2 * ffn, width), (2, ffn, width), 1, std))
    else:
        specs.append(_matrix(f"{prefix}.mlp.up.weight", (ffn, width), (ffn, width), 0, std))
    specs.append(_matrix(f"{prefix}.mlp.down.weight", (width, ffn), (width, ffn), 1, out_std))
    if config.time_conditioning == "adaln":
        shape = (6 * width, TIME_WIDTH)
        specs.append(_matrix(f"{prefix}.modulation.weight", shape, shape, None, 0.0))
    # No tensor-parallel rank holds a part of a bias, but the fused one has the view of its matrix.
    for name, rows in (bias_of[part] for part in biased):
        view = qkv_view[:3] if name == "attention.qkv" else (rows,)
        specs.append(ParameterSpec(f"{prefix}.{name}.bias", (rows,), view, None))
    return specs


def _time_specs(std: float) -> list[ParameterSpec]:
    shapes = {"time_embedding.first.weight": TIME_FEATURES, "time_embedding.second.weight": TIME_WIDTH}
    return [_matrix(name, (TIME_WIDTH, n), (TIME_WIDTH, n), None, std) for name, n in shapes.items()]


def _table(name: str, rows: int, width: int, std: float) -> ParameterSpec:
    return ParameterSpec(name, (rows, width), (rows, width), 0, init_std=std)


def _matrix(name, shape, view, shard_dim, std) -> ParameterSpec:
    return ParameterSpec(name, shape, view, shard_dim, init_std=std, decays=True)


def _vector(name: str, width: int, value: float) -> ParameterSpec:
    return ParameterSpec(name, (width,), (width,), None, init_value=value)


def count_parameters(config: ModelShape, vocabulary: Any) -> int:
    """Logical parameters, padding not counted."""
    return sum(spec.numel for spec in parameter_table(config, vocabulary).values())


def flops_per_token(config: ModelShape, vocabulary: Any, attended_length: float, head_fraction: float = 0.5) -> float:
    """Training FLOPs a token: 6 N_block + 12 n_layer h e T_eff + 6 d V rho. Recomputation is not counted.

    `attended_length` is the mean number of keys a query sees (full attention: the row's length), `head_fraction` the
    share of rows that pass the output head (half under a uniform mask ratio).
    """
    table = parameter_table(config, vocabulary)
    block = sum(spec.numel for name, spec in table.items() if name.startswith(("blocks.", "final_norm")))
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * attended_length
    return 6 * block + attention + 6 * config.hidden_size * vocabulary.num_outputs * head_fraction


PEAK_BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a known GPU, in FLOP/s; None for any other device (no MFU is reported there)."""
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in device_name), None)
