"""The edit stage: visible tokens of a noised batch are made wrong too, and the network learns to say what is right.

After Seed Diffusion (arXiv 2508.02193): late in training tokens that are not masked are substituted, random tokens are
inserted (right answer: `<|delete|>`), and tokens are taken out (right answer of the token before: `<|gap|>`). All draws
are functions of (seed, global sample index, column of the clean row) alone, in the streams REPLACEMENT and EDIT.

A stretch is a run of maskable positions of one segment, such as an answer: nothing moves across its ends, and nothing
outside of one changes. Legend: B rows, L positions, T = B*L of the flattened batch, N rows of the loss.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dlm_scale.diffusion.corruption import (
    KIND_GAP,
    KIND_INSERTED,
    KIND_MASKED,
    KIND_SUBSTITUTED,
    KIND_VISIBLE,
    Corrupted,
)
from dlm_scale.diffusion.rng import Stream, counter_of, philox, uniform24
from dlm_scale.diffusion.segments import row_bounds
from dlm_scale.diffusion.substitution import other_ids

NO_LOSS = 255  # in the place of a kind
VISIBLE_LOSSES = ("all", "corrupted")


def corruption_prob(progress: float, start: float, target: float, anneal: bool) -> float:
    """The probability of an edit when `progress` (0 to 1) of a run is done: 0 until `start`, then `target`; annealed it
    rises in a straight line from 0 at `start` to `target` at (1 + start)/2."""
    if not anneal:
        return target if progress >= start else 0.0
    return target * min(1.0, 2 * (progress - start) / (1 - start)) if progress > start else 0.0


@dataclass(frozen=True)
class Edits:
    """What is done to visible tokens.

    prob: of each edit at each place. replacement_ids: int64, ascending, what a wrong token may be. delete_id, gap_id:
    what is learnt for an inserted token, and for the token before one that is taken out; None: no such edits.
    visible_loss: "all" visible tokens carry loss, or "corrupted": those that need another answer than themselves.
    visible_subsample: each of these keeps its loss with this probability r, in (0, 1], and then weighs 1/r.
    """

    prob: float
    replacement_ids: np.ndarray
    delete_id: int | None = None
    gap_id: int | None = None
    visible_loss: str = "all"
    visible_subsample: float = 1.0


def visible_stats(corrupted: Corrupted, ce_N: torch.Tensor, is_correct_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """[2] (sum, number) of the means visible_ce, nats, and visible_accuracy of all visible tokens with loss, and
    corrupted_accuracy of those whose answer is another token than themselves."""
    is_visible_N = corrupted.kind_N != KIND_MASKED
    is_wrong_N = is_visible_N & (corrupted.kind_N != KIND_VISIBLE)
    values = {"visible_ce": (ce_N, is_visible_N), "visible_accuracy": (is_correct_N, is_visible_N),
              "corrupted_accuracy": (is_correct_N, is_wrong_N)}  # fmt: skip
    return {name: _mean_over(values_N, is_one_N) for name, (values_N, is_one_N) in values.items()}


def _mean_over(values_N: torch.Tensor, is_one_N: torch.Tensor) -> torch.Tensor:
    """[2] float64: sum and number, without asking the device how many there are."""
    is_one_N = is_one_N.double()
    return torch.stack([(values_N.detach().double() * is_one_N).sum(), is_one_N.sum()])


class _Drawn(NamedTuple):
    """The edits of the clean positions, all [T]: their places, and what a wrong or an inserted token is. `has_loss_T`
    and `inserted_has_loss_T`: what the subsample of visible tokens keeps."""

    is_substituted_T: np.ndarray
    substitute_T: np.ndarray
    is_inserted_T: np.ndarray  # a token is put before this one
    inserted_T: np.ndarray
    is_deleted_T: np.ndarray
    has_loss_T: np.ndarray
    inserted_has_loss_T: np.ndarray


def edit(
    corrupted: Corrupted, x0_BL, sample_index_B: np.ndarray, edits: Edits, *, seed: int, mask_id: int, maskable_BL=None
) -> Corrupted:
    """A batch as `corrupt` made it of the clean ids x0_BL, with edits; the other arguments are those of `corrupt`.

    Masked tokens keep their place among the others, their targets and their weights, but for those that an insertion
    pushes off the end of their stretch. Visible tokens of the stretches carry loss of weight 1 (`visible_subsample`)
    and add nothing to the NELBO's estimate; the denominator stays. Positions that a deletion frees at the end of a
    stretch hold the mask and carry no loss. Raises ValueError where `edits` is not possible.
    """
    _check(edits, mask_id)
    x0_BL, bounds_S1 = np.asarray(x0_BL), corrupted.bounds_S1
    bounds_S1 = row_bounds(*x0_BL.shape) if bounds_S1 is None else bounds_S1.cpu().numpy()
    x0_T = x0_BL.reshape(-1)
    maskable_T = np.ones(x0_T.size, bool) if maskable_BL is None else np.asarray(maskable_BL).reshape(-1)
    visible_T = maskable_T & ~corrupted.is_masked_BL.cpu().numpy().reshape(-1)
    stretches = _Stretches.of(maskable_T, bounds_S1)
    drawn = _draw(x0_BL, np.asarray(sample_index_B), maskable_T, visible_T, stretches, edits, seed)
    # Token j goes to j + (inserted up to it) - (taken out before it), as long as that is in its stretch.
    moved_T = stretches.before(drawn.is_inserted_T) + drawn.is_inserted_T - stretches.before(drawn.is_deleted_T)
    place_T, whole = np.arange(x0_T.size) + moved_T, _empty(x0_T, maskable_T, mask_id)
    own = _own_tokens(whole, x0_T, place_T, corrupted, drawn, edits)
    _put(whole, own, maskable_T & ~drawn.is_deleted_T & (place_T < stretches.end_T))
    inserted = _inserted_tokens(whole, place_T, drawn, edits)
    _put(whole, inserted, drawn.is_inserted_T & (inserted.place < stretches.end_T))
    return _assemble(whole, corrupted)


def _check(edits: Edits, mask_id: int) -> None:
    if not 0 <= edits.prob <= 1 or not 0 < edits.visible_subsample <= 1 or edits.visible_loss not in VISIBLE_LOSSES:
        raise ValueError(f"an edit's probability lies in [0, 1], visible_subsample in (0, 1], visible_loss is one of "
                         f"{', '.join(VISIBLE_LOSSES)}: not {edits.prob}, {edits.visible_subsample}, "
                         f"{edits.visible_loss!r}")
    special = [i for i in (mask_id, edits.delete_id, edits.gap_id) if i is not None]
    if len(edits.replacement_ids) < 2 or np.isin(special, edits.replacement_ids).any():
        raise ValueError("replacement_ids are two or more ids, none of them the mask, delete_id or gap_id")


class _Stretches(NamedTuple):
    """Of each position in a stretch the first position of it and the one behind it, [T]; elsewhere meaningless."""

    start_T: np.ndarray
    end_T: np.ndarray

    @classmethod
    def of(cls, maskable_T: np.ndarray, bounds_S1: np.ndarray) -> "_Stretches":
        is_bound_T1 = np.zeros(maskable_T.size + 1, bool)
        is_bound_T1[bounds_S1] = True
        is_bound_T1[1:-1] |= maskable_T[1:] != maskable_T[:-1]
        bound_K1 = np.flatnonzero(is_bound_T1)
        length_K = np.diff(bound_K1)
        return cls(np.repeat(bound_K1[:-1], length_K), np.repeat(bound_K1[1:], length_K))

    def before(self, is_true_T: np.ndarray) -> np.ndarray:
        """How many positions of the same stretch before each position, [T], are true."""
        before_T = np.cumsum(is_true_T) - is_true_T
        return before_T - before_T[self.start_T]


def _draw(x0_BL, sample_index_B, maskable_T, visible_T, stretches, edits: Edits, seed: int) -> _Drawn:
    """Words of REPLACEMENT: 0 whether a token is substituted, 1 by what, 2 what is inserted before it. Of EDIT: 0
    whether something is, 1 whether the token is taken out, 2 and 3 whether it, and the one before it, keep their loss.
    """
    low_B, high_B = counter_of(sample_index_B)
    address = seed, low_B[:, None], high_B[:, None], np.arange(x0_BL.shape[1])
    which = [word.reshape(-1) for word in philox(*address, Stream.REPLACEMENT)]
    whether = [word.reshape(-1) for word in philox(*address, Stream.EDIT)]
    is_substituted_T = visible_T & _below(which[0], edits.prob)
    nowhere_T = np.zeros_like(visible_T)
    is_inserted_T = nowhere_T if edits.delete_id is None else maskable_T & _below(whether[0], edits.prob)
    is_deleted_T = nowhere_T
    if edits.gap_id is not None:
        # The token before must be there to say it: visible, right, not gone itself, nothing inserted between.
        says_T = np.zeros_like(visible_T)
        says_T[1:] = (visible_T & ~is_substituted_T)[:-1]
        says_T &= (np.arange(visible_T.size) > stretches.start_T) & ~is_inserted_T
        wanted_T = visible_T & says_T & _below(whether[1], edits.prob)
        is_deleted_T = wanted_T.copy()
        is_deleted_T[1:] &= ~wanted_T[:-1]
    ids_C = edits.replacement_ids
    return _Drawn(
        is_substituted_T=is_substituted_T,
        substitute_T=other_ids(x0_BL.reshape(-1), which[1], ids_C),
        is_inserted_T=is_inserted_T,
        inserted_T=ids_C[_scaled(which[2], len(ids_C))],
        is_deleted_T=is_deleted_T,
        has_loss_T=_below(whether[2], edits.visible_subsample),
        inserted_has_loss_T=_below(whether[3], edits.visible_subsample),
    )


def _below(word_T: np.ndarray, probability: float) -> np.ndarray:
    return uniform24(word_T) < np.ceil(probability * 2**24)


def _scaled(word_T: np.ndarray, size) -> np.ndarray:
    """Random words to integers in [0, size), uniform up to size/2**32."""
    return (word_T.astype(np.uint64) * np.asarray(size, np.uint64) >> np.uint64(32)).astype(np.int64)


class _Tokens(NamedTuple):
    """Tokens and where they stand, [M], or what stands at every position, [T] (`place` is then the position)."""

    place: np.ndarray
    xt: np.ndarray
    is_masked: np.ndarray
    target: np.ndarray
    kind: np.ndarray
    weight: np.ndarray
    elbo_weight: np.ndarray


def _empty(x0_T: np.ndarray, maskable_T: np.ndarray, mask_id: int) -> _Tokens:
    """Stretches of nothing but masks without loss, between what is not maskable."""
    no_weight_T = np.zeros(x0_T.size, np.float32)
    return _Tokens(np.arange(x0_T.size), np.where(maskable_T, mask_id, x0_T), maskable_T.copy(), np.zeros_like(x0_T),
                   np.full(x0_T.size, NO_LOSS, np.uint8), no_weight_T, no_weight_T.copy())  # fmt: skip


def _own_tokens(base: _Tokens, x0_T, place_T, corrupted: Corrupted, drawn: _Drawn, edits: Edits) -> _Tokens:
    """The clean rows' own tokens, masked, substituted or as they are; of no meaning where one is taken out."""
    is_masked_T = corrupted.is_masked_BL.cpu().numpy().reshape(-1)
    says_gap_T = np.append(drawn.is_deleted_T[1:], False)
    kind_T = np.select([is_masked_T, drawn.is_substituted_T, says_gap_T], [KIND_MASKED, KIND_SUBSTITUTED, KIND_GAP],
                       KIND_VISIBLE).astype(np.uint8)  # fmt: skip
    is_lost_T = ~is_masked_T & ~drawn.has_loss_T
    if edits.visible_loss == "corrupted":
        is_lost_T |= kind_T == KIND_VISIBLE
    weight_T, elbo_weight_T = np.full(x0_T.size, 1 / edits.visible_subsample, np.float32), base.elbo_weight.copy()
    rows_N = corrupted.rows_N.cpu().numpy()
    weight_T[rows_N], elbo_weight_T[rows_N] = corrupted.weight_N.cpu(), corrupted.elbo_weight_N.cpu()
    return _Tokens(
        place=place_T,
        xt=np.where(is_masked_T, base.xt, np.where(drawn.is_substituted_T, drawn.substitute_T, x0_T)),
        is_masked=is_masked_T,
        target=x0_T if edits.gap_id is None else np.where(kind_T == KIND_GAP, edits.gap_id, x0_T),
        kind=np.where(is_lost_T, np.uint8(NO_LOSS), kind_T),
        weight=weight_T,
        elbo_weight=elbo_weight_T,
    )


def _inserted_tokens(base: _Tokens, place_T, drawn: _Drawn, edits: Edits) -> _Tokens:
    """What would be inserted before each clean token; of no meaning where nothing is."""
    return base._replace(
        place=place_T - 1,
        xt=drawn.inserted_T,
        is_masked=np.zeros_like(base.is_masked),
        target=np.full_like(base.target, edits.delete_id or 0),
        kind=np.where(drawn.inserted_has_loss_T, np.uint8(KIND_INSERTED), np.uint8(NO_LOSS)),
        weight=np.full_like(base.weight, 1 / edits.visible_subsample),
        elbo_weight=np.zeros_like(base.weight),
    )


def _put(whole: _Tokens, tokens: _Tokens, is_there_T: np.ndarray) -> None:
    """Write the tokens that are there to their places in `whole`."""
    for out, values in zip(whole[1:], tokens[1:], strict=True):
        out[tokens.place[is_there_T]] = values[is_there_T]


def _assemble(whole: _Tokens, corrupted: Corrupted) -> Corrupted:
    (rows_N,) = np.nonzero(whole.kind != NO_LOSS)
    shape, device = corrupted.xt_BL.shape, corrupted.xt_BL.device

    def at_rows(values_T: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values_T[rows_N]).to(device)

    return dataclasses.replace(
        corrupted,
        xt_BL=torch.from_numpy(whole.xt).view(shape).to(device),
        is_masked_BL=torch.from_numpy(whole.is_masked).view(shape).to(device),
        rows_N=torch.from_numpy(rows_N).to(device),
        target_N=at_rows(whole.target),
        weight_N=at_rows(whole.weight),
        elbo_weight_N=at_rows(whole.elbo_weight),
        kind_N=at_rows(whole.kind),
    )
