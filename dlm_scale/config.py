"""The typed config of a run: schema, YAML, dotted overrides, and errors that name the key, the cause and the remedy.

Every quantity has one owner here; DeepSpeed's own section is passed through, less what is owned here. Only the
standard library, pydantic and yaml are imported, so that a wrong config is refused at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from dlm_scale.config_text import assign, dump_yaml, parse_overrides, parse_yaml
from dlm_scale.deepspeed_keys import closest, deepspeed_problems, unknown_key_text
from dlm_scale.errors import UsageError

MAX_SHOWN_PROBLEMS = 5
TIED_UP_TO_WIDTH = 1024  # models up to about 350M parameters share the embedding and the head
FFN_MULTIPLE = 128
MAX_MICRO_TRIED = 256

Problem = tuple[str, str]  # dotted key, what is wrong with it and what to do

Positive = Annotated[int, Field(gt=0, lt=2**63)]
NonNegative = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys and converted types are refused, `null` stands for the default."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {k: v for k, v in values.items() if v is not None or k not in cls.model_fields}


def _default_ffn_size(values: dict[str, Any]) -> int:
    """4d for GELU; for gated ones 8d/3, up to a multiple of 128, so that both cost about the same."""
    width = values["hidden_size"]
    return 4 * width if values["mlp"].startswith("gelu") else -(-8 * width // (3 * FFN_MULTIPLE)) * FFN_MULTIPLE


class ModelConfig(Section):
    """The transformer's shape. What is left out is derived, and written out in the resolved config."""

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
    init_from: Text | None = None  # start from the weights of this checkpoint


class ObjectiveConfig(Section):
    """What the network learns: to fill in masked tokens, or its autoregressive twin to predict the next one."""

    kind: Literal["masked", "autoregressive"] = "masked"


class DiffusionConfig(Section):
    """The forward process and the weighting of the loss."""

    schedule: Literal["linear", "loglinear", "poly", "cosine", "cosine2", "cos", "geometric"] = "linear"
    weighting: Literal["count", "elbo", "exact", "simple"] = "count"
    attention_anneal_steps: NonNegative = 0  # from causal to full attention, after autoregressive weights
    z_loss: NonNegativeFloat = 0.0  # times the squared log-sum-exp of each masked token, in the loss only


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
    random_length_share: Ratio = 0.0  # of the training rows, cut to a length uniform on 1..seq_len
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
    but at the ends of the run."""

    global_batch_size: Positive
    micro_batch_size: Positive
    num_steps: Positive
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


def _raise_if(problems: list[Problem]) -> None:
    if problems:
        raise PydanticCustomError("problems", "{text}", {"text": "; ".join(map(" ".join, problems)), "all": problems})


def _checked_deepspeed(section: dict[str, Any]) -> dict[str, Any]:
    _raise_if(deepspeed_problems(section))
    zero = section.get("zero_optimization", {})
    return {**section, "zero_optimization": {"stage": 0, **zero}}


class Config(Section):
    """The whole config of a run; `load_config` makes it."""

    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    optimizer: OptimizerConfig
    deepspeed: Annotated[dict[str, Any], AfterValidator(_checked_deepspeed)] = Field({}, validate_default=True)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        _raise_if(list(_cross_problems(self)))
        return self


def _cross_problems(config: Config) -> Iterator[Problem]:
    """What no single key shows."""
    yield from _model_problems(config)
    weighting, schedule = config.diffusion.weighting, config.diffusion.schedule
    if weighting in ("count", "exact") and schedule != "linear":
        yield (
            "diffusion.weighting",
            f"= {weighting} needs diffusion.schedule = linear, not {schedule} (its counts are uniform only there): set "
            "diffusion.weighting=elbo or diffusion.schedule=linear",
        )
    if config.objective.kind == "autoregressive":
        yield from _autoregressive_problems(config)
    if config.model.init_from and config.train.branch_from:
        yield "model.init_from", "starts from weights alone, train.branch_from from the full state: give one of them"
    if config.diffusion.attention_anneal_steps and (config.data.has_segments or config.train.compile):
        yield (
            "diffusion.attention_anneal_steps",
            "needs data.random_length_share = 0, data.packing = none and train.compile = false: its mask changes",
        )
    if config.data.is_synthetic and (len(config.data.train) > 1 or not config.data.synthetic_vocab_size):
        yield "data.train", "= synthetic stands alone and needs data.synthetic_vocab_size"
    for key, value, default in (("packing", config.data.packing, "none"), ("order", config.data.order, "shuffled")):
        if config.data.is_synthetic and value != default:
            yield f"data.{key}", f"= {value} needs documents on the disk, which data.train=synthetic has none of: drop it"
    if config.train.global_batch_size % config.train.micro_batch_size:
        yield "train.global_batch_size", _batch_text(config.train, 1)


def _autoregressive_problems(config: Config) -> Iterator[Problem]:
    """The twin has no time, no masks and no weights."""
    why, twin = "has no meaning under objective.kind = autoregressive", DiffusionConfig()
    if config.model.time_conditioning != "none":
        yield "model.time_conditioning", f"= {config.model.time_conditioning} {why}, which knows no time: set none"
    for key in ("schedule", "weighting"):
        value = getattr(config.diffusion, key)
        if value != getattr(twin, key):
            yield f"diffusion.{key}", f"= {value} {why}: leave it out"
    if config.model.logit_shift:
        yield "model.logit_shift", f"= true {why}: the twin is moved by one already; set false"
    for key, default in (("random_length_share", 0.0), ("packing", "none")):  # segments that are causal inside
        if (value := getattr(config.data, key)) != default:
            yield f"data.{key}", f"= {value} is not there under objective.kind = autoregressive: set {default}"


def _model_problems(config: Config) -> Iterator[Problem]:
    model, tp = config.model, config.parallel.tensor_parallel_size
    if "head_dim" not in model.model_fields_set and model.hidden_size % model.num_heads:
        yield _indivisible("model.hidden_size", model.hidden_size, "model.num_heads", model.num_heads)
    elif model.head_dim % 2 and model.position == "rope":
        yield "model.head_dim", f"is {model.head_dim}: rotary positions need an even width per head"
    if model.num_heads % model.num_kv_heads:
        yield _indivisible("model.num_heads", model.num_heads, "model.num_kv_heads", model.num_kv_heads)
    for key, needed in _model_needs(model, tp):
        yield f"model.{key}", f"= {getattr(model, key)} needs {needed}"
    for key, value in _unshardable(config, tp):
        fitting = [size for size in range(1, model.num_heads + 1) if not any(_unshardable(config, size))]
        nearest = sorted(sorted(fitting, key=lambda size: abs(size - tp))[:3])
        problem = _indivisible(key, value, "parallel.tensor_parallel_size", tp)
        yield key, f"{problem[1]}; nearest sizes that fit: {nearest}"


def _model_needs(model: ModelConfig, tp: int) -> Iterator[tuple[str, str]]:
    """(key, what it needs) of each option of the shape that does not go with another."""
    needs = [
        ("norm_bias", model.norm_bias, "model.norm = layernorm", model.norm == "layernorm"),
        ("time_conditioning", model.time_conditioning == "adaln", "model.norm_placement = pre",
         model.norm_placement == "pre"),
        ("embedding_norm", model.embedding_norm == "first", "model.norm_placement = pre",
         model.norm_placement == "pre"),
        *(
            (key, getattr(model, key) not in ("none", "rope", False), "parallel.tensor_parallel_size = 1", tp == 1)
            for key in ("bias", "position", "head_bias")
        ),
    ]  # fmt: skip
    yield from ((key, needed) for key, is_used, needed, is_given in needs if is_used and not is_given)


def _unshardable(config: Config, tp: int) -> Iterator[tuple[str, int]]:
    """What a tensor-parallel size of `tp` does not divide (vocabularies always do: tables are padded)."""
    model = config.model
    if model.num_heads % tp:
        yield "model.num_heads", model.num_heads
    if model.num_kv_heads % tp and tp % model.num_kv_heads:
        yield "model.num_kv_heads", model.num_kv_heads
    if model.ffn_size % tp:
        yield "model.ffn_size", model.ffn_size
    if config.parallel.sequence_parallel and model.seq_len % tp:
        yield "model.seq_len", model.seq_len


def _indivisible(key: str, value: int, by_key: str, by: int) -> Problem:
    return key, f"= {value} does not divide by {by_key} = {by}"


def nearest_batches(global_batch: int, micro_batch: int, ranks: int) -> list[tuple[int, int]]:
    """The three (global, micro) batch sizes that fit `ranks` data-parallel ranks with the least relative change."""
    choices = set()
    for micro in {micro_batch, *range(1, min(2 * micro_batch, MAX_MICRO_TRIED) + 1)}:
        multiple = max(1, global_batch // (micro * ranks))
        choices |= {(micro * ranks * k, micro) for k in (multiple, multiple + 1, multiple + 2)}
    wanted = (global_batch, micro_batch)
    return sorted(choices, key=lambda c: (sum(max(a / b, b / a) for a, b in zip(c, wanted, strict=True)), c))[:3]


def _batch_text(train: TrainConfig, ranks: int) -> str:
    wanted, micro = train.global_batch_size, train.micro_batch_size
    tries = " | ".join(
        f"train.global_batch_size={g} train.micro_batch_size={m}" for g, m in nearest_batches(wanted, micro, ranks)
    )
    return (
        f"= {wanted} must be micro_batch_size x accumulation x data-parallel ranks, but {wanted} / ({micro} x {ranks})"
        f" = {wanted / (micro * ranks):.4g} is not a whole number. Nearest that fit: {tries}"
    )


def resolve_batch(config: Config, data_parallel_size: int) -> int:
    """Micro-batches that each data-parallel rank accumulates for one step.

    Raises UsageError, with the equation and the three nearest valid settings, where it does not divide.
    """
    unit = config.train.micro_batch_size * data_parallel_size
    if config.train.global_batch_size % unit:
        raise UsageError(f"train.global_batch_size {_batch_text(config.train, data_parallel_size)}")
    return config.train.global_batch_size // unit


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent if path.parent.is_dir() else Path("configs")
        near = difflib.get_close_matches(path.name, [p.name for p in folder.glob("*.yaml")], n=1)
        raise UsageError(f"config {path} not found" + (f"; did you mean {folder / near[0]}?" if near else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read config {path}: {error}") from None


def _sections(text: str, source: str) -> dict[str, Any]:
    raw = parse_yaml(text, source)
    if not isinstance(raw, dict):
        raise UsageError(f"{source} is no config: expected the sections {', '.join(Config.model_fields)}")
    return raw


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file with dotted overrides applied, checked and resolved.

    Raises UsageError with one line for each thing that is wrong (at most five), naming key, source and remedy.
    """
    raw = _sections(_read(Path(path)), str(path))
    settings = parse_overrides(overrides)
    for key, value in settings.items():
        assign(raw, key, value)
    return config_from_dict(raw, str(path), tuple(settings))


def config_from_dict(raw: Mapping[str, Any], source: str = "the config", command_line: Sequence[str] = ()) -> Config:
    """A checked Config of plain values. `command_line` lists the dotted keys to blame on it instead of on `source`."""
    try:
        return Config.model_validate(dict(raw))
    except ValidationError as error:
        problems = [problem for item in error.errors() for problem in _problems_of(item, command_line)]
    lines = [f"{key} ({_origin(key, command_line) or source}) {text}" for key, text in problems]
    if len(lines) > MAX_SHOWN_PROBLEMS:
        lines[MAX_SHOWN_PROBLEMS - 1 :] = [f"and {len(lines) - MAX_SHOWN_PROBLEMS + 1} more"]
    raise UsageError("\n".join(lines))


def config_from_text(text: str, source: str, sections: Mapping[str, Any] | None = None) -> Config:
    """The config of a saved config.yaml's text, with other sections in the place of its own."""
    return config_from_dict(_sections(text, source) | dict(sections or {}), source)


def _origin(key: str, command_line: Sequence[str]) -> str | None:
    """`command line` where a key given there sets `key`, or a part of it."""
    for given in command_line:
        if key == given or key.startswith((given + ".", given + "[")) or given.startswith(key + "."):
            return "command line"
    return None


def _problems_of(item: dict[str, Any], command_line: Sequence[str]) -> list[Problem]:
    """What one pydantic error says, in our words."""
    kind, loc = item["type"], item["loc"]
    if kind == "problems":
        return [tuple(problem) for problem in item["ctx"]["all"]]
    if kind == "default_factory_not_called":  # follows from another error
        return []
    key = _dotted(loc)
    if kind == "extra_forbidden":
        typed = next((given for given in command_line if given.startswith(key + ".")), key)
        return [(typed, _unknown_text(loc, typed[len(key) :]))]
    if kind == "missing":
        return [(key, "is missing: it has no default")]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return [(key, f"is {item['input']!r:.60}: expected a mapping of keys to values")]
    expected = item["msg"].replace("Input should be", "expected").replace("valid string", "text")
    return [(key, f"is {item['input']!r:.60}: {expected}{_choice_hint(item)}")]


def _choice_hint(item: dict[str, Any]) -> str:
    choices = re.findall(r"'([^']*)'", str(item.get("ctx", {}).get("expected", "")))
    guess = closest(item["input"], choices) if isinstance(item["input"], str) else None
    return f"; did you mean {guess}?" if guess else ""


def _dotted(loc: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


def _unknown_text(loc: Sequence[str | int], tail: str) -> str:
    """Suggests a key of the same section, or else another section's of that name. `tail` is what was typed below."""
    *parents, name = loc
    valid, parent = list(_section_at(parents).model_fields), _dotted(parents)
    if guess := closest(str(name), valid):
        hint = _dotted([*parents, guess]) + tail
    else:
        hint = next((key for key in known_keys() if key.endswith(f".{name}")), None)
    return unknown_key_text(str(name), parent, valid, hint)


def _section_at(parents: Sequence[str | int]) -> type[Section]:
    section: Any = Config
    for part in parents:
        annotation = section.model_fields[part].annotation if isinstance(part, str) else section
        section = (get_args(annotation) or (annotation,))[0]
    return section


def known_keys() -> list[str]:
    """Every dotted key of our own sections."""
    sections = {n: f.annotation for n, f in Config.model_fields.items() if n != "deepspeed"}
    return [f"{name}.{key}" for name, section in sections.items() for key in section.model_fields]


def dump_config(config: Config) -> str:
    """The resolved config as YAML text; `load_config` reads it back to an equal Config."""
    return dump_yaml(config.model_dump(mode="json"))
