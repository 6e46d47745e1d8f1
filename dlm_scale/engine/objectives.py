"""Which objective a run's config asks for, as one function of a micro-batch (docs/design.md, signature 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from dlm_scale.diffusion.corruption import Corrupted
from dlm_scale.diffusion.critic import Critic, with_critic
from dlm_scale.diffusion.edit import visible_stats
from dlm_scale.diffusion.fill import fill_uniforms
from dlm_scale.diffusion.gaussian import Process
from dlm_scale.diffusion.gaussian_objective import gaussian_diffusion
from dlm_scale.diffusion.labels import LABEL_OBJECTIVES
from dlm_scale.diffusion.modifiers import Judge, Modifiers, modified_weights
from dlm_scale.diffusion.neighbours import idle_sampler, sampler_term, told_positions
from dlm_scale.diffusion.objective import Term, masked_diffusion
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
    modifiers = Modifiers(options.mask_ratio_power, options.entropy_threshold, options.judge_exponent)
    is_modified = bool(modifiers.mask_ratio_power or modifiers.entropy_threshold or judge)

    def objective(hidden_fn: Callable, corrupted: Corrupted, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        own, measures = sampler_terms(config, step), [visible_stats] if is_editing(config, step) else []

        def plain(hidden_fn: Callable, corrupted: Corrupted, terms: tuple[Term, ...] = ()):
            masked = partial(masked_diffusion, z_loss=config.diffusion.z_loss, label_smoothing=options.label_smoothing,
                             terms=(*own, *terms), measures=measures)  # fmt: skip
            if not is_modified:
                return masked(hidden_fn, corrupted)
            return modified(masked, hidden_fn, corrupted, modifiers, judge)

        if not config.model.critic:
            return plain(hidden_fn, corrupted)
        return with_critic(plain, critic_of(options), hidden_fn, corrupted, step)

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


def critic_of(options: Any) -> Critic:
    """The critic's training, as an objective section says it."""
    return Critic(options.critic_alpha, options.critic_start, options.critic_end, options.critic_every,
                  options.critic_detach, options.critic_scope, options.critic_weighting)  # fmt: skip


def sampler_terms(config: Any, step: int) -> tuple[Term, ...]:
    """The sampler head's term in this step; a term of 0 where it is not trained, none where there is no such head."""
    alpha, start = config.objective.sampler_alpha, config.objective.sampler_start
    if not config.model.sampler_head:
        return ()
    return (partial(sampler_term, alpha=alpha),) if alpha and step >= start else (idle_sampler,)


def with_draws(config: Any, corrupted: Corrupted, maskable_BL: np.ndarray, sample_B: np.ndarray) -> Corrupted:
    """The micro-batch with the random numbers that its objective reads, of these global samples."""
    options, seed, (_, length) = config.objective, config.train.seed, corrupted.xt_BL.shape
    if options.critic_alpha or options.judge is not None:
        corrupted = replace(corrupted, uniform_BL=fill_uniforms(seed, sample_B, length))
    if options.critic_alpha:
        corrupted = replace(corrupted, maskable_BL=torch.from_numpy(maskable_BL))
    if options.sampler_alpha:
        corrupted = replace(corrupted, told_BL=told_positions(seed, sample_B, length))
    return corrupted
