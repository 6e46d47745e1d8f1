"""The forward process: what is masked in a batch of clean rows, and what each masked token weighs.

Legend: B rows, L positions, S segments, N masked positions of the flattened batch. A segment is what shares one time:
a row, or one of the documents packed into it (segments.py). Noise is a function of (seed, global sample index, column)
alone, so the same rows get the same masks in whatever batch they stand.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from dlm_scale.diffusion.rng import Stream, counter_of, philox, uniform24
from dlm_scale.diffusion.schedule import Schedule
from dlm_scale.diffusion.segments import check_bounds, row_bounds
from dlm_scale.diffusion.weighting import Weighting, elbo_weighting, min_time

KIND_MASKED, KIND_SUBSTITUTED, KIND_INSERTED, KIND_VISIBLE, KIND_GAP = range(5)


@dataclass(frozen=True)
class Corrupted:
    """A noised batch; all tensors on one device.

    xt_BL int64 noised ids; is_masked_BL bool; rows_N int64 flat indices b*L + i, ascending; target_N int64 clean ids;
    weight_N float32 weights in the loss; elbo_weight_N float32 weights that estimate the NELBO (nats per row, summed);
    kind_N uint8 (KIND_MASKED and the other kinds). Of each row, or where documents are packed of each
    segment: m_B float32 mask ratios; t_B float64 times; num_maskable_B int64.
    denominator: maskable positions of the GLOBAL batch, so that the loss is sum(weight * ce) / denominator; None where
    one rank does not know them (the train step then sums them over the ranks).
    attention: the mask value that the network needs; where documents are packed it has `cu_seqlens` int32 [S+1] and
    `to(device)`. None: every position of a row sees every other.
    What only some objectives read, else None: uniform_BL float64, for the ids that they fill the masked positions with
    (fill.py); maskable_BL bool, of a critic; told_BL bool, whose clean ids a sampler head is told; noise_BLE float32 and
    reads_guess_B bool, of Gaussian diffusion (gaussian.py).
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
    denominator: float | None
    attention: Any = None
    uniform_BL: torch.Tensor | None = None
    maskable_BL: torch.Tensor | None = None
    told_BL: torch.Tensor | None = None
    noise_BLE: torch.Tensor | None = None
    reads_guess_B: torch.Tensor | None = None

    @property
    def bounds_S1(self) -> torch.Tensor | None:
        """Bounds of the segments where documents are packed, int32; None: the rows are the segments."""
        return getattr(self.attention, "cu_seqlens", None)

    @property
    def segment_N(self) -> torch.Tensor:
        """int64: the segment that each masked position belongs to."""
        if self.bounds_S1 is None:
            return self.rows_N // self.xt_BL.shape[1]
        return torch.bucketize(self.rows_N, self.bounds_S1[1:], right=True)

    @property
    def row_t_B(self) -> torch.Tensor:
        """float64 [B]: each row's time where all segments of a row have the same."""
        if self.bounds_S1 is None:
            return self.t_B
        num_rows, length = self.xt_BL.shape
        starts_B = torch.arange(num_rows, device=self.t_B.device) * length
        return self.t_B[torch.searchsorted(self.bounds_S1[:-1].long(), starts_B)]

    def to(self, device, non_blocking: bool = False) -> "Corrupted":
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Corrupted":
        """In page-locked memory, which a GPU copies from while the host goes on."""
        return self._each(lambda value: value.pin_memory())

    def _each(self, change) -> "Corrupted":
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{k: change(v) for k, v in fields.items() if hasattr(v, "to")})


def corrupt(
    x0_BL,
    sample_index_B: np.ndarray,
    t_S: np.ndarray,
    *,
    seed: int,
    schedule: Schedule,
    weighting: Weighting,
    mask_id: int,
    denominator: float | None,
    maskable_BL=None,
    attention: Any = None,
    mask_tokens: Callable | None = None,
) -> Corrupted:
    """Masks the clean int64 ids x0_BL (numpy or torch, on the CPU) at times t_S in (0, 1], one for each segment.

    Each maskable position is masked on its own with probability m(t) (up to 2**-24), or, for an exact-count
    weighting, a uniform subset of ceil(L t) positions of each segment is. sample_index_B: global sample indices.
    maskable_BL: bool, default all True; the rest (padding, prompts) is never masked and carries no loss. attention:
    a mask value whose `cu_seqlens` are the bounds of the segments; default: the rows are the segments. mask_tokens:
    where else than here independent positions are drawn, with the same bits: `ops.masks_on`.
    Raises ValueError for shapes, bounds or times that do not fit, for a schedule that the weighting does not allow, and
    for clean rows that hold the mask id at a maskable position.
    """
    x0_BL, sample_index_B, maskable_BL = clean_rows(x0_BL, sample_index_B, maskable_BL, mask_id)
    bounds_S1 = row_bounds(*x0_BL.shape) if attention is None else np.asarray(attention.cu_seqlens)
    check_bounds(bounds_S1, *x0_BL.shape)
    t_S, length_S = checked_times(t_S, bounds_S1.size - 1), count_in(maskable_BL, bounds_S1)
    if weighting.requires_linear and not schedule.is_linear:
        raise ValueError(f"weighting {weighting.name!r} needs the linear schedule, got {schedule.name!r}")
    elbo = elbo_weighting(weighting, schedule)
    if elbo.clamps_time:
        t_S = np.maximum(t_S, min_time(np.maximum(length_S, 1)))
    draw, rows = mask_tokens or mask_tokens_here, (x0_BL, sample_index_B, maskable_BL, bounds_S1)
    if weighting.exact_count:
        count_S = exact_count(t_S, length_S)
        m_S = count_S / np.maximum(length_S, 1)
        masked = replace(x0_BL, smallest_of_segments(*rows, seed, count_S), bounds_S1, mask_id)
    else:
        m_S = schedule.mask_ratio(torch.from_numpy(t_S)).numpy()
        masked = draw(*rows, m_S, seed=seed, mask_id=mask_id)
    count_S = masked.num_masked_S.cpu().numpy()
    stats = [torch.from_numpy(a.astype(np.float64)) for a in (t_S, count_S, length_S)]
    weight_S, elbo_weight_S = (w.fn(schedule, *stats) for w in (weighting, elbo))
    return assemble(
        masked, weight_S=weight_S, elbo_weight_S=elbo_weight_S, m_S=m_S, t_S=t_S, num_maskable_S=length_S,
        denominator=denominator, attention=attention,
    )  # fmt: skip


def checked_times(t_S, num_segments: int) -> np.ndarray:
    """float64 [S]; ValueError unless each segment has a time in (0, 1]."""
    t_S = np.asarray(t_S).astype(np.float64)
    if t_S.shape != (num_segments,) or not np.all((t_S > 0) & (t_S <= 1)):
        raise ValueError(f"each of the {num_segments} segments needs a time in (0, 1], got {t_S}")
    return t_S


class Masked(NamedTuple):
    """What masking makes of clean rows: the fields that are needed of kernels/masking.py's value of this name."""

    xt_BL: torch.Tensor
    is_masked_BL: torch.Tensor
    num_masked_S: torch.Tensor
    rows_N: torch.Tensor
    target_N: torch.Tensor


def mask_tokens_here(x0_BL, sample_index_B, maskable_BL, bounds_S1, m_S, *, seed: int, mask_id: int) -> Masked:
    """Each maskable position on its own, with its segment's probability m_S: an integer compare."""
    word_BL = row_words(seed, sample_index_B, x0_BL.shape[1], Stream.MASK)
    threshold_S = np.ceil(m_S * 2**24).astype(np.int32)
    threshold_BL = np.repeat(threshold_S, np.diff(bounds_S1)).reshape(x0_BL.shape)
    return replace(x0_BL, (uniform24(word_BL) < threshold_BL) & maskable_BL, bounds_S1, mask_id)


def replace(x0_BL: np.ndarray, is_masked_BL: np.ndarray, bounds_S1: np.ndarray, mask_id: int) -> Masked:
    """The clean rows with the mask id where is_masked_BL says."""
    rows_N = np.flatnonzero(is_masked_BL)
    return Masked(
        xt_BL=torch.from_numpy(np.where(is_masked_BL, mask_id, x0_BL)),
        is_masked_BL=torch.from_numpy(is_masked_BL),
        num_masked_S=torch.from_numpy(count_in(is_masked_BL, bounds_S1)),
        rows_N=torch.from_numpy(rows_N),
        target_N=torch.from_numpy(x0_BL.reshape(-1)[rows_N]),
    )


def count_in(is_true_BL: np.ndarray, bounds_S1: np.ndarray) -> np.ndarray:
    """int64 [S]: how many positions of each segment are true."""
    return np.add.reduceat(is_true_BL.reshape(-1), bounds_S1[:-1], dtype=np.int64)


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


def smallest_of_segments(x0_BL, sample_index_B, maskable_BL, bounds_S1, seed: int, count_S) -> np.ndarray:
    """bool [B, L]: `smallest_words` of each segment on its own."""
    word_BL = row_words(seed, sample_index_B, x0_BL.shape[1], Stream.MASK)
    if count_S.size == len(word_BL):
        return smallest_words(word_BL, maskable_BL, count_S)
    word, maskable, out = word_BL.reshape(1, -1), maskable_BL.reshape(1, -1), np.empty(word_BL.shape, bool)
    for segment, part in enumerate(map(slice, bounds_S1, bounds_S1[1:])):
        out.reshape(-1)[part] = smallest_words(word[:, part], maskable[:, part], count_S[segment : segment + 1])[0]
    return out


def assemble(
    masked: Masked, *, weight_S: torch.Tensor, elbo_weight_S: torch.Tensor, m_S: np.ndarray, t_S: np.ndarray,
    num_maskable_S: np.ndarray, denominator: float | None, attention: Any = None,
) -> Corrupted:  # fmt: skip
    """`Corrupted` where the masks are, from each segment's weights, mask ratio, time and maskable count."""
    num_masked, device = masked.rows_N.numel(), masked.rows_N.device

    def of_tokens(values_S: torch.Tensor) -> torch.Tensor:
        return torch.repeat_interleave(values_S.float().to(device), masked.num_masked_S, output_size=num_masked)

    return Corrupted(
        xt_BL=masked.xt_BL,
        is_masked_BL=masked.is_masked_BL,
        rows_N=masked.rows_N,
        target_N=masked.target_N,
        weight_N=of_tokens(weight_S),
        elbo_weight_N=of_tokens(elbo_weight_S),
        kind_N=torch.full((num_masked,), KIND_MASKED, dtype=torch.uint8, device=device),
        m_B=torch.from_numpy(m_S).float().to(device),
        t_B=torch.from_numpy(t_S).to(device),
        num_maskable_B=torch.from_numpy(num_maskable_S).to(device),
        denominator=None if denominator is None else float(denominator),
        attention=None if attention is None else attention.to(device),
    )
