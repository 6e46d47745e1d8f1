"""The one train step: micro-batches in, one optimizer update and its statistics out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dlm_scale import ops
from dlm_scale.diffusion.autoregressive import shifted
from dlm_scale.diffusion.corruption import Corrupted, corrupt
from dlm_scale.diffusion.gaussian import noised
from dlm_scale.diffusion.labels import LABEL_OBJECTIVES
from dlm_scale.diffusion.modifiers import ENTROPY_WEIGHT
from dlm_scale.diffusion.schedule import SCHEDULES
from dlm_scale.diffusion.segments import Rows, cut_rows, drop_prompts, row_lengths, segment_times
from dlm_scale.diffusion.substitution import replaceable_ids, substitute
from dlm_scale.diffusion.timestep import stratified_times, times_on_grid
from dlm_scale.diffusion.weighting import WEIGHTINGS
from dlm_scale.engine.build import Trainer
from dlm_scale.engine.editing import edited
from dlm_scale.engine.gradients import clip_by_global_norm
from dlm_scale.engine.muon import muon_update
from dlm_scale.engine.objectives import process_of, with_draws
from dlm_scale.engine.optimizer import rate_factor
from dlm_scale.engine.state import TrainState
from dlm_scale.engine.state_access import inner_optimizer
from dlm_scale.errors import UsageError

ANNEAL_STAGES = 16
SCALARS = ("loss_sum", "nelbo_sum", "ce_sum", "num_masked", "num_correct", "num_maskable")
BINS = ("ce_sum_bins", "num_masked_bins")


def rows_of_rank(trainer: Trainer) -> np.ndarray:
    """Indices [accumulation, micro] within the global batch of the rows that this data-parallel rank computes."""
    train, mesh = trainer.config.train, trainer.runtime.mesh
    rows = np.arange(train.global_batch_size)
    return rows.reshape(trainer.accumulation, mesh.data_size, train.micro_batch_size)[:, mesh.data_rank]


def sample_ids(skipped: Sequence[tuple[int, int]], position: np.ndarray) -> np.ndarray:
    """Global sample indices of positions in the run's sequence of samples: `skipped`, ascending ranges [start, stop)
    of indices, are passed over."""
    for start, stop in skipped:
        position = np.where(position >= start, position + (stop - start), position)
    return position


def samples_of_rank(trainer: Trainer, state: TrainState) -> np.ndarray:
    """Global sample indices [accumulation, micro] of this rank's rows in the step after `state`."""
    return sample_ids(trainer.config.data.skip_samples, state.samples + rows_of_rank(trainer))


def make_batch(trainer: Trainer, data, state: TrainState) -> list[Corrupted]:
    """This rank's micro-batches of the step after `state`, noised, where `ops.masks_on` says.

    Ids, times and masks are functions of (seed, step, global sample) alone, so no layout changes them.
    """
    train = trainer.config.train
    times_G = stratified_times(train.seed, state.step, train.global_batch_size)
    pairs = zip(rows_of_rank(trainer), samples_of_rank(trainer, state), strict=True)
    return [micro_batch(trainer, data, sample_B, times_G[rows_B], state.step) for rows_B, sample_B in pairs]


def micro_batch(trainer: Trainer, data, sample_B: np.ndarray, t_B: np.ndarray, step: int = 0) -> Corrupted:
    """The rows of some global samples, noised at their times as the update after `step` finished ones asks.

    `data.rows(sample_B)` gives int64 [B, L], or `Rows` where documents are packed or positions carry no loss; a run's
    rows are all of one kind, for with `Rows` the ranks ask each other for the denominator.
    """
    config, length = trainer.config, trainer.config.model.seq_len
    given = data.rows(sample_B)
    is_whole = not isinstance(given, Rows) and not config.data.random_length_share
    rows = given if isinstance(given, Rows) else Rows(given, np.ones(given.shape, bool))
    if config.data.random_length_share:
        rows = cut_rows(rows, row_lengths(config.train.seed, sample_B, length, config.data.random_length_share))
    if config.data.prompt_dropout:
        if not isinstance(given, Rows):
            raise UsageError("data.prompt_dropout: the rows of data.train have no prompts to leave out; prepare "
                             "conversations, or labels with their texts, with --chat")
        rows = drop_prompts(rows, config.train.seed, sample_B, config.data.prompt_dropout, trainer.vocabulary.mask_id)
    denominator = float(config.train.global_batch_size * length) if is_whole else None
    if config.objective.kind == "autoregressive":
        return _next_token_batch(trainer, rows, sample_B, denominator)
    if config.objective.kind == "gaussian":
        return _noised_batch(trainer, rows, sample_B, t_B, denominator)
    attention, t_S = None, t_B
    if rows.bounds_S1 is not None:
        attention = ops.Segments(torch.from_numpy(rows.bounds_S1))
        t_S = segment_times(config.train.seed, sample_B, t_B, rows.bounds_S1, length)
    if config.diffusion.num_diffusion_steps:
        t_S = times_on_grid(t_S, config.diffusion.num_diffusion_steps)
    options = {"seed": config.train.seed, "schedule": SCHEDULES[config.diffusion.schedule],
               "mask_id": trainer.vocabulary.mask_id, "denominator": denominator, "maskable_BL": rows.maskable_BL,
               "attention": attention}
    if config.objective.kind in LABEL_OBJECTIVES:
        return substitute(rows.ids_BL, sample_B, t_S, ids_K=text_ids(data.tokenizer_meta), **options)
    corrupted = corrupt(rows.ids_BL, sample_B, t_S, weighting=WEIGHTINGS[config.diffusion.weighting],
                        mask_tokens=ops.masks_on(trainer.runtime.device), **options)
    corrupted = edited(trainer, getattr(data, "edits", None), corrupted, rows, sample_B, step)
    return with_draws(config, corrupted, rows.maskable_BL, sample_B)


def text_ids(meta: Any) -> np.ndarray:
    """The ids that may take another's place: not the mask, the separator of documents, nor what is never predicted."""
    eos_ids = () if meta.eos_id is None else (meta.eos_id,)
    ids_K = replaceable_ids(meta.vocab_size, (meta.mask_id, *meta.suppressed_ids, *eos_ids))
    if len(ids_K) < 2:
        raise UsageError(f"the vocabulary has {len(ids_K)} ids of text, so none could be replaced by another: prepare "
                         "data of a larger one, or take objective.kind=masked")
    return ids_K


def _next_token_batch(trainer: Trainer, rows: Rows, sample_B: np.ndarray, denominator: float | None) -> Corrupted:
    if rows.bounds_S1 is not None:
        raise UsageError("objective.kind=autoregressive: documents packed into rows need attention that is causal "
                         "within each of them, which is not there yet; prepare or read the data without packing")
    return shifted(rows.ids_BL, sample_B, mask_id=trainer.vocabulary.mask_id, denominator=denominator,
                   causal=ops.Causal(), maskable_BL=rows.maskable_BL)


def _noised_batch(trainer: Trainer, rows: Rows, sample_B: np.ndarray, t_B: np.ndarray,
                  denominator: float | None) -> Corrupted:
    process = process_of(trainer.config.gaussian)
    attention = None if rows.bounds_S1 is None else ops.Segments(torch.from_numpy(rows.bounds_S1))
    return noised(rows.ids_BL, sample_B, process.steps(t_B), seed=trainer.config.train.seed, process=process,
                  mask_id=trainer.vocabulary.mask_id, denominator=denominator, maskable_BL=rows.maskable_BL,
                  attention=attention)


def with_denominator(trainer: Trainer, batch: Sequence[Corrupted]) -> list[Corrupted]:
    """The micro-batches with the global batch's maskable positions. Collective."""
    mine = float(sum(corrupted.num_maskable_B.sum() for corrupted in batch))
    count = torch.tensor(mine, dtype=torch.float64, device=trainer.runtime.device)
    if trainer.runtime.mesh.data_size > 1:
        dist.all_reduce(count, group=trainer.runtime.mesh.data_group)
    return [dataclasses.replace(corrupted, denominator=max(1.0, count.item())) for corrupted in batch]


def annealed(engine: Any, config: Any, step: int) -> Callable:
    """The network, its attention opened from causal to full in ANNEAL_STAGES parts of diffusion.attention_anneal_steps
    (DiffuLLaMA, arXiv 2410.17891, opens it at random places; here position by position, so that it needs no noise)."""
    num_steps, length = config.diffusion.attention_anneal_steps, config.model.seq_len
    if step >= num_steps:
        return engine
    lookahead = ops.Lookahead(length * (ANNEAL_STAGES * step // num_steps) // ANNEAL_STAGES)

    def hidden_fn(*inputs: Any, attention: Any = None, **options: Any) -> Any:
        if attention is not None:
            raise UsageError("diffusion.attention_anneal_steps: rows of packed documents have a mask of their own; set"
                             " it to 0, or prepare the data unpacked")  # fmt: skip
        return engine(*inputs, attention=lookahead, **options)

    return hidden_fn


def loss_of(trainer: Trainer, hidden_fn: Callable, corrupted: Corrupted, step: int) -> tuple[torch.Tensor, dict]:
    """What the run's objective says of one micro-batch (docs/design.md, signature 2)."""
    return trainer.objective(hidden_fn, corrupted, step)


def train_step(trainer: Trainer, batch: Sequence[Corrupted], state: TrainState,
               enter: Callable[[str], None] = lambda phase: None,
               before_update: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Accumulate gradients over `batch`, clip by the global norm, update the weights.

    A loss or gradient that is not finite on any rank makes the norm so, which all ranks share: then all of them leave
    weights and optimizer as they are. Entropy weights come undivided by their mean over the global batch, which all
    micro-batches and ranks share in; the loss being linear in its inverse, gradient and losses are divided here.
    `enter` is told each phase as it begins; until `before_update` is called, nothing of the training state changes.

    Returns device tensors, not yet summed over ranks: `sums` (float64, SCALARS, then BINS, then sum and number of each
    of `means`), `losses` (loss sums of the micro-batches) and `grad_norm` (the true global norm before clipping); and
    `means` (names), `is_skipped`, `denominator`.
    """
    engine, mesh = trainer.engine, trainer.runtime.mesh
    factor = rate_factor(state.step, trainer.config.train.num_steps, trainer.config.optimizer)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["rate"] * factor
    hidden_fn, sums, losses = annealed(engine, trainer.config, state.step), 0.0, []
    if batch[0].denominator is None:
        enter("agree")
        batch = with_denominator(trainer, batch)
    for corrupted in batch:
        enter("forward")
        corrupted = corrupted.to(trainer.runtime.device, non_blocking=True)
        loss_sum, stats = loss_of(trainer, hidden_fn, corrupted, state.step)
        found = {"loss_sum": loss_sum.detach(), **stats, "num_maskable": corrupted.num_maskable_B.sum()}
        means = sorted(found.keys() - {*SCALARS, *BINS})
        scalars = torch.stack([found[name].double() for name in SCALARS])
        sums = sums + torch.cat([scalars, *(stats[name] for name in (*BINS, *means))])
        losses.append(loss_sum.detach())
        enter("backward")
        # DeepSpeed averages gradients over the data-parallel ranks: undo that, and its division by the accumulation.
        scale = torch.where(losses[-1].isfinite(), mesh.data_size / corrupted.denominator, torch.nan)
        engine.backward(loss_sum * scale, scale_wrt_gas=False)
        if engine.is_gradient_accumulation_boundary():
            enter("update")
            before_update()
            divisor = mean_of_batch(trainer, sums, means, ENTROPY_WEIGHT) if ENTROPY_WEIGHT in means else None
            norm = clip_by_global_norm(trainer, trainer.config.optimizer.gradient_clip, divisor)
            is_skipped = prepare_update(trainer, norm, factor)
        engine.step()
    if divisor is not None:
        sums = torch.cat([sums[:1] / divisor, sums[1:]])  # loss_sum
        losses = [loss / divisor for loss in losses]
    return {"sums": sums, "means": means, "losses": losses, "grad_norm": norm, "is_skipped": is_skipped,
            "denominator": batch[0].denominator}


def mean_of_batch(trainer: Trainer, sums: torch.Tensor, means: Sequence[str], name: str) -> torch.Tensor:
    """float64 scalar: one of the `means` over the global batch, 1 where nothing counted. Collective."""
    pair = sums[len(sums) - 2 * len(means) :].view(-1, 2)[means.index(name)].clone()
    if trainer.runtime.mesh.data_size > 1:
        dist.all_reduce(pair, group=trainer.runtime.mesh.data_group)
    return torch.where(pair[1] > 0, pair[0] / pair[1].clamp(min=1), 1.0)


def prepare_update(trainer: Trainer, norm: torch.Tensor, factor: float) -> bool:
    """What comes before the optimizer's own step: Muon's, or where the norm is not finite the order to skip both.

    Returns whether the update is skipped. Collective.
    """
    options, optimizer = trainer.config.optimizer, inner_optimizer(trainer.engine)
    optimizer.is_skipping = not bool(norm.isfinite())
    if optimizer.is_skipping:
        optimizer.skip()
    elif options.name == "muon":
        muon_update(trainer, options.muon_learning_rate * factor)
    return optimizer.is_skipping


def loss_share(trainer: Trainer, result: dict[str, Any]) -> float:
    """What this rank adds to the global batch's loss in nats a token: the sum over all ranks is that loss."""
    return float(sum(result["losses"])) / result["denominator"] / trainer.runtime.mesh.tensor_size


def reduce_sums(trainer: Trainer, sums: torch.Tensor, means: Sequence[str] = ()) -> dict[str, Any]:
    """Statistics of the global batch: loss (z-loss included) and NELBO in nats a maskable token, mean CE and accuracy a
    masked one, and its mean CE by mask ratio, None in an empty bin and where no token was masked; then the means that
    the objective adds, None where there was nothing. Collective; `sums` become those of all ranks."""
    if trainer.runtime.mesh.data_size > 1:
        dist.all_reduce(sums, group=trainer.runtime.mesh.data_group)
    loss, nelbo, ce, masked, correct, maskable = sums[: len(SCALARS)].tolist()
    added = sums[len(sums) - 2 * len(means) :].view(-1, 2).tolist()
    ce_bins, num_bins = sums[len(SCALARS) : len(sums) - 2 * len(means)].view(len(BINS), -1).tolist()
    return {
        "loss": loss / max(1.0, maskable),
        "nelbo": nelbo / max(1.0, maskable) if masked else None,
        "masked_ce": ce / masked if masked else None,
        "masked_accuracy": correct / masked if masked else None,
        "ce_by_mask_ratio": [ce / num if num else None for ce, num in zip(ce_bins, num_bins)],
        **{name: total / num if num else None for name, (total, num) in zip(means, added, strict=True)},
    }
