"""Likelihoods of a data set under checkpoints: the bound, exact ones, and the paired difference of two checkpoints."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dlm_scale.diffusion.draws import default_estimator
from dlm_scale.diffusion.likelihood import (
    NelboEstimate,
    RowSums,
    bits_per_byte,
    difference,
    duel_nll,
    exact_sums,
    left_to_right_nll,
    perplexity,
    summarise,
)
from dlm_scale.engine.evaluation import SumsOfBatch, autoregressive_sums, cross_entropy_fn, dataset_sums, nelbo_sums
from dlm_scale.engine.gaussian_evaluation import gaussian_sums
from dlm_scale.engine.objectives import process_of
from dlm_scale.errors import UsageError
from dlm_scale.sampling.samplers import SAMPLERS, Sampler
from dlm_scale.sampling.selectors import SELECTORS, Candidates

ORDERS = {  # of `--order`: a sampler whose order and counts are a function of the state alone
    "max_prob": Sampler(selector="max_prob"),
    "margin": SAMPLERS["margin"],
    "entropy": SAMPLERS["entropy"],
    "entropy_bounded": SAMPLERS["entropy_bounded"],
    "threshold": SAMPLERS["threshold"],
}


@dataclass(frozen=True)
class LikelihoodOptions:
    """likelihood: `nelbo` (of an autoregressive checkpoint: its exact likelihood), `duel` or `l2r`."""

    likelihood: str = "nelbo"
    estimator: str | None = None
    num_draws: int = 8
    batch_size: int = 16
    seed: int = 0
    order: str = "max_prob"
    tokens_per_step: int = 1


def likelihood_kind(inference: Any, options: LikelihoodOptions) -> str:
    """`nelbo`, `exact` (autoregressive), `vlb` (Gaussian), `duel` or `l2r`. Raises UsageError where the checkpoint has
    no such one."""
    own = {"autoregressive": ("exact", "which is exact"), "gaussian": ("vlb", "a bound")}
    if inference.kind not in own:
        return options.likelihood
    found, words = own[inference.kind]
    if options.likelihood != "nelbo":
        raise UsageError(f"--likelihood={options.likelihood}: {inference.checkpoint.path} is {inference.kind} and has "
                         f"one likelihood, {words}: leave --likelihood out")
    if inference.is_gaussian and options.estimator:
        raise UsageError(f"--estimator={options.estimator} is of masks, and {inference.checkpoint.path} is gaussian: "
                         "leave it out")
    return found


def sums_of_batch(inference: Any, options: LikelihoodOptions) -> SumsOfBatch:
    """(x0_BL, row_index_B) -> RowSums by the options' likelihood."""
    kind, mask_id = likelihood_kind(inference, options), inference.vocabulary.mask_id
    ce_fn = cross_entropy_fn(inference.model, inference.device)
    if kind == "exact":
        return autoregressive_sums(ce_fn, mask_id)
    if kind == "vlb":
        process = process_of(inference.config.gaussian)
        return gaussian_sums(inference.model, inference.device, process, mask_id, options.num_draws, options.seed)
    if kind == "nelbo":
        return nelbo_sums(ce_fn, mask_id, options.num_draws, options.seed, options.estimator)
    nll = partial(left_to_right_nll, inference.predict, mask_id=mask_id)
    if kind == "duel":
        nll = partial(_duel, inference.predict, ORDERS[options.order], options.tokens_per_step, mask_id)

    def sums(x0_BL, row_index_B) -> RowSums:
        nll_B = nll(torch.from_numpy(x0_BL).to(inference.device))
        return exact_sums(row_index_B, nll_B.cpu().numpy(), 0 * row_index_B + x0_BL.shape[1])

    return sums


def _duel(predict: Callable, sampler: Sampler, tokens_per_step: int, mask_id: int, x0_BL: torch.Tensor) -> torch.Tensor:
    selector = SELECTORS[sampler.selector]
    extent = selector.extent and (lambda sorted_BL: selector.extent(sorted_BL, sampler))
    score = lambda log_probs_NV: selector.score(Candidates(log_probs_NV, None, None, None), sampler)  # noqa: E731
    return duel_nll(predict, x0_BL, score=score, mask_id=mask_id, tokens_per_step=tokens_per_step, extent=extent)[0]


def evaluate_checkpoints(inferences: Sequence[Any], data: Any, options: LikelihoodOptions, runtime: Any) -> dict:
    """The report of the first checkpoint on `data`, and where there is a second one its figures and the paired
    difference (first minus second, on the same rows and masks). Collective."""
    require_comparable(inferences)
    parts = []
    for inference in inferences:
        if data.meta.is_chat and likelihood_kind(inference, options) not in ("nelbo", "vlb"):
            raise UsageError(f"{data.prefix} holds conversations, whose past is given: only the bound of diffusion checkpoints "
                             "is defined for them here; leave --likelihood out, or evaluate on text")
        progress = Progress(data.num_rows, options.batch_size, runtime)
        parts.append(dataset_sums(sums_of_batch(inference, options), data, options.batch_size, runtime.mesh, progress))
    reports = [checkpoint_report(i, summarise(p), data, options) for i, p in zip(inferences, parts)]
    if len(reports) == 1:
        return reports[0]
    return reports[0] | {"other": reports[1], "difference": difference_report(difference(*parts))}


def require_comparable(inferences: Sequence[Any]) -> None:
    """UsageError unless all checkpoints read the same rows: one tokenizer and one context length."""
    from dlm_scale.data.loader import require_same_tokenizer

    first, *others = inferences
    for other in others:
        names = [str(inference.checkpoint.path) for inference in (first, other)]
        require_same_tokenizer(first.tokenizer_meta, other.tokenizer_meta, *names)
        if first.seq_len != other.seq_len:
            raise UsageError(f"a paired difference needs the same rows, but model.seq_len is {first.seq_len} in "
                             f"{names[0]} and {other.seq_len} in {names[1]}: evaluate them one by one")


def checkpoint_report(inference: Any, estimate: NelboEstimate, data: Any, options: LikelihoodOptions) -> dict[str, Any]:
    """nelbo (nats/token; an upper bound unless `likelihood` says that it is exact), its standard errors, and more."""
    num_bytes = estimate.tokens * data.bytes_per_token if data.bytes_per_token else None
    in_bits = (lambda nats: bits_per_byte(nats, estimate.tokens, num_bytes)) if num_bytes else lambda nats: None
    kind = likelihood_kind(inference, options)
    is_char = inference.tokenizer_meta.tokenizer.kind == "char"
    report = {
        "nelbo": estimate.nelbo,
        "nelbo_se": finite_or_none(estimate.nelbo_se),
        "nelbo_se_mc": estimate.nelbo_se_mc,
        "ppl": perplexity(estimate.nelbo),
        "tokens": estimate.tokens,
        "bits_per_byte": in_bits(estimate.nelbo),
        "bits_per_byte_se": in_bits(finite_or_none(estimate.nelbo_se) or 0.0),
        "bits_per_character": estimate.nelbo / math.log(2) if is_char else None,
        "rows": estimate.rows,
        "likelihood": kind,
        "step": inference.step,
        "weights": "ema" if inference.weights == "ema" else "raw",
    }
    if kind == "nelbo":
        used = {"estimator": options.estimator or default_estimator(options.num_draws), "num_draws": options.num_draws,
                "seed": options.seed}
        return report | {"ce_by_mask_ratio": list(estimate.ce_by_mask_ratio)} | used
    if kind == "vlb":
        return report | {"num_draws": options.num_draws, "seed": options.seed, **inference.config.gaussian.model_dump()}
    return report | ({"order": options.order, "tokens_per_step": options.tokens_per_step} if kind == "duel" else {})


def difference_report(found: NelboEstimate) -> dict[str, Any]:
    """First minus second, nats per token, with the 95 % interval over rows: one that excludes 0 tells them apart."""
    se = finite_or_none(found.nelbo_se)
    return {
        "nelbo": found.nelbo,
        "nelbo_se": se,
        "nelbo_se_mc": found.nelbo_se_mc,
        "interval": None if se is None else [found.nelbo - 1.96 * se, found.nelbo + 1.96 * se],
    }


def finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Progress:
    """A counting line on stderr where that is a terminal."""

    def __init__(self, num_rows: int, batch_size: int, runtime: Any):
        self.total = -(-num_rows // batch_size // runtime.mesh.data_size)
        self.shown = runtime.is_first and sys.stderr.isatty()

    def __call__(self, done: int) -> None:
        if self.shown:
            end = "\n" if done >= self.total else ""
            print(f"\revaluating: batch {done} of {self.total}", end=end, file=sys.stderr)
