"""Which objective a run's config asks for, as one function of a micro-batch (docs/design.md, signature 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from dlm_scale.diffusion.corruption import Corrupted
from dlm_scale.diffusion.edit import visible_stats
from dlm_scale.diffusion.fill import fill_uniforms
from dlm_scale.diffusion.gaussian import Process
from dlm_scale.diffusion.gaussian_objective import gaussian_diffusion
from dlm_scale.diffusion.labels import LABEL_OBJECTIVES
from dlm_scale.diffusion.modifiers import Judge, Modifiers, modified_weights
from dlm_scale.diffusion.objective import masked_diffusion
from dlm_scale.engine.editing import is_editing

Objective = Callable[[Callable, Corrupted, int], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def objective_of(config: Any, judge: Judge | None = None) -> Objective:
    """objective(hidden_fn, corrupted, step) -> (loss_sum, stats). `judge` is what `objective.judge` names."""
    options = config.objective
    if (options.judge is None) != (judge is None):
        raise ValueError(f"objective.judge is {options.judge}, and a judge was {'not ' * (judge is None)}given")
    if options.kind in LABEL_OBJECTIVES:
        label = LABEL_OBJECTIVES[options.kind]
        return lambda hidden_fn, corrupted, step: label(hidden_fn, corrupted)
    if options.kind == "gaussian":
        gaussian = partial(gaussian_diffusion, process=process_of(config.gaussian), loss=config.gaussian.loss)
        return lambda hidden_fn, corrupted, step: gaussian(hidden_fn, corrupted)
    plain = partial(masked_diffusion, z_loss=config.diffusion.z_loss, label_smoothing=options.label_smoothing)
    modifiers = Modifiers(options.mask_ratio_power, options.entropy_threshold, options.judge_exponent)
    is_modified = bool(modifiers.mask_ratio_power or modifiers.entropy_threshold or judge)

    def objective(hidden_fn: Callable, corrupted: Corrupted, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        masked = partial(plain, measures=[visible_stats] if is_editing(config, step) else [])
        return modified(masked, hidden_fn, corrupted, modifiers, judge) if is_modified else masked(hidden_fn, corrupted)

    return objective


def process_of(options: Any) -> Process:
    """The forward process of the section `gaussian`."""
    return Process(options.schedule, options.num_steps, options.prediction, options.embedding_dim,
                   options.self_conditioning, options.max_snr)


def modified(plain: Callable, hidden_fn: Callable, corrupted: Corrupted, modifiers: Modifiers, judge: Judge | None):
    """(loss_sum, stats) of `plain` with the modifiers' weights, and the means of their factors among the stats."""
    means = {}

    def weigh(head: Any, corrupted: Corrupted) -> torch.Tensor:
        weight_N, found = modified_weights(head, corrupted, modifiers, judge)
        means.update(found)
        return weight_N

    loss_sum, stats = plain(hidden_fn, corrupted, weigh=weigh)
    return loss_sum, stats | means


def with_draws(config: Any, corrupted: Corrupted, sample_B: np.ndarray) -> Corrupted:
    """The micro-batch with the random numbers that its objective reads, of these global samples."""
    if config.objective.judge is None:
        return corrupted
    return replace(corrupted, uniform_BL=fill_uniforms(config.train.seed, sample_B, corrupted.xt_BL.shape[1]))
