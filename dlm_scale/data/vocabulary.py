"""The vocabulary of a run: how many ids, which one is the mask, which are never predicted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dlm_scale.errors import UsageError

DELETE_TOKEN, GAP_TOKEN = "<|delete|>", "<|gap|>"  # the edit stage's answers
MANY_IDS = 8  # from here on one look-up is quicker than so many comparisons


@dataclass(frozen=True)
class Vocabulary:
    """`size` counts all ids, the mask included. `suppressed_ids` (and always the mask) are never predicted.

    Raises UsageError where the ids do not fit the size.
    """

    size: int
    mask_id: int
    suppressed_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.size < 2:
            raise UsageError(f"vocab_size is {self.size}: a vocabulary needs at least one token beside the mask")
        for name, ids in (("mask_id", (self.mask_id,)), ("suppressed_ids", self.suppressed_ids)):
            if any(not 0 <= i < self.size for i in ids):
                raise UsageError(f"{name} {ids[0] if len(ids) == 1 else list(ids)} is outside 0..{self.size - 1}")
        if len({self.mask_id, *self.suppressed_ids}) == self.size:
            raise UsageError("suppressed_ids leave no id that could be predicted")

    @property
    def num_outputs(self) -> int:
        """Rows of the output head: a mask that is the last id needs none."""
        return self.size - 1 if self.mask_id == self.size - 1 else self.size

    def first_invalid(self, ids: np.ndarray) -> int | None:
        """Flat position of the first id that clean text cannot hold (outside, mask or suppressed), or None."""
        flat = ids.reshape(-1)
        flat = flat.view(f"u{flat.itemsize}")  # a negative id becomes a huge one
        inner = [i for i in {self.mask_id, *self.suppressed_ids} if i < self.num_outputs]
        if not flat.size or (flat.max() < self.num_outputs and not inner):
            return None
        is_bad = flat >= self.num_outputs
        for i in inner if len(inner) < MANY_IDS else ():
            is_bad |= flat == i
        bad = np.flatnonzero(is_bad | np.isin(flat, inner) if len(inner) >= MANY_IDS else is_bad)
        return int(bad[0]) if bad.size else None


@dataclass(frozen=True)
class EditTokens:
    """Ids for the edit stage: `replacement_ids` int64, ascending, what a wrong token may be; the answers `delete_id` to
    an inserted token and `gap_id` before one that is missing, None where they are not learnt."""

    replacement_ids: np.ndarray
    delete_id: int | None
    gap_id: int | None
