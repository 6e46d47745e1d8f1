"""The families of models that can be converted: which field of their config.json is which of our shape, and which
tensor is which (mapping.py). Each is read in both directions. What does not fit is refused by name.

Sources: the published architectures of LLaDA (arXiv 2502.09992), Dream (2508.15487), GPT-2, Llama, Qwen2 and Qwen3,
BERT (1810.04805), ModernBERT (2412.13663), MDLM (2406.07524).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dlm_scale.convert import folding
from dlm_scale.convert.mapping import Row
from dlm_scale.errors import UsageError

Json = Mapping[str, Any]
PLAIN = {  # what a shape is where a family does not say otherwise
    "mlp": "swiglu", "qk_norm": False, "time_conditioning": "none", "logit_softcap": None, "norm": "rms",
    "norm_bias": False, "norm_placement": "pre", "bias": "none", "position": "rope", "window": None,
    "embedding_norm": "none", "head_transform": False, "head_bias": False, "logit_shift": False,
}  # fmt: skip
WHOLE_HEADS = {"num_kv_heads": lambda shape: shape["num_heads"],
               "head_dim": lambda shape: shape["hidden_size"] // shape["num_heads"]}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One kind of model.

    rows       the tensors
    keys       field of our shape -> key of config.json
    fixed      fields that are the same in all its models: a value, or a function of the other fields
    says       what config.json must say where it says anything: key -> value
    read       further fields from config.json; `write` further keys from a shape
    ignored    patterns of tensors that hold no weights
    sizes      keys of config.json that count the ids of the vocabulary
    mask       where the mask is if neither tokenizer nor config.json says: `last` id, `new` id behind them, or None
    fold       tensors that take the place of others (folding.py), and `unfold` the way back
    """

    rows: tuple[Row, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    says: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[Json], dict[str, Any]] = lambda config: {}
    write: Callable[[Any], dict[str, Any]] = lambda shape: {}
    ignored: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ("vocab_size",)
    mask: str | None = None
    fold: Callable | None = None
    unfold: Callable | None = None

    def shape_of(self, config: Json, where: str) -> dict[str, Any]:
        """Fields of our shape. Raises UsageError, naming the key that is missing or not supported."""
        for key, value in self.says.items():
            if config.get(key, value) != value:
                raise UsageError(f"{where}: {key} = {config[key]!r} is not supported, only {value!r}")
        missing = [
            key for ours, key in self.keys.items() if key not in config and ours not in ("num_kv_heads", "head_dim")
        ]
        if missing:
            raise UsageError(f"{where} has no {missing[0]}: it is not of the model_type that it names")
        shape = {ours: config[key] for ours, key in self.keys.items() if config.get(key) is not None}
        shape |= self.read(config)
        rest = {name: value for name, value in (WHOLE_HEADS | PLAIN | self.fixed).items() if name not in shape}
        return {name: value(shape) if callable(value) else value for name, value in rest.items()} | shape

    def config_of(self, shape: Any) -> dict[str, Any]:
        """config.json of a model of ours. Raises UsageError, naming the field that such a model does not have."""
        values = shape.model_dump()
        told = self.write(shape)
        back = self.shape_of(
            {**self.says, **{key: values[ours] for ours, key in self.keys.items()}, **told}, "the export"
        )
        for name, value in back.items():
            if values[name] != value:
                raise UsageError(
                    f"a model with model.{name} = {values[name]!r} is none of this family, which has {value!r}"
                )
        return {**self.says, **{key: values[ours] for ours, key in self.keys.items()}, **told}


def family_of(config: Json, where: str) -> str:
    """The name of the family that a config.json is of. Raises UsageError."""
    name = str(config.get("model_type")).lower()
    if name not in FAMILIES:
        raise UsageError(
            f"{where}: model_type {config.get('model_type')!r} is no family that is known here; known are "
            f"{', '.join(FAMILIES)}"
        )
    return name


def rope_base(config: Json) -> dict[str, float]:
    """The base of plain rotary positions, as older and newer files say it. Raises UsageError for scaled ones."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    kind = new.get("rope_type") or old.get("rope_type") or old.get("type") or "default"
    if kind != "default":
        raise UsageError(f"rope_scaling {kind!r} is not supported: our rotary positions are not scaled")
    return {"rope_base": float(new.get("rope_theta", config.get("rope_theta", 10_000.0)))}


def both(ours: str, theirs: str, how: str = "same", bias_how: str | None = None) -> tuple[Row, Row]:
    """The rows of a layer's weight and bias; in `theirs`, KIND stands for either."""
    return tuple((f"{ours}.{kind}", theirs.replace("KIND", kind), way)
                 for kind, way in (("weight", how), ("bias", bias_how or how)))  # fmt: skip


def norm(ours: str, theirs: str) -> tuple[Row, Row]:
    return (f"{ours}.gain", f"{theirs}.weight", "same"), (f"{ours}.bias", f"{theirs}.bias", "same")


# Llama and its kin: Qwen2, Qwen3, and Dream, which is Qwen2 made a diffusion model
_LAYER = "model.layers.{}"
DECODER = Family(
    rows=(
        ("embedding.weight", "model.embed_tokens.weight", "same"),
        *norm("blocks.{}.attention_norm", f"{_LAYER}.input_layernorm"),
        *both("blocks.{}.attention.qkv", " ".join(f"{_LAYER}.self_attn.{x}_proj.KIND" for x in "qkv"), "qkv"),
        ("blocks.{}.attention.query_norm.gain", f"{_LAYER}.self_attn.q_norm.weight", "same"),
        ("blocks.{}.attention.key_norm.gain", f"{_LAYER}.self_attn.k_norm.weight", "same"),
        *both("blocks.{}.attention.out", f"{_LAYER}.self_attn.o_proj.KIND"),
        *norm("blocks.{}.mlp_norm", f"{_LAYER}.post_attention_layernorm"),
        *both("blocks.{}.mlp.gate_up", f"{_LAYER}.mlp.gate_proj.KIND {_LAYER}.mlp.up_proj.KIND", "gate_up"),
        *both("blocks.{}.mlp.down", f"{_LAYER}.mlp.down_proj.KIND"),
        *norm("final_norm", "model.norm"),
        ("head.weight", "lm_head.weight", "same"),
    ),
    keys={
        "num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "ffn_size": "intermediate_size",
        "seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings",
    },
    fixed={"logit_shift": True},
    says={"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False, "mlp_bias": False},
    read=rope_base,
    write=lambda shape: {"rope_theta": shape.rope_base},
    ignored=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
    mask="new",
)  # fmt: skip


def _kin(says: Json = {}, **fixed: Any) -> Family:
    unsaid = ("attention_bias", "mlp_bias", "use_sliding_window")
    kept = {key: value for key, value in DECODER.says.items() if key not in unsaid}
    return Family(**{**vars(DECODER), "fixed": {**DECODER.fixed, **fixed}, "says": {**kept, **says}})


_OLMO = "model.transformer.blocks.{}"
LLADA = Family(
    rows=(
        ("embedding.weight", "model.transformer.wte.weight", "same"),
        *norm("blocks.{}.attention_norm", f"{_OLMO}.attn_norm"),
        ("blocks.{}.attention.qkv.weight", " ".join(f"{_OLMO}.{x}_proj.weight" for x in "qkv"), "qkv"),
        ("blocks.{}.attention.out.weight", f"{_OLMO}.attn_out.weight", "same"),
        *norm("blocks.{}.mlp_norm", f"{_OLMO}.ff_norm"),
        ("blocks.{}.mlp.gate_up.weight", f"{_OLMO}.ff_proj.weight {_OLMO}.up_proj.weight", "gate_up"),
        ("blocks.{}.mlp.down.weight", f"{_OLMO}.ff_out.weight", "same"),
        *norm("final_norm", "model.transformer.ln_f"),
        ("head.weight", "model.transformer.ff_out.weight", "same"),
    ),
    keys={
        "num_layers": "n_layers", "hidden_size": "d_model", "num_heads": "n_heads", "num_kv_heads": "n_kv_heads",
        "ffn_size": "mlp_hidden_size", "seq_len": "max_sequence_length", "norm_eps": "rms_norm_eps",
        "tied": "weight_tying", "rope_base": "rope_theta",
    },
    says={
        "block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True, "alibi": False,
        "include_bias": False, "include_qkv_bias": False, "attention_layer_norm": False, "scale_logits": False,
        "input_emb_norm": False, "block_group_size": 1,
    },
    write=lambda shape: {"architectures": ["LLaDAModelLM"]},
    sizes=("vocab_size", "embedding_size"),
)  # fmt: skip

GPT2 = Family(
    rows=(
        ("embedding.weight", "transformer.wte.weight", "same"),
        ("positions.weight", "transformer.wpe.weight", "same"),
        *norm("blocks.{}.attention_norm", "transformer.h.{}.ln_1"),
        *both("blocks.{}.attention.qkv", "transformer.h.{}.attn.c_attn.KIND", "fused_transposed", "fused"),
        *both("blocks.{}.attention.out", "transformer.h.{}.attn.c_proj.KIND", "transposed", "same"),
        *norm("blocks.{}.mlp_norm", "transformer.h.{}.ln_2"),
        *both("blocks.{}.mlp.up", "transformer.h.{}.mlp.c_fc.KIND", "transposed", "same"),
        *both("blocks.{}.mlp.down", "transformer.h.{}.mlp.c_proj.KIND", "transposed", "same"),
        *norm("final_norm", "transformer.ln_f"),
        ("head.weight", "lm_head.weight", "same"),
    ),
    keys={"num_layers": "n_layer", "hidden_size": "n_embd", "num_heads": "n_head", "seq_len": "n_positions",
          "norm_eps": "layer_norm_epsilon"},
    fixed={"norm": "layernorm", "norm_bias": True, "bias": "all", "mlp": "gelu_tanh", "position": "learned",
           "logit_shift": True},
    says={"activation_function": "gelu_new", "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True,
          "add_cross_attention": False},
    read=lambda config: {"ffn_size": config.get("n_inner") or 4 * config["n_embd"],
                         "tied": config.get("tie_word_embeddings", True)},
    write=lambda shape: {"n_inner": shape.ffn_size, "tie_word_embeddings": shape.tied},
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
    mask="new",
)  # fmt: skip

_BERT = "bert.encoder.layer.{}"
BERT = Family(
    rows=(
        ("embedding.weight", "bert.embeddings.word_embeddings.weight", "same"),
        ("positions.weight", "bert.embeddings.position_embeddings.weight", "same"),
        *norm("embedding_norm", "bert.embeddings.LayerNorm"),
        *both("blocks.{}.attention.qkv",
              " ".join(f"{_BERT}.attention.self.{part}.KIND" for part in ("query", "key", "value")), "qkv"),
        *both("blocks.{}.attention.out", f"{_BERT}.attention.output.dense.KIND"),
        *norm("blocks.{}.attention_norm", f"{_BERT}.attention.output.LayerNorm"),
        *both("blocks.{}.mlp.up", f"{_BERT}.intermediate.dense.KIND"),
        *both("blocks.{}.mlp.down", f"{_BERT}.output.dense.KIND"),
        *norm("blocks.{}.mlp_norm", f"{_BERT}.output.LayerNorm"),
        *both("head_transform.dense", "cls.predictions.transform.dense.KIND"),
        *norm("head_transform.norm", "cls.predictions.transform.LayerNorm"),
        ("head.weight", "cls.predictions.decoder.weight", "same"),
        ("head.bias", "cls.predictions.bias", "same"),
    ),
    keys={"num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "num_heads": "num_attention_heads",
          "ffn_size": "intermediate_size", "seq_len": "max_position_embeddings", "norm_eps": "layer_norm_eps"},
    fixed={"norm": "layernorm", "norm_bias": True, "norm_placement": "post", "bias": "all", "mlp": "gelu",
           "position": "learned", "embedding_norm": "extra", "head_transform": True, "head_bias": True},
    says={"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False},
    read=lambda config: {"tied": config.get("tie_word_embeddings", True)},
    write=lambda shape: {"tie_word_embeddings": shape.tied, "type_vocab_size": 2},
    ignored=(r"bert\.embeddings\.position_ids", r"bert\.pooler\..*", r"cls\.seq_relationship\..*",
             r"cls\.predictions\.decoder\.bias"),
    fold=folding.fold_bert,
    unfold=folding.unfold_bert,
)  # fmt: skip


def _modernbert_ropes(config: Json) -> dict[str, Any]:
    """Two bases of rotary positions and the blocks of global attention, as older and newer files say them; half of the
    local window to each side."""
    new = config.get("rope_parameters") or {}
    wide, near = (
        rope_base({"rope_parameters": new.get(kind), "rope_theta": config.get(old, default)})
        for kind, old, default in (("full_attention", "global_rope_theta", 160_000.0),
                                   ("sliding_attention", "local_rope_theta", 10_000.0))
    )  # fmt: skip
    every = config.get("global_attn_every_n_layers")
    if kinds := config.get("layer_types"):
        every = next((i for i, kind in enumerate(kinds) if i and kind == "full_attention"), len(kinds))
        if any((kind == "full_attention") != (i % every == 0) for i, kind in enumerate(kinds)):
            raise UsageError("layer_types: global attention must come in every n-th block, the first one included")
    return {"rope_base": wide["rope_base"], "window_rope_base": near["rope_base"], "global_every": every or 3,
            "window": config["local_attention"] // 2, "tied": config.get("tie_word_embeddings", True)}  # fmt: skip


_MODERN = "model.layers.{}"
MODERNBERT = Family(
    rows=(
        ("embedding.weight", "model.embeddings.tok_embeddings.weight", "same"),
        *norm("embedding_norm", "model.embeddings.norm"),
        *norm("blocks.{}.attention_norm", f"{_MODERN}.attn_norm"),
        ("blocks.{}.attention.qkv.weight", f"{_MODERN}.attn.Wqkv.weight", "fused"),
        ("blocks.{}.attention.out.weight", f"{_MODERN}.attn.Wo.weight", "same"),
        *norm("blocks.{}.mlp_norm", f"{_MODERN}.mlp_norm"),
        ("blocks.{}.mlp.gate_up.weight", f"{_MODERN}.mlp.Wi.weight", "same"),
        ("blocks.{}.mlp.down.weight", f"{_MODERN}.mlp.Wo.weight", "same"),
        *norm("final_norm", "model.final_norm"),
        ("head_transform.dense.weight", "head.dense.weight", "same"),
        *norm("head_transform.norm", "head.norm"),
        ("head.weight", "decoder.weight", "same"),
        ("head.bias", "decoder.bias", "same"),
    ),
    keys={"num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "num_heads": "num_attention_heads",
          "ffn_size": "intermediate_size", "seq_len": "max_position_embeddings", "norm_eps": "norm_eps",
          "norm_bias": "norm_bias", "head_bias": "decoder_bias"},
    fixed={"norm": "layernorm", "mlp": "geglu", "embedding_norm": "first", "head_transform": True},
    says={"hidden_activation": "gelu", "classifier_activation": "gelu", "attention_bias": False, "mlp_bias": False,
          "classifier_bias": False},
    read=_modernbert_ropes,
    write=lambda shape: {"local_attention": 2 * shape.window if shape.window else 0,
                         "global_attn_every_n_layers": shape.global_every, "global_rope_theta": shape.rope_base,
                         "local_rope_theta": shape.window_rope_base, "tie_word_embeddings": shape.tied,
                         **dict.fromkeys(f"{name}_token_id" for name in ("bos", "cls", "eos", "pad", "sep"))},
)  # fmt: skip

_DIT = "backbone.blocks.{}"
MDLM = Family(
    rows=(
        ("embedding.weight", "backbone.vocab_embed.embedding", "same"),
        *norm("blocks.{}.attention_norm", f"{_DIT}.norm1"),
        ("blocks.{}.attention.qkv.weight", f"{_DIT}.attn_qkv.weight", "fused"),
        ("blocks.{}.attention.out.weight", f"{_DIT}.attn_out.weight", "same"),
        *norm("blocks.{}.mlp_norm", f"{_DIT}.norm2"),
        *both("blocks.{}.mlp.up", f"{_DIT}.mlp.0.KIND"),
        *both("blocks.{}.mlp.down", f"{_DIT}.mlp.2.KIND"),
        *norm("final_norm", "backbone.output_layer.norm_final"),
        ("head.weight", "backbone.output_layer.linear.weight", "same"),
        ("head.bias", "backbone.output_layer.linear.bias", "same"),
    ),
    keys={"num_layers": "n_blocks", "hidden_size": "hidden_dim", "num_heads": "n_heads", "seq_len": "model_length"},
    fixed={"norm": "layernorm", "norm_bias": True, "mlp": "gelu_tanh", "bias": "mlp", "head_bias": True, "tied": False,
           "norm_eps": 1e-5, "rope_base": 10_000.0, "ffn_size": lambda shape: 4 * shape["hidden_size"]},
    says={"time_conditioning": False},
    write=lambda shape: {"cond_dim": folding.DIT_WIDTH, "dropout": 0.0, "architectures": ["MDLM"]},
    ignored=(r"backbone\.rotary_emb\.inv_freq",),
    mask="last",
    fold=folding.fold_dit,
    unfold=folding.unfold_dit,
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "dlm_scale": Family(),  # our own class: reader.py knows its names
    "llada": LLADA,
    "dream": _kin({"use_sliding_window": False}, bias="qkv"),
    "gpt2": GPT2,
    "llama": DECODER,
    "qwen2": _kin({"use_sliding_window": False}, bias="qkv"),
    "qwen3": _kin({"use_sliding_window": False, "attention_bias": False}, qk_norm=True),
    "bert": BERT,
    "modernbert": MODERNBERT,
    "mdlm": MDLM,
}
