"""The ids that the edit stage needs, of a dataset's tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np

from dlm_scale.data.loader import TrainingData
from dlm_scale.data.tokenizer import load_tokenizer
from dlm_scale.data.vocabulary import DELETE_TOKEN, GAP_TOKEN, EditTokens
from dlm_scale.errors import UsageError


def edit_tokens(data: TrainingData, insertion: bool, deletion: bool) -> EditTokens:
    """Wrong tokens are ids of text: not the mask, suppressed, special, or the separator. Raises UsageError where the
    tokenizer has no token for an answer that is to be learnt."""
    vocabulary = data.vocabulary
    tokenizer = None if data.folder is None else load_tokenizer(data.folder, data.tokenizer_meta)
    control_ids = set() if tokenizer is None else tokenizer.control_ids
    special_ids = {} if tokenizer is None else tokenizer.special_ids
    wanted = {"insertion_corruption": (insertion, DELETE_TOKEN), "deletion_corruption": (deletion, GAP_TOKEN)}
    needed = {key: name for key, (is_on, name) in wanted.items() if is_on}
    _check({key: name for key, name in needed.items() if name not in special_ids}, list(special_ids), needed, data)
    unfit = sorted({vocabulary.mask_id, *vocabulary.suppressed_ids, *control_ids})
    replacement_ids = np.setdiff1d(np.arange(vocabulary.size), unfit)
    if len(replacement_ids) < 2:
        raise UsageError(f"diffusion.edit_stage_start: a vocabulary of {len(replacement_ids)} ids of text has no wrong "
                         "token to put in the place of a right one: set it to 1")
    delete_id, gap_id = (special_ids.get(name) if is_on else None for is_on, name in wanted.values())
    return EditTokens(replacement_ids, delete_id, gap_id)


def _check(missing: dict[str, str], known: list[str], needed: dict[str, str], data: Any) -> None:
    if not missing:
        return
    keys = " and ".join(f"diffusion.{key} (its answer is {name})" for key, name in missing.items())
    off = " ".join(f"diffusion.{key}=false" for key in missing)
    if data.folder is None:
        raise UsageError(f"{keys} needs a tokenizer with that special token, and synthetic tokens have none: set {off}")
    names = ",".join([*known, *(name for name in needed.values() if name not in known)])
    raise UsageError(f"{keys} needs that special token, and the dataset in {data.folder} was prepared without: prepare "
                     f"it again with --special_tokens '{names}', or set {off}")
