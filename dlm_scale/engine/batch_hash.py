"""A fingerprint of what a step really trained on: ids, times and masks, in global order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from dlm_scale.diffusion.corruption import KIND_MASKED, Corrupted
from dlm_scale.diffusion.edit import NO_LOSS


def row_hashes(corrupted: Corrupted) -> np.ndarray:
    """xxh3-64 of each row's noised ids, clean ids at the masked places, mask, and its times with, if it has several,
    the bounds of their segments; where visible tokens carry loss also of what kind each is; int64 [B]."""
    xt_BL, mask_BL = corrupted.xt_BL.cpu().numpy(), corrupted.is_masked_BL.cpu().numpy()
    clean_BL = xt_BL.copy()
    clean_BL.reshape(-1)[corrupted.rows_N.cpu().numpy()] = corrupted.target_N.cpu().numpy()
    parts = (clean_BL, xt_BL, mask_BL, _times(corrupted), _visible_kinds(corrupted))
    digests = [xxhash.xxh3_64(b"".join(part[row].tobytes() for part in parts)).intdigest() for row in range(len(xt_BL))]
    return np.array(digests, dtype=np.uint64).view(np.int64)


def _visible_kinds(corrupted: Corrupted) -> list[np.ndarray]:
    """Of each row the kind of every position, NO_LOSS where it carries none; nothing where all its loss is masked."""
    kind_BL = np.full(corrupted.xt_BL.shape, NO_LOSS, np.uint8)
    kind_BL.reshape(-1)[corrupted.rows_N.cpu().numpy()] = corrupted.kind_N.cpu().numpy()
    is_edited_B = ((kind_BL != KIND_MASKED) & (kind_BL != NO_LOSS)).any(1)
    return [kind_L if is_edited else kind_L[:0] for kind_L, is_edited in zip(kind_BL, is_edited_B)]


def _times(corrupted: Corrupted) -> list[np.ndarray]:
    """Of each row: its time, or its segments' times and where in the row they begin."""
    t_S, (num_rows, length) = corrupted.t_B.cpu().numpy(), corrupted.xt_BL.shape
    if corrupted.bounds_S1 is None:
        return list(t_S)
    start_S = corrupted.bounds_S1[:-1].cpu().numpy()
    of_rows = np.searchsorted(start_S, np.arange(1, num_rows) * length)
    pairs = zip(np.split(t_S, of_rows), np.split(start_S % length, of_rows), strict=True)
    return [times if len(times) == 1 else np.concatenate([times, starts]) for times, starts in pairs]


def batch_hash(batch: Sequence[Corrupted], mesh, device: torch.device) -> str:
    """The global batch's hash: equal for every split into ranks and micro-batches. Collective over the data group."""
    local = torch.from_numpy(np.stack([row_hashes(corrupted) for corrupted in batch])).to(device)
    gathered = [local]
    if mesh.data_size > 1:
        gathered = [torch.empty_like(local) for _ in range(mesh.data_size)]
        dist.all_gather(gathered, local, group=mesh.data_group)
    in_order = torch.stack(gathered, dim=1).cpu().numpy()
    return xxhash.xxh3_128(in_order.tobytes()).hexdigest()
