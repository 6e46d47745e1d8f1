"""Edits while sampling: visible tokens are drawn anew, taken out, or followed by a new mask.

A checkpoint that was trained with an edit stage also says at a visible position which token is right there: another
one, `<|delete|>`, or `<|gap|>` for "one is missing after me". Taking a token out moves what follows in its stretch (the
open positions of the row's block that hang together) to the left and masks the freed end; a new mask moves it to the
right, into masks at the end of the stretch: where there is none, nothing happens. So no token of text is ever pushed
out, and no `<|delete|>` or `<|gap|>` ever stands in a row. Shapes: B rows, L positions, N edited positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

DELETE, GAP = "delete", "gap"  # keys of the ids in `stream`'s edit_ids


@dataclass(frozen=True)
class Moves:
    """Where everything goes: source_BL, the old position of what stands at each (its own, where that is new), and
    is_new_BL, where a mask is put."""

    source_BL: Tensor
    is_new_BL: Tensor


def perhaps_edited(run: Any, state: Any, batch_row_B: Tensor) -> Tensor:
    """Visible positions [B, L] to look at, as some may be edited in this step: those that are drawn, or all, where a
    token's probability decides. In the last step none: what an edit masks must have a step to be revealed in.

    run and state are the engine's; batch_row_B are the rows' numbers in the whole batch.
    """
    is_visible_BL = ~state.is_masked_BL & ~state.is_fixed_BL & run.is_active(state)
    is_visible_BL &= (state.step_B < state.first_step_B + state.num_steps_B)[:, None]
    if run.sampler.edit_below > 0:
        return is_visible_BL
    place_N = is_visible_BL.nonzero(as_tuple=True)
    return is_visible_BL.index_put(place_N, _is_drawn(run, state, batch_row_B, place_N))


def edit(run: Any, state: Any, batch_row_B: Tensor, seen_BL: Tensor, log_probs_NV: Tensor, wait: Callable) -> Any:
    """The state after the edits at the positions that were looked at. wait(rows, uniforms) -> steps of new masks."""
    place_N = seen_BL.nonzero(as_tuple=True)
    log_prob_N = log_probs_NV.gather(1, state.x_BL[place_N][:, None])[:, 0]
    is_edited_N = _is_drawn(run, state, batch_row_B, place_N) | (log_prob_N.exp() < run.sampler.edit_below)
    place_M = tuple(index[is_edited_N] for index in place_N)
    if len(place_M[0]) == 0:
        return state
    ids_M = run.draw(log_probs_NV[is_edited_N], _uniforms(run, state, batch_row_B, place_M)[0])
    is_answer_M = {name: ids_M == run.edit_ids.get(name, -1) for name in (DELETE, GAP)}
    is_move_M = is_answer_M[DELETE] | is_answer_M[GAP]
    ids_M = torch.where(is_move_M, state.x_BL[place_M], ids_M)
    is_changed_BL = torch.zeros_like(seen_BL).index_put(place_M, ids_M != state.x_BL[place_M])
    state = replace(
        state,
        x_BL=state.x_BL.index_put(place_M, ids_M),
        is_fresh_BL=state.is_fresh_BL | is_changed_BL,
        is_revised_BL=state.is_revised_BL | is_changed_BL,
    )
    if not bool(is_move_M.any()):
        return state
    is_at_BL = (torch.zeros_like(seen_BL).index_put(place_M, is_answer_M[name]) for name in (DELETE, GAP))
    is_open_BL = ~state.is_fixed_BL & run.is_active(state)
    return _moved(run, state, batch_row_B, moves(is_open_BL, state.is_masked_BL, *is_at_BL), wait)


def _is_drawn(run: Any, state: Any, batch_row_B: Tensor, place_N: tuple[Tensor, Tensor]) -> Tensor:
    _, uniform_N = _uniforms(run, state, batch_row_B, place_N)
    remaining_B = 1 - (state.step_B - state.first_step_B).double() / state.num_steps_B
    return uniform_N < run.sampler.edit_rate * remaining_B[place_N[0]]


def _uniforms(run: Any, state: Any, batch_row_B: Tensor, place_N: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    row_N, position_N = place_N
    return run.noise.uniforms(batch_row_B[row_N], (state.step_B - state.first_step_B)[row_N], position_N)


def _moved(run: Any, state: Any, batch_row_B: Tensor, to: "Moves", wait: Callable) -> Any:
    """Everything at its new place, and a step for each new mask; its uniform stands beyond the row's positions, for
    the one at its own place may have been used in this step."""
    names = ("x_BL", "is_masked_BL", "is_fresh_BL", "is_revised_BL", "due_BL")
    moved = {name: getattr(state, name).gather(1, to.source_BL) for name in names}
    row_N, position_N = to.is_new_BL.nonzero(as_tuple=True)
    _, uniform_N = _uniforms(run, state, batch_row_B, (row_N, position_N + to.is_new_BL.shape[1]))
    return replace(
        state,
        x_BL=moved["x_BL"].masked_fill(to.is_new_BL, run.mask_id),
        is_masked_BL=moved["is_masked_BL"] | to.is_new_BL,
        is_fresh_BL=moved["is_fresh_BL"] & ~to.is_new_BL,
        is_revised_BL=moved["is_revised_BL"] | to.is_new_BL,
        due_BL=moved["due_BL"].index_put((row_N, position_N), wait(row_N, uniform_N)),
    )


def moves(is_open_BL: Tensor, is_masked_BL: Tensor, is_deleted_BL: Tensor, is_gap_BL: Tensor) -> Moves:
    """The rows after taking out the deleted tokens and putting a mask after those with a gap, from the left, as far as
    the masks at the end of the stretch and the deleted tokens make room."""
    length = is_open_BL.shape[1]
    at_L = torch.arange(length, device=is_open_BL.device)
    start_BL, end_BL = _stretches(is_open_BL, at_L)
    last_text_BL = _before_end(torch.where(is_masked_BL, -1, at_L), start_BL, end_BL)
    room_BL = end_BL - 1 - last_text_BL + _total(is_deleted_BL, start_BL, end_BL)
    is_gap_BL = is_gap_BL & (_before(is_gap_BL, start_BL) < room_BL)
    place_BL = at_L + _before(is_gap_BL, start_BL) - _before(is_deleted_BL, start_BL)
    is_kept_BL = is_open_BL & ~is_deleted_BL & (place_BL < end_BL)
    source_BL, row_N = at_L.expand_as(place_BL).clone(), is_kept_BL.nonzero()[:, 0]
    source_BL[row_N, place_BL[is_kept_BL]] = at_L.expand_as(place_BL)[is_kept_BL]
    is_new_BL = is_open_BL.clone()
    is_new_BL[row_N, place_BL[is_kept_BL]] = False
    return Moves(torch.where(is_new_BL, at_L, source_BL), is_new_BL)


def _stretches(is_open_BL: Tensor, at_L: Tensor) -> tuple[Tensor, Tensor]:
    """First position [B, L] of the run of equals that each position is in, and the one behind it."""
    is_start_BL = torch.ones_like(is_open_BL)
    is_start_BL[:, 1:] = is_open_BL[:, 1:] != is_open_BL[:, :-1]
    start_BL = torch.where(is_start_BL, at_L, 0).cummax(1).values
    end_BL = torch.full_like(start_BL, len(at_L))
    end_BL[:, :-1] = torch.where(is_start_BL, at_L, len(at_L))[:, 1:]
    return start_BL, end_BL.flip(1).cummin(1).values.flip(1)


def _before(is_true_BL: Tensor, start_BL: Tensor) -> Tensor:
    """How many positions of the same stretch before each one are true."""
    before_BL = is_true_BL.cumsum(1) - is_true_BL.long()
    return before_BL - before_BL.gather(1, start_BL)


def _total(is_true_BL: Tensor, start_BL: Tensor, end_BL: Tensor) -> Tensor:
    sums_BL1 = torch.nn.functional.pad(is_true_BL.cumsum(1), (1, 0))
    return sums_BL1.gather(1, end_BL) - sums_BL1.gather(1, start_BL)


def _before_end(value_BL: Tensor, start_BL: Tensor, end_BL: Tensor) -> Tensor:
    """The largest value of each position's stretch, but at least the position before the stretch."""
    largest_BL = value_BL.cummax(1).values.gather(1, end_BL - 1)
    return torch.maximum(largest_BL, start_BL - 1)
