"""The sections of a run's config: every key with its type, its range and its default.

Only the standard library and pydantic are imported, so that a wrong config is refused at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

TIED_UP_TO_WIDTH = 1024  # models up to about 350M parameters share the embedding and the head
FFN_MULTIPLE = 128
HEAD_WIDTH_OF_DEPTH = 64

Positive = Annotated[int, Field(gt=0, lt=2**63)]
NonNegative = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


BOTH = "{key} = {value} in the same section says this quantity too; give one of the two (null takes the other out)"
ALTERNATIVE = Field(None, validate_default=True)  # for a key with _unless_given


class Section(BaseModel):
    """Base of all sections: unknown keys and converted types are refused, `null` stands for the default."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {k: v for k, v in values.items() if v is not None or k not in cls.model_fields}


def _default_weighting(values: dict[str, Any]) -> str:
    return "simple" if values["time_loss_weighting"] is False else "count"


def _unless_given(other: str) -> AfterValidator:
    """Of a key whose quantity `other`, a key above it, can say too: exactly one of the two is given."""

    def check(value: Any, info: ValidationInfo) -> Any:
        given = info.data.get(other)
        if other in info.data and value is None and given is None:
            raise PydanticCustomError("missing", "missing")
        if value is not None and given is not None:
            raise PydanticCustomError("both", BOTH, {"key": other, "value": given})
        return value

    return AfterValidator(check)


def _default_ffn_size(values: dict[str, Any]) -> int:
    """4d for GELU; for gated ones 8d/3, up to a multiple of 128, so that both cost about the same."""
    width = values["hidden_size"]
    return 4 * width if values["mlp"].startswith("gelu") else -(-8 * width // (3 * FFN_MULTIPLE)) * FFN_MULTIPLE


class ModelConfig(Section):
    """The transformer's shape. What is left out is derived, and written out in the resolved config."""

    depth: Positive | None = Field(None, exclude=True)  # says the next three: so many layers, and heads of width 64
    num_layers: Positive
    hidden_size: Positive
    num_heads: Positive
    seq_len: Positive
    num_kv_heads: Positive = Field(default_factory=lambda values: values["num_heads"])
    head_dim: Positive = Field(default_factory=lambda values: max(1, values["hidden_size"] // values["num_heads"]))
    mlp: Literal["swiglu", "geglu", "gelu", "gelu_tanh"] = "swiglu"
    ffn_size: Positive = Field(default_factory=_default_ffn_size)
    qk_norm: bool = True
    rope_base: PositiveFloat = 10_000.0
    norm_eps: PositiveFloat = 1e-6
    tied: bool = Field(default_factory=lambda values: values["hidden_size"] <= TIED_UP_TO_WIDTH)
    time_conditioning: Literal["none", "adaln"] = "none"
    logit_softcap: PositiveFloat | None = None  # logits are cap * tanh(logits / cap)
    init_std: PositiveFloat = 0.02
    norm: Literal["rms", "layernorm"] = "rms"
    norm_bias: bool = False
    norm_placement: Literal["pre", "post"] = "pre"  # post: after the sum, as in BERT, and no final norm
    bias: Literal["none", "qkv", "mlp", "all"] = "none"  # which projections have one
    position: Literal["rope", "learned"] = "rope"
    window: Positive | None = None  # local attention: keys at most so far away, but in every global_every-th block
    global_every: Positive = 3
    window_rope_base: PositiveFloat = 10_000.0
    embedding_norm: Literal["none", "extra", "first"] = "none"  # first: in place of the first block's own
    head_transform: bool = False  # dense, GELU and norm before the output table, as in BERT
    head_bias: bool = False
    logit_shift: bool = False  # token i is predicted from position i-1, as an autoregressive model does
    critic: bool = False  # a head that says which ids of a filled text are wrong
    labels: bool = False  # a head of objective.kind = token_classification
    score: bool = False  # a head of objective.kind = sequence_scoring
    sampler_head: bool = False  # a head that predicts an id from those beside it too
    init_from: Text | None = None  # start from the weights of this checkpoint
    _gaussian: GaussianConfig | None = PrivateAttr(None)

    @property
    def gaussian(self) -> GaussianConfig | None:
        """The section of that name where it is the objective's, which Config lends to the shape: it has widths in it."""
        return self._gaussian

    @model_validator(mode="before")
    @classmethod
    def _depth_is_a_shape(cls, values: Any) -> Any:
        """The resolved config shows what model.depth stands for instead of it."""
        depth = values.get("depth") if isinstance(values, Mapping) else None
        if type(depth) is not int or depth < 1:
            return values
        if values.get("num_layers") is not None:
            text = "= {depth} and model." + BOTH
            problem = "model.depth", text.format(depth=depth, key="num_layers", value=values["num_layers"])
            raise PydanticCustomError("problems", "{text}", {"text": " ".join(problem), "all": [problem]})
        shape = {"num_layers": depth, "hidden_size": HEAD_WIDTH_OF_DEPTH * depth, "num_heads": depth}
        return shape | {k: v for k, v in values.items() if k != "depth" and (v is not None or k not in shape)}


class ObjectiveConfig(Section):
    """What the network learns: to fill in masked tokens, its autoregressive twin to predict the next one, Gaussian
    diffusion to denoise token vectors; or of a text some of whose tokens were replaced, which they are, or how many. Then
    what changes the weights of the loss."""

    kind: Literal["masked", "autoregressive", "gaussian", "token_classification", "sequence_scoring"] = "masked"
    label_smoothing: BelowOne = 0.0
    mask_ratio_power: NonNegativeFloat = 0.0  # a row's mean loss weighs (masked share)**-power; 0 = off
    entropy_threshold: Ratio = 0.0  # a row weighs 1 / (entropy of the wrong ids, at least this); 0 = off
    judge: Text | None = None  # a checkpoint of kind sequence_scoring, whose doubt weighs a row
    judge_exponent: PositiveFloat = 1.0
    critic_alpha: NonNegativeFloat = 0.0  # weight of the critic's loss; 0 = off
    critic_start: NonNegative = 0  # step: the weight rises from 0 there ...
    critic_end: NonNegative = 0  # ... to critic_alpha here (default: at once)
    critic_every: Positive = 1  # in every n-th step
    critic_detach: bool = False  # the trunk learns nothing from it
    critic_scope: Literal["masked_only", "masked_and_visible"] = "masked_only"
    critic_weighting: bool = False  # masked tokens weigh as much as the critic doubts them
    sampler_alpha: NonNegativeFloat = 0.0  # weight of the sampler head's loss; 0 = off
    sampler_start: NonNegative = 0  # the first step that has it


def _default_loss(values: dict[str, Any]) -> str:
    return "ce" if values["prediction"] == "x0_softmax" else "vlb"


class GaussianConfig(Section):
    """Diffusion of token vectors, with objective.kind = gaussian only."""

    schedule: Literal["cosine", "linear", "sqrt"] = "cosine"
    num_steps: Annotated[int, Field(ge=2, le=1_000_000)] = 1000  # of the forward process, whose bound is evaluated
    max_snr: PositiveFloat = 20.0  # where the process begins and a sample ends (Plaid: exp 3)
    prediction: Literal["x0_softmax", "v", "eps"] = "x0_softmax"
    loss: Literal["ce", "vlb", "mse"] = Field(default_factory=_default_loss)
    embedding_dim: Annotated[int, Field(ge=2, lt=2**20)] = 32
    embeddings: Literal["unit_norm", "fixed", "free"] = "unit_norm"  # fixed: of length 1 and never trained
    self_conditioning: bool = False


class DiffusionConfig(Section):
    """The forward process and the weighting of the loss."""

    schedule: Literal["linear", "loglinear", "poly", "cosine", "cosine2", "cos", "geometric"] = "linear"
    time_loss_weighting: bool | None = None  # false: weighting = simple, true: another; none: as weighting says
    weighting: Literal["count", "elbo", "exact", "simple"] = Field(default_factory=_default_weighting)
    num_diffusion_steps: NonNegative = 0  # times are rounded up to k/N; 0: continuous
    attention_anneal_steps: NonNegative = 0  # from causal to full attention, after autoregressive weights
    z_loss: NonNegativeFloat = 0.0  # times the squared log-sum-exp of each token with loss, in the loss only
    edit_stage_start: Ratio = 1.0  # share of the steps before visible tokens are corrupted too; 1: never
    corruption_prob: Ratio = 0.1  # of a substitution, an insertion, a deletion at each place
    anneal_corruption: bool = True  # from 0 at the start of the stage, reached at its half
    insertion_corruption: bool = True  # needs <|delete|> among the special tokens
    deletion_corruption: bool = False  # needs <|gap|> among them
    visible_loss: Literal["all", "corrupted"] = "all"  # which visible tokens carry loss in the stage
    visible_subsample: Annotated[float, Field(gt=0, le=1)] = 1.0  # each keeps its loss so often, and weighs 1/r


class Source(Section):
    """One indexed dataset (the path without .bin/.idx) and its share of the mixture."""

    path: Text
    weight: PositiveFloat = 1.0


def _sources(value: Any) -> Any:
    """A plain string is one source; in a list, each string is one of weight 1."""
    if not isinstance(value, list | tuple):
        value = [value]
    return tuple({"path": item} if isinstance(item, str) else item for item in value)


def _sample_ranges(value: Any) -> Any:
    """One range [a, b], or a list of them."""
    if not isinstance(value, list | tuple):
        return value
    is_one = any(isinstance(item, int) for item in value)
    return tuple(tuple(item) if isinstance(item, list) else item for item in ([value] if is_one else value))


def _ascending(ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    bounds = [bound for item in ranges for bound in item]
    if any(start >= stop for start, stop in ranges) or bounds != sorted(bounds):
        raise ValueError("a range of samples [a, b) needs a < b, and several stand in ascending order and apart")
    return ranges


def _texts(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class PrepareConfig(Section):
    """How `dlm prepare --config` makes the dataset (its flags, see there); training takes no notice of it."""

    source: Annotated[tuple[Text, ...], BeforeValidator(_texts), Field(min_length=1)]
    tokenizer: Text | None = None  # of a recipe: its own
    out: Text | None = None  # the folder of data.train
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    text_key: Text = "text"
    max_documents: NonNegative = 0
    max_tokens: NonNegative = 0
    deduplicate: bool = False
    chat: str = ""
    max_length: NonNegative = 0
    special_tokens: Annotated[tuple[Text, ...], BeforeValidator(_texts)] = ()


class DataConfig(Section):
    """What is read. The tokenizer, the vocabulary and the mask id belong to the dataset's meta.json alone."""

    train: Annotated[tuple[Source, ...], BeforeValidator(_sources), Field(min_length=1)]
    validation: Text | None = None
    synthetic_vocab_size: Annotated[int, Field(ge=2, lt=2**31)] | None = None
    packing: Literal["none", "best_fit"] = "none"  # none: windows, cut across documents
    order: Literal["shuffled", "sharded"] = "shuffled"  # sharded: may still be in preparation
    answer_padding: Literal["none", "random", "full"] = "random"  # end tokens after the answers of conversations
    random_length_share: Ratio = 0.0  # of the training rows, cut to a length uniform on 1..seq_len
    prompt_dropout: BelowOne = 0.0  # of the prompts are masked, for classifier-free guidance
    skip_samples: Annotated[
        tuple[tuple[NonNegative, NonNegative], ...], BeforeValidator(_sample_ranges), AfterValidator(_ascending)
    ] = ()
    prepare: PrepareConfig | None = None

    @property
    def is_synthetic(self) -> bool:
        """Whether training reads random tokens instead of a dataset."""
        return any(source.path == "synthetic" for source in self.train)

    @property
    def has_segments(self) -> bool:
        """Whether rows may consist of segments, whose number changes from batch to batch."""
        return self.random_length_share > 0 or self.packing != "none"


class ParallelConfig(Section):
    """How the model is split; the rest of the ranks are data-parallel."""

    tensor_parallel_size: Positive = 1
    sequence_parallel: bool = False


class TrainConfig(Section):
    """Batch, length, precision, cadences and the run folder. Batches count sequences; cadences count steps, 0 = never
    but at the ends of the run. The resolved config shows global_batch_size and num_steps, however they were said."""

    total_batch_size: Positive | None = Field(None, exclude=True)  # tokens: model.seq_len x global_batch_size
    global_batch_size: Annotated[Positive | None, _unless_given("total_batch_size")] = ALTERNATIVE
    micro_batch_size: Positive
    target_param_data_ratio: PositiveFloat | None = None  # tokens a parameter, which give num_steps (train.py)
    num_steps: Annotated[Positive | None, _unless_given("target_param_data_ratio")] = ALTERNATIVE
    precision: Literal["fp32", "bf16"] = "bf16"
    activation_checkpoint_every: NonNegative = 0  # 0 none, 1 every block, n every n-th
    log_every: Positive = 10
    eval_every: NonNegative = 1000
    eval_rows: Positive = 256
    eval_draws: Annotated[Positive, Field(multiple_of=2)] = 8  # two independent halves give the error
    save_every: NonNegative = 1000
    keep_last: Positive = 2
    keep_every: NonNegative = 0
    async_save: bool = True  # write checkpoints behind training, from a copy in host memory
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 1
    out: Text
    resume: Literal["auto", "must", "never"] = "auto"
    branch_from: Text | None = None  # start a new folder from this checkpoint's full state
    stop_at_step: Positive | None = None
    ema_decay: BelowOne = 0.0  # 0 = off
    compile: bool = False
    max_bad_steps: Positive = 3  # in a row, with a loss or gradient that is not finite: then the run ends
    hang_timeout_seconds: PositiveFloat = 1800.0
    wandb: Literal["off", "online", "offline"] = "off"
    device: Literal["auto", "cpu", "cuda"] = "auto"


class OptimizerConfig(Section):
    """The optimizer, its learning-rate schedule and the clipping of the global gradient norm (0 = off)."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: hidden matrices; AdamW for the rest
    learning_rate: PositiveFloat  # of AdamW
    embedding_learning_rate: PositiveFloat | None = None  # of the vocabulary tables; none: learning_rate
    muon_learning_rate: PositiveFloat = 0.01
    muon_momentum: BelowOne = 0.95
    min_learning_rate_ratio: Ratio = 0.1
    warmup_steps: NonNegative = 0
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    decay_fraction: Ratio = 0.2
    weight_decay: NonNegativeFloat = 0.1
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.95
    eps: PositiveFloat = 1e-8
    gradient_clip: NonNegativeFloat = 1.0
