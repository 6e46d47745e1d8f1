"""What no single key of a config shows: keys that contradict each other, and what does not divide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dlm_scale.config_sections import DiffusionConfig, GaussianConfig, ModelConfig, ObjectiveConfig, TrainConfig

if TYPE_CHECKING:
    from dlm_scale.config import Config

MAX_MICRO_TRIED = 256

Problem = tuple[str, str]  # dotted key, what is wrong with it and what to do


def cross_problems(config: Config) -> Iterator[Problem]:
    """What no single key shows."""
    yield from _model_problems(config)
    weighting, schedule = config.diffusion.weighting, config.diffusion.schedule
    if weighting in ("count", "exact") and schedule != "linear":
        yield (
            "diffusion.weighting",
            f"= {weighting} needs diffusion.schedule = linear, not {schedule} (its counts are uniform only there): set "
            "diffusion.weighting=elbo or diffusion.schedule=linear",
        )
    yield from _curriculum_problems(config.diffusion)
    if config.objective.kind == "autoregressive":
        yield from _autoregressive_problems(config)
    yield from _gaussian_problems(config)
    yield from _label_problems(config)
    yield from _modifier_problems(config)
    yield from _head_problems(config)
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
        yield "train.global_batch_size", batch_text(config.train, 1)


def _curriculum_problems(diffusion: DiffusionConfig) -> Iterator[Problem]:
    is_weighted, weighting = diffusion.time_loss_weighting, diffusion.weighting
    if is_weighted is not None and is_weighted != (weighting != "simple"):
        yield (
            "diffusion.time_loss_weighting",
            f"= {str(is_weighted).lower()} contradicts diffusion.weighting = {weighting} (without time weighting it is "
            "simple): give one of them",
        )
    is_exact = weighting == "simple" or (weighting == "elbo" and diffusion.schedule == "linear")
    if diffusion.num_diffusion_steps and not is_exact:
        yield (
            "diffusion.num_diffusion_steps",
            f"= {diffusion.num_diffusion_steps} needs diffusion.weighting = simple, or elbo with the linear schedule, "
            f"whose 1/t is the weight of discrete times too; not {weighting} with {diffusion.schedule}: set "
            "diffusion.weighting=elbo diffusion.schedule=linear, or diffusion.num_diffusion_steps=0",
        )


def _head_problems(config: Config) -> Iterator[Problem]:
    """Losses of heads that are not there, and schedules that never begin."""
    objective = config.objective
    heads = (("critic_alpha", "model.critic", config.model.critic),
             ("sampler_alpha", "model.sampler_head", config.model.sampler_head))  # fmt: skip
    for key, head, is_there in heads:
        value = getattr(objective, key)
        if value and not is_there:
            yield f"objective.{key}", f"= {value} trains a head that the model has not: set {head}=true"
        if value and objective.kind != "masked":
            yield f"objective.{key}", f"= {value} has no meaning under objective.kind = {objective.kind}: set 0"
        if value and config.diffusion.edit_stage_start < 1:
            yield (f"objective.{key}", f"= {value}: the head learns from masked positions alone, and the edit stage "
                   f"(diffusion.edit_stage_start = {config.diffusion.edit_stage_start:g}) moves tokens: leave one out")
    if objective.critic_end and objective.critic_end < objective.critic_start:
        yield "objective.critic_end", f"= {objective.critic_end} is before critic_start = {objective.critic_start}"
    if objective.critic_weighting and not objective.critic_alpha:
        yield "objective.critic_weighting", "= true needs a critic that learns: set objective.critic_alpha"


def _autoregressive_problems(config: Config) -> Iterator[Problem]:
    """The twin has no time, no masks and no weights."""
    why, twin = "has no meaning under objective.kind = autoregressive", DiffusionConfig()
    if config.model.time_conditioning != "none":
        yield "model.time_conditioning", f"= {config.model.time_conditioning} {why}, which knows no time: set none"
    for key in ("schedule", "weighting", "time_loss_weighting", "num_diffusion_steps", "edit_stage_start"):
        value = getattr(config.diffusion, key)
        if value != getattr(twin, key):
            yield f"diffusion.{key}", f"= {value} {why}: leave it out"
    if config.model.logit_shift:
        yield "model.logit_shift", f"= true {why}: the twin is moved by one already; set false"
    for key, default in (("random_length_share", 0.0), ("packing", "none")):  # segments that are causal inside
        if (value := getattr(config.data, key)) != default:
            yield f"data.{key}", f"= {value} is not there under objective.kind = autoregressive: set {default}"


def _gaussian_problems(config: Config) -> Iterator[Problem]:
    """The section belongs to the objective, and the objective to a network that knows the time."""
    if config.objective.kind != "gaussian":
        if config.gaussian != GaussianConfig():
            yield "gaussian", f"has no meaning under objective.kind = {config.objective.kind}: leave it out, or set gaussian"
        return
    needed = "is needed under objective.kind = gaussian"
    for key, value, why in (
        ("time_conditioning", "adaln", "the network must know how much noise there is"),
        ("tied", False, "token vectors and output table are two"),
        ("logit_shift", False, "a vector is predicted where it stands"),
        ("critic", False, "there are no filled texts to judge"),
        ("sampler_head", False, "no token is drawn before another"),
        ("head_bias", False, "the output is a table or a linear head"),
    ):
        if getattr(config.model, key) != value:
            yield f"model.{key}", f"= {value} {needed}, not {getattr(config.model, key)}: {why}"
    own = {"ce": "x0_softmax", "mse": "v or eps"}.get(config.gaussian.loss)
    if own and config.gaussian.prediction not in own:
        yield "gaussian.loss", f"= {config.gaussian.loss} is for prediction {own}, not {config.gaussian.prediction}: set vlb"
    if config.diffusion != DiffusionConfig():
        yield "diffusion", "is of masked diffusion and has no meaning under objective.kind = gaussian: leave it out"
    for key, default in (("random_length_share", 0.0), ("packing", "none")):
        if (value := getattr(config.data, key)) != default:
            yield f"data.{key}", f"= {value} is not there under objective.kind = gaussian: set {default}"


def config_warnings(config: Config) -> Iterator[str]:
    """What is allowed and will disappoint."""
    options = config.gaussian
    if config.objective.kind == "gaussian" and options.loss == "mse" and options.embeddings != "fixed":
        yield (
            f"gaussian.loss = mse with trained token vectors ({options.embeddings}) collapses: vectors that are all alike "
            "make the noise easy to tell, so the loss falls to 0.01 and the samples stay noise (docs/gaussian.md); set "
            "gaussian.prediction=x0_softmax, gaussian.loss=vlb or gaussian.embeddings=fixed"
        )


def _label_problems(config: Config) -> Iterator[Problem]:
    """Each objective of replaced tokens has its head, which nothing else trains."""
    kind, model = config.objective.kind, config.model
    for of_kind, head in (("token_classification", "labels"), ("sequence_scoring", "score")):
        if kind == of_kind and not getattr(model, head):
            yield "objective.kind", f"= {kind} trains a head that the model has not: set model.{head}=true"
        if kind != of_kind and getattr(model, head):
            yield f"model.{head}", f"= true is the head of objective.kind = {of_kind}; nothing of {kind} trains it: set false"
    if kind not in ("token_classification", "sequence_scoring"):
        return
    why, plain = f"has no meaning under objective.kind = {kind}", DiffusionConfig()
    if model.time_conditioning != "none":
        given = model.time_conditioning
        yield "model.time_conditioning", f"= {given} would tell the network how many are replaced: set none"
    for head in ("critic", "sampler_head"):
        if getattr(model, head):
            yield f"model.{head}", f"= true is a head that nothing of objective.kind = {kind} trains: set false"
    for key in ("weighting", "attention_anneal_steps", "z_loss", "edit_stage_start"):
        value = getattr(config.diffusion, key)
        if value != getattr(plain, key):
            yield f"diffusion.{key}", f"= {value} {why}, which fills no masks: leave it out"


def _modifier_problems(config: Config) -> Iterator[Problem]:
    """Loss modifiers weigh masked tokens, and have the weights to themselves."""
    options, plain, diffusion = config.objective, ObjectiveConfig(), config.diffusion
    for key in ("label_smoothing", "mask_ratio_power", "entropy_threshold", "judge", "judge_exponent"):
        value = getattr(options, key)
        if options.kind != "masked" and value != getattr(plain, key):
            yield f"objective.{key}", f"= {value} changes the loss of objective.kind = masked alone: leave it out"
    if options.mask_ratio_power and diffusion.weighting != "simple":
        yield (
            "objective.mask_ratio_power",
            f"= {options.mask_ratio_power} takes the place of diffusion.weighting = {diffusion.weighting}: set "
            "diffusion.weighting=simple (the NELBO is reported all the same)",
        )
    if options.mask_ratio_power and options.critic_weighting:
        yield (
            "objective.mask_ratio_power",
            f"= {options.mask_ratio_power} takes the place of the weights that objective.critic_weighting = true makes: "
            "leave one of them out",
        )
    added = {"diffusion.z_loss": diffusion.z_loss, "objective.critic_alpha": options.critic_alpha,
             "objective.sampler_alpha": options.sampler_alpha}  # fmt: skip
    for key, value in added.items():
        if options.entropy_threshold and value:
            yield (
                "objective.entropy_threshold",
                f"= {options.entropy_threshold} needs {key} = 0, not {value}: the whole gradient is divided by the "
                "mean weight of the global batch, and that part would be with it",
            )
    if options.judge_exponent != plain.judge_exponent and options.judge is None:
        yield "objective.judge_exponent", f"= {options.judge_exponent} needs a judge: set objective.judge"


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


def batch_text(train: TrainConfig, ranks: int) -> str:
    wanted, micro = train.global_batch_size, train.micro_batch_size
    tries = " | ".join(
        f"train.global_batch_size={g} train.micro_batch_size={m}" for g, m in nearest_batches(wanted, micro, ranks)
    )
    return (
        f"= {wanted} must be micro_batch_size x accumulation x data-parallel ranks, but {wanted} / ({micro} x {ranks})"
        f" = {wanted / (micro * ranks):.4g} is not a whole number. Nearest that fit: {tries}"
    )
