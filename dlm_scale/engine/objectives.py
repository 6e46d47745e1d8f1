"""Which objective a run's config asks for, as one function of a micro-batch (docs/design.md, signature 2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dlm_scale.diffusion.corruption import Corrupted
from dlm_scale.diffusion.edit import visible_stats
from dlm_scale.diffusion.objective import masked_diffusion
from dlm_scale.engine.editing import is_editing

Objective = Callable[[Callable, Corrupted, int], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def objective_of(config: Any) -> Objective:
    """objective(hidden_fn, corrupted, step) -> (loss_sum, stats)."""
    plain = partial(masked_diffusion, z_loss=config.diffusion.z_loss)

    def objective(hidden_fn: Callable, corrupted: Corrupted, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return plain(hidden_fn, corrupted, measures=[visible_stats] if is_editing(config, step) else [])

    return objective
