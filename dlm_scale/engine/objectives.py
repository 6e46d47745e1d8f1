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
from dlm_scale.diffusion.fill import fill_uniforms
from dlm_scale.diffusion.neighbours import idle_sampler, sampler_term, told_positions
from dlm_scale.diffusion.objective import Term, masked_diffusion

Objective = Callable[[Callable, Corrupted, int], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def objective_of(config: Any) -> Objective:
    """objective(hidden_fn, corrupted, step) -> (loss_sum, stats)."""

    def objective(hidden_fn: Callable, corrupted: Corrupted, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        own = sampler_terms(config, step)

        def plain(hidden_fn: Callable, corrupted: Corrupted, terms: tuple[Term, ...] = ()):
            return masked_diffusion(hidden_fn, corrupted, config.diffusion.z_loss, terms=(*own, *terms))

        if not config.model.critic:
            return plain(hidden_fn, corrupted)
        return with_critic(plain, critic_of(config.objective), hidden_fn, corrupted, step)

    return objective


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
    seed, (_, length) = config.train.seed, corrupted.xt_BL.shape
    if config.objective.critic_alpha:
        uniform_BL = fill_uniforms(seed, sample_B, length)
        corrupted = replace(corrupted, uniform_BL=uniform_BL, maskable_BL=torch.from_numpy(maskable_BL))
    if config.objective.sampler_alpha:
        corrupted = replace(corrupted, told_BL=told_positions(seed, sample_B, length))
    return corrupted
