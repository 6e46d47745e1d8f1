"""The loop of all samplers: advance every unfinished row to its next step, look once, reveal, perhaps undo.

Rows are independent: each has its own step, leaves the batch when it is finished, and has its own random numbers, so a
sample is a function of (seed, request hash, sample index, settings) and of what `predict` says; neither the order nor
the size of the batch enters.

Shapes: B rows, L positions, V vocabulary, N the candidate positions of one pass.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dlm_scale.diffusion.rng import Stream, philox, uniform53
from dlm_scale.sampling.samplers import Sampler, resolve
from dlm_scale.sampling.schedules import SCHEDULES, Timetable, timetable, waiting_step
from dlm_scale.sampling.selectors import SELECTORS, Candidates
from dlm_scale.sampling.tokens import TOKEN_SAMPLERS, sample_tokens


@dataclass(frozen=True)
class State:
    """Where each row stands after a pass. All fields have B rows; step, nfe in passes.

    is_fresh_BL  revealed by the row's last pass
    due_BL       step of each reveal (schedules.py), undo_BL step at which a revealed position is masked again
    is_done_B    nothing left to reveal, or a stop id stands with nothing masked before it
    """

    x_BL: Tensor
    is_fixed_BL: Tensor
    is_masked_BL: Tensor
    is_fresh_BL: Tensor
    due_BL: Tensor
    undo_BL: Tensor
    step_B: Tensor
    nfe_B: Tensor
    is_done_B: Tensor


@dataclass(frozen=True)
class Generated:
    """ids_BL int64 (the mask id stays where a stop id ended the row early), nfe_B passes that each row took."""

    ids_BL: Tensor
    nfe_B: Tensor


@dataclass(frozen=True)
class Noise:
    """The uniforms of a batch: key from (seed, SAMPLE), counter = (request hash, sample, step, position)."""

    key: int
    request_hash_B: np.ndarray
    sample_B: np.ndarray

    def uniforms(self, row_N: Tensor, step_N: Tensor, position_N: Tensor) -> tuple[Tensor, Tensor]:
        """Two independent float64 uniforms in [0, 1) for each place: one for the token, one for times and orders."""
        row, step, position = (index.cpu().numpy() for index in (row_N, step_N, position_N))
        words = philox(self.key, self.request_hash_B[row], self.sample_B[row], step, position)
        pairs = uniform53(words[0], words[1]), uniform53(words[2], words[3])
        return tuple(torch.from_numpy(uniform).to(row_N.device) for uniform in pairs)


@dataclass(frozen=True)
class _Run:
    """What stays the same from pass to pass."""

    predict: Callable[..., Tensor]
    sampler: Sampler
    table: Timetable
    noise: Noise
    draw: Callable[[Tensor, Tensor], Tensor]
    mask_id: int
    stop_ids: Tensor


def generate(
    predict: Callable[..., Tensor],
    x_BL: Tensor,
    is_fixed_BL: Tensor,
    *,
    on_step: "Callable[[State], None] | None" = None,
    **settings,
) -> Generated:
    """Fill every position that is not fixed; the settings are those of `stream`. on_step sees each pass's State."""
    state = None
    for state in stream(predict, x_BL, is_fixed_BL, **settings):
        if on_step is not None:
            on_step(state)
    return Generated(state.x_BL, state.nfe_B)


@torch.no_grad()
def stream(
    predict: Callable[..., Tensor],
    x_BL: Tensor,
    is_fixed_BL: Tensor,
    *,
    sampler: "str | Sampler",
    num_steps: int,
    seed: int,
    request_hashes: Sequence[int],
    sample_indices: Sequence[int],
    mask_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: Sequence[int] = (),
) -> Iterator[State]:
    """The start state, then the state after every pass, until all rows are done.

    predict(x_BL, rows_N) -> log_probs_NV at flat positions, ascending, of a part of the batch; column = id.
    x_BL int64 and is_fixed_BL bool: fixed positions (prompt, text around an infill, padding) are never written, all
    others start masked. num_steps >= 1 is the largest number of passes of a row (a sampler that masks again may take
    fewer, none takes more). temperature 0 takes the likeliest id. Orders read the untempered probabilities.
    Raises ValueError on settings that make no sense.
    """
    sampler = resolve(sampler)
    _check(x_BL, is_fixed_BL, num_steps, request_hashes, sample_indices, temperature, top_k, top_p)
    token_sampler = TOKEN_SAMPLERS["argmax" if temperature == 0 else sampler.token_sampler]
    run = _Run(
        predict,
        sampler,
        timetable(sampler, num_steps, x_BL.device),
        make_noise(seed, request_hashes, sample_indices),
        lambda log_probs_NV, uniform_N: sample_tokens(
            token_sampler, log_probs_NV, uniform_N, temperature, top_k, top_p
        ),
        mask_id,
        torch.tensor(list(stop_ids), dtype=torch.long, device=x_BL.device),
    )
    state = _start(run, x_BL, is_fixed_BL)
    yield state
    while not bool(state.is_done_B.all()):
        active_A = (~state.is_done_B).nonzero()[:, 0]
        part = State(**{name: tensor[active_A] for name, tensor in vars(state).items()})
        part = _finish(run, _advance(run, part, active_A))
        state = State(**{name: old.index_copy(0, active_A, getattr(part, name)) for name, old in vars(state).items()})
        yield state


def _check(x_BL, is_fixed_BL, num_steps, request_hashes, sample_indices, temperature, top_k, top_p):
    if x_BL.dim() != 2 or x_BL.shape != is_fixed_BL.shape or is_fixed_BL.dtype != torch.bool:
        raise ValueError(f"x and is_fixed are [B, L], is_fixed bool: {tuple(x_BL.shape)}, {tuple(is_fixed_BL.shape)}")
    if not len(request_hashes) == len(sample_indices) == len(x_BL):
        raise ValueError(
            f"one request hash and one sample index a row: {len(request_hashes)} and {len(sample_indices)} "
            f"for {len(x_BL)} rows"
        )
    if num_steps < 1:
        raise ValueError(f"num_steps is 1 or more, not {num_steps}")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature >= 0, top_k >= 0 and 0 < top_p <= 1, not temperature={temperature}, top_k={top_k}, "
            f"top_p={top_p}"
        )


def make_noise(seed: int, request_hashes: Sequence[int], sample_indices: Sequence[int]) -> Noise:
    """The random numbers of a batch of (request, sample) pairs under one 64-bit sampling seed."""
    low, high, _, _ = philox(seed, 0, 0, 0, int(Stream.SAMPLE))
    hashes, samples = (np.asarray(column, dtype=np.int64) for column in (request_hashes, sample_indices))
    return Noise(int(low) | int(high) << 32, hashes, samples)


def _start(run: _Run, x_BL: Tensor, is_fixed_BL: Tensor) -> State:
    """Everything not fixed is masked, and the reveals are scheduled (step 0 of the counter)."""
    num_rows, length = x_BL.shape
    row_BL = torch.arange(num_rows, device=x_BL.device)[:, None].expand(num_rows, length)
    position_BL = torch.arange(length, device=x_BL.device).expand(num_rows, length)
    _, uniform_BL = run.noise.uniforms(row_BL, torch.zeros_like(row_BL), position_BL)
    is_masked_BL = ~is_fixed_BL
    zero_B = torch.zeros_like(row_BL[:, 0])
    return State(
        x_BL=torch.where(is_fixed_BL, x_BL, run.mask_id),
        is_fixed_BL=is_fixed_BL,
        is_masked_BL=is_masked_BL,
        is_fresh_BL=torch.zeros_like(is_fixed_BL),
        due_BL=SCHEDULES[run.sampler.schedule](is_masked_BL, uniform_BL, run.table),
        undo_BL=torch.full_like(x_BL, run.table.num_steps + 1),
        step_B=zero_B,
        nfe_B=zero_B,
        is_done_B=~is_masked_BL.any(1),
    )


def _advance(run: _Run, state: State, batch_row_B: Tensor) -> State:
    """One step of every row of `state`; batch_row_B are their numbers in the whole batch."""
    selector = SELECTORS[run.sampler.selector]
    state = replace(state, step_B=_next_step(run, state))
    step_B1 = state.step_B[:, None]
    if selector.score is None:
        candidate_BL = state.is_masked_BL & (state.due_BL == step_B1)
    else:
        candidate_BL = state.is_masked_BL
    undone_BL = ~state.is_masked_BL & (state.undo_BL == step_B1)
    after = _reveal(run, state, batch_row_B, candidate_BL) if bool(candidate_BL.any()) else state
    return _mask_again(run, after, batch_row_B, undone_BL) if bool(undone_BL.any()) else after


def _next_step(run: _Run, state: State) -> Tensor:
    """The next step in which something of the row can change; steps without an event cost nothing."""
    if SELECTORS[run.sampler.selector].extent is not None:
        return state.step_B + 1
    event_BL = torch.minimum(*(_later(steps_BL, state.step_B[:, None]) for steps_BL in (state.due_BL, state.undo_BL)))
    return event_BL.amin(1)


def _later(steps_BL: Tensor, step_B1: Tensor) -> Tensor:
    return torch.where(steps_BL > step_B1, steps_BL, torch.iinfo(torch.long).max)


def _reveal(run: _Run, state: State, batch_row_B: Tensor, candidate_BL: Tensor) -> State:
    """One pass over the rows that have candidates: choose among them, give ids, plan when these are undone."""
    is_live_B = candidate_BL.any(1)
    row_N, position_N = candidate_BL.nonzero(as_tuple=True)
    step_N = state.step_B[row_N]
    flat_N = candidate_BL[is_live_B].flatten().nonzero()[:, 0]
    log_probs_NV = run.predict(state.x_BL[is_live_B], flat_N)
    token_uniform_N, other_uniform_N = run.noise.uniforms(batch_row_B[row_N], step_N, position_N)
    is_chosen_N, ids_N = _choose(run, state, candidate_BL, log_probs_NV, token_uniform_N, other_uniform_N)
    place = row_N[is_chosen_N], position_N[is_chosen_N]
    undo_N = waiting_step(run.table.log_kept_T1, step_N[is_chosen_N], other_uniform_N[is_chosen_N])
    chosen_BL = torch.zeros_like(candidate_BL).index_put(place, torch.ones_like(ids_N, dtype=torch.bool))
    return replace(
        state,
        x_BL=state.x_BL.index_put(place, ids_N),
        is_masked_BL=state.is_masked_BL & ~chosen_BL,
        is_fresh_BL=chosen_BL,
        undo_BL=state.undo_BL.index_put(place, undo_N),
        nfe_B=state.nfe_B + is_live_B,
    )


def _choose(run, state, candidate_BL, log_probs_NV, token_uniform_N, other_uniform_N) -> tuple[Tensor, Tensor]:
    """Which of the N candidates are revealed, and the ids of those."""
    selector = SELECTORS[run.sampler.selector]
    if selector.score is None:
        return torch.ones_like(token_uniform_N, dtype=torch.bool), run.draw(log_probs_NV, token_uniform_N)
    ids_N = run.draw(log_probs_NV, token_uniform_N) if selector.reads_tokens else None
    row_N, position_N = candidate_BL.nonzero(as_tuple=True)
    remaining_N = 1 - state.step_B[row_N].double() / run.table.num_steps
    score_N = selector.score(Candidates(log_probs_NV, ids_N, other_uniform_N, remaining_N), run.sampler)
    score_BL = torch.full_like(candidate_BL, -torch.inf, dtype=torch.float64).index_put((row_N, position_N), score_N)
    sorted_BL, order_BL = score_BL.sort(dim=1, descending=True, stable=True)
    count_B = state.is_masked_BL.sum(1) - (state.due_BL > state.step_B[:, None]).sum(1)
    if selector.extent is not None:
        count_B = torch.maximum(count_B, selector.extent(sorted_BL, run.sampler)).clamp(min=1)
    is_best_BL = torch.arange(order_BL.shape[1], device=order_BL.device) < count_B[:, None]
    is_chosen_N = torch.zeros_like(candidate_BL).scatter(1, order_BL, is_best_BL)[row_N, position_N]
    if ids_N is not None:
        return is_chosen_N, ids_N[is_chosen_N]
    return is_chosen_N, run.draw(log_probs_NV[is_chosen_N], token_uniform_N[is_chosen_N])


def _mask_again(run: _Run, state: State, batch_row_B: Tensor, undone_BL: Tensor) -> State:
    """Mask what is due to be undone, and plan when it is revealed again."""
    place = undone_BL.nonzero(as_tuple=True)
    step_N = state.step_B[place[0]]
    _, uniform_N = run.noise.uniforms(batch_row_B[place[0]], step_N, place[1])
    return replace(
        state,
        x_BL=state.x_BL.masked_fill(undone_BL, run.mask_id),
        is_masked_BL=state.is_masked_BL | undone_BL,
        is_fresh_BL=state.is_fresh_BL & ~undone_BL,
        due_BL=state.due_BL.index_put(place, waiting_step(run.table.log_masked_T1, step_N, uniform_N)),
    )


def _finish(run: _Run, state: State) -> State:
    """Mark the rows that are done: nothing masked or to be undone, or a stop id after an unbroken text."""
    is_idle_B = ~(state.is_masked_BL | (state.undo_BL <= run.table.num_steps)).any(1)
    if len(run.stop_ids) == 0:
        return replace(state, is_done_B=is_idle_B)
    is_before_mask_BL = state.is_masked_BL.cumsum(1) == 0
    is_stop_BL = torch.isin(state.x_BL, run.stop_ids) & ~state.is_fixed_BL & is_before_mask_BL
    return replace(state, is_done_B=is_idle_B | is_stop_BL.any(1))
