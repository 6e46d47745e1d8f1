"""The forward process: what is masked in a batch of clean rows, and what each masked token weighs.

Legend: B rows, L positions, N masked positions of the flattened batch. Noise is a function of (seed, global sample
index, column) alone, so the same rows get the same masks in whatever batch they stand.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from dlm_scale.diffusion.rng import Stream, counter_of, philox, uniform24
from dlm_scale.diffusion.schedule import Schedule
from dlm_scale.diffusion.weighting import Weighting, elbo_weighting, min_time

KIND_MASKED = 0


@dataclass(frozen=True)
class Corrupted:
    """A noised batch; all tensors on one device.

    xt_BL int64 noised ids; is_masked_BL bool; rows_N int64 flat indices b*L + i, ascending; target_N int64 clean ids;
    weight_N float32 weights in the loss; elbo_weight_N float32 weights that estimate the NELBO (nats per row, summed);
    kind_N uint8 (KIND_MASKED); m_B float32 mask ratios; t_B float64 times; num_maskable_B int64;
    denominator: maskable positions of the GLOBAL batch, so that the loss is sum(weight * ce) / denominator.
    """

    xt_BL: torch.Tensor
    is_masked_BL: torch.Tensor
    rows_N: torch.Tensor
    target_N: torch.Tensor
    weight_N: torch.Tensor
    elbo_weight_N: torch.Tensor
    kind_N: torch.Tensor
    m_B: torch.Tensor
    t_B: torch.Tensor
    num_maskable_B: torch.Tensor
    denominator: float

    def to(self, device, non_blocking: bool = False) -> "Corrupted":
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        tensors = {k: v.to(device, non_blocking=non_blocking) for k, v in fields.items() if torch.is_tensor(v)}
        return dataclasses.replace(self, **tensors)


def corrupt(
    x0_BL,
    sample_index_B: np.ndarray,
    t_B: np.ndarray,
    *,
    seed: int,
    schedule: Schedule,
    weighting: Weighting,
    mask_id: int,
    denominator: float,
    maskable_BL=None,
) -> Corrupted:
    """Masks the clean int64 ids x0_BL (numpy or torch, on the CPU) at times t_B in (0, 1].

    Each maskable position is masked on its own with probability m(t) (up to 2**-24), or, for an exact-count
    weighting, a uniform subset of ceil(L t) positions is. sample_index_B: global sample indices. maskable_BL: bool,
    default all True; the rest (padding, prompts) is never masked and carries no loss.
    Raises ValueError for shapes or times that do not fit, for a schedule that the weighting does not allow, and for
    clean rows that hold the mask id at a maskable position.
    """
    x0_BL, sample_index_B, maskable_BL = clean_rows(x0_BL, sample_index_B, maskable_BL, mask_id)
    t_B = np.asarray(t_B).astype(np.float64)
    if t_B.shape != sample_index_B.shape or not np.all((t_B > 0) & (t_B <= 1)):
        raise ValueError(f"each of the {len(x0_BL)} rows needs a time in (0, 1], got {t_B}")
    if weighting.requires_linear and not schedule.is_linear:
        raise ValueError(f"weighting {weighting.name!r} needs the linear schedule, got {schedule.name!r}")
    length_B = maskable_BL.sum(1)
    elbo = elbo_weighting(weighting, schedule)
    if elbo.clamps_time:
        t_B = np.maximum(t_B, min_time(np.maximum(length_B, 1)))
    word_BL = row_words(seed, sample_index_B, x0_BL.shape[1], Stream.MASK)
    if weighting.exact_count:
        count_B = exact_count(t_B, length_B)
        is_masked_BL, m_B = smallest_words(word_BL, maskable_BL, count_B), count_B / np.maximum(length_B, 1)
    else:
        m_B = schedule.mask_ratio(torch.from_numpy(t_B)).numpy()
        is_masked_BL = (uniform24(word_BL) < np.ceil(m_B * 2**24)[:, None]) & maskable_BL
    stats = [torch.from_numpy(a.astype(np.float64)) for a in (t_B, is_masked_BL.sum(1), length_B)]
    weight_B, elbo_weight_B = (w.fn(schedule, *stats).numpy() for w in (weighting, elbo))
    return assemble(
        x0_BL, is_masked_BL, mask_id, weight_B=weight_B, elbo_weight_B=elbo_weight_B, m_B=m_B, t_B=t_B,
        num_maskable_B=length_B, denominator=denominator,
    )  # fmt: skip


def clean_rows(x0_BL, index_B, maskable_BL, mask_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids (int64), row indices (int64) and where to mask (bool) as numpy arrays; ValueError if they do not fit."""
    x0_BL, index_B = np.asarray(x0_BL), np.asarray(index_B)
    maskable_BL = np.ones(x0_BL.shape, bool) if maskable_BL is None else np.asarray(maskable_BL)
    if x0_BL.ndim != 2 or x0_BL.dtype != np.int64:
        raise ValueError(f"clean rows must be int64 [B, L], got {x0_BL.dtype} {x0_BL.shape}")
    if index_B.shape != x0_BL.shape[:1] or index_B.dtype != np.int64:
        raise ValueError(f"row indices must be int64 [{len(x0_BL)}], got {index_B.dtype} {index_B.shape}")
    if maskable_BL.shape != x0_BL.shape or maskable_BL.dtype != np.bool_:
        raise ValueError(f"maskable_BL must be bool {x0_BL.shape}, got {maskable_BL.dtype} {maskable_BL.shape}")
    if np.any((x0_BL == mask_id) & maskable_BL):
        raise ValueError(f"clean rows hold the mask id {mask_id}: it cannot be predicted")
    return x0_BL, index_B, maskable_BL


def row_words(seed: int, index_B: np.ndarray, num_columns: int, stream: int) -> np.ndarray:
    """uint32 [B, L]: first word of Philox(seed; row index low, high, column, stream)."""
    low_B, high_B = counter_of(index_B)
    return philox(seed, low_B[:, None], high_B[:, None], np.arange(num_columns), stream)[0]


def exact_count(t_B: np.ndarray, num_maskable_B: np.ndarray) -> np.ndarray:
    """ceil(L t) in 1..L (0 if L = 0), int64: uniform on 1..L when t is uniform on (0, 1]."""
    return np.minimum(np.ceil(num_maskable_B * t_B).astype(np.int64), num_maskable_B)


def smallest_words(word_BL: np.ndarray, maskable_BL: np.ndarray, count_B: np.ndarray) -> np.ndarray:
    """bool [B, L]: in each row the `count` maskable positions of smallest (random word, column): a uniform subset."""
    key_BL = (word_BL.astype(np.uint64) << np.uint64(32)) | np.arange(word_BL.shape[1], dtype=np.uint64)
    key_BL = np.where(maskable_BL, key_BL, np.uint64(2**64 - 1))
    last_B1 = np.take_along_axis(np.sort(key_BL, axis=1), np.maximum(count_B - 1, 0)[:, None], axis=1)
    return (key_BL <= last_B1) & (count_B > 0)[:, None]


def assemble(
    x0_BL, is_masked_BL, mask_id: int, *, weight_B, elbo_weight_B, m_B, t_B, num_maskable_B, denominator: float
) -> Corrupted:
    """`Corrupted` from numpy arrays: the masks, and each row's weights, mask ratio, time and maskable count."""
    rows_N = np.flatnonzero(is_masked_BL)
    row_of_N = rows_N // x0_BL.shape[1]
    return Corrupted(
        xt_BL=torch.from_numpy(np.where(is_masked_BL, mask_id, x0_BL)),
        is_masked_BL=torch.from_numpy(is_masked_BL),
        rows_N=torch.from_numpy(rows_N),
        target_N=torch.from_numpy(x0_BL.reshape(-1)[rows_N]),
        weight_N=torch.from_numpy(weight_B[row_of_N].astype(np.float32)),
        elbo_weight_N=torch.from_numpy(elbo_weight_B[row_of_N].astype(np.float32)),
        kind_N=torch.full((rows_N.size,), KIND_MASKED, dtype=torch.uint8),
        m_B=torch.from_numpy(m_B.astype(np.float32)),
        t_B=torch.from_numpy(t_B),
        num_maskable_B=torch.from_numpy(num_maskable_B),
        denominator=float(denominator),
    )
