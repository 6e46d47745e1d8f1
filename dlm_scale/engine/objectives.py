"""Which objective a run's config asks for, as one function of a micro-batch (docs/design.md, signature 2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dlm_scale.diffusion.corruption import Corrupted
from dlm_scale.diffusion.gaussian import Process
from dlm_scale.diffusion.gaussian_objective import gaussian_diffusion
from dlm_scale.diffusion.objective import masked_diffusion

Objective = Callable[[Callable, Corrupted, int], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def objective_of(config: Any) -> Objective:
    """objective(hidden_fn, corrupted, step) -> (loss_sum, stats)."""
    if config.objective.kind == "gaussian":
        gaussian = partial(gaussian_diffusion, process=process_of(config.gaussian), loss=config.gaussian.loss)
        return lambda hidden_fn, corrupted, step: gaussian(hidden_fn, corrupted)
    plain = partial(masked_diffusion, z_loss=config.diffusion.z_loss)
    return lambda hidden_fn, corrupted, step: plain(hidden_fn, corrupted)


def process_of(options: Any) -> Process:
    """The forward process of the section `gaussian`."""
    return Process(options.schedule, options.num_steps, options.prediction, options.embedding_dim,
                   options.self_conditioning, options.max_snr)
