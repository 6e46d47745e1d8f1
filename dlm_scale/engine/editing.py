"""The edit stage of a run: when it is on, and what it does to a micro-batch."""

from __future__ import annotations

from typing import Any

import numpy as np

from dlm_scale.diffusion.corruption import Corrupted
from dlm_scale.diffusion.edit import Edits, corruption_prob, edit
from dlm_scale.diffusion.segments import Rows
from dlm_scale.errors import UsageError


def is_editing(config: Any, step: int) -> bool:
    """Whether the stage has begun in the update after `step` finished ones."""
    return step >= config.diffusion.edit_stage_start * config.train.num_steps


def edited(trainer: Any, tokens: Any, corrupted: Corrupted, rows: Rows, sample_B: np.ndarray, step: int) -> Corrupted:
    """The micro-batch with the edits of this step; as it is before the stage. `tokens`: `EditTokens` of the data.

    Raises UsageError where the data was opened without them.
    """
    config, diffusion = trainer.config, trainer.config.diffusion
    if not is_editing(config, step):
        return corrupted
    if tokens is None:
        raise UsageError("diffusion.edit_stage_start: the data was opened without the ids of the edit stage; open it "
                         "with `open_datasets` of dlm_scale.train")
    progress = step / config.train.num_steps
    edits = Edits(
        prob=corruption_prob(progress, diffusion.edit_stage_start, diffusion.corruption_prob,
                             diffusion.anneal_corruption),
        replacement_ids=tokens.replacement_ids,
        delete_id=tokens.delete_id,
        gap_id=tokens.gap_id,
        visible_loss=diffusion.visible_loss,
        visible_subsample=diffusion.visible_subsample,
    )  # fmt: skip
    return edit(corrupted, rows.ids_BL, sample_B, edits, seed=config.train.seed, mask_id=trainer.vocabulary.mask_id,
                maskable_BL=rows.maskable_BL)
