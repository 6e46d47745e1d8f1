"""The loop of all samplers: advance every unfinished row to its next step, look once, reveal, perhaps undo.

Rows are independent: each has its own block and step, leaves the batch when it is finished, and has its own random
numbers, so a sample is a function of (seed, request hash, sample index, settings) and of what `predict` says; neither
the order nor the size of the batch enters.

Shapes: B rows, L positions, V vocabulary, N the candidate positions of one pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dlm_scale.sampling.blocks import block_ends, block_of_L
from dlm_scale.sampling.caches import KeyValueCache
from dlm_scale.sampling.checks import check_blocks, check_extras, check_rows
from dlm_scale.sampling.edits import edit, perhaps_edited
from dlm_scale.sampling.noise import Noise, make_noise
from dlm_scale.sampling.passes import Look, biased
from dlm_scale.sampling.samplers import Sampler, resolve
from dlm_scale.sampling.schedules import REVISERS, SCHEDULES, timetable, waiting_step
from dlm_scale.sampling.selectors import SELECTORS, Candidates, Selector
from dlm_scale.sampling.tokens import TOKEN_SAMPLERS, sample_tokens
from dlm_scale.sampling.waves import fill_in_waves

_NEVER = torch.iinfo(torch.long).max


@dataclass(frozen=True)
class State:
    """Where each row stands after a pass. All fields have B rows. Steps count from the start of the whole text.

    is_fresh_BL    revealed by the row's last pass
    is_revised_BL  has been masked again at some time, or was changed
    due_BL         step of each reveal in the row's block (schedules.py), undo_BL step at which one is masked again
    confidence_BL  probability that the token had when it was drawn (kept where the reviser reads it)
    nfe_B          passes of the network
    block_B        the block that the row is in; first_step_B, num_steps_B: the step before its first, and its steps
    is_done_B      nothing left to reveal, or a stop id stands with nothing masked before it
    """

    x_BL: Tensor
    is_fixed_BL: Tensor
    is_masked_BL: Tensor
    is_fresh_BL: Tensor
    is_revised_BL: Tensor
    due_BL: Tensor
    undo_BL: Tensor
    confidence_BL: Tensor
    step_B: Tensor
    nfe_B: Tensor
    block_B: Tensor
    first_step_B: Tensor
    num_steps_B: Tensor
    is_done_B: Tensor


@dataclass(frozen=True)
class Generated:
    """ids_BL int64 (the mask id stays where a stop id ended the row early), nfe_B passes that each row took."""

    ids_BL: Tensor
    nfe_B: Tensor


@dataclass(frozen=True)
class _Run:
    """What stays the same from pass to pass."""

    look: Look
    sampler: Sampler
    num_steps: int
    noise: Noise
    draw: Callable[[Tensor, Tensor], Tensor]
    mask_id: int
    stop_ids: Tensor
    block_L: Tensor
    confidence_bias: Mapping[int, float]
    edit_ids: Mapping[str, int]

    @property
    def selector(self) -> Selector:
        return SELECTORS[self.sampler.selector]

    @property
    def looks_at_state_to_revise(self) -> bool:
        return REVISERS[self.sampler.reviser].share is not None

    @property
    def acts_at_every_step(self) -> bool:
        """Whether something may happen to visible tokens at any step, up to the last."""
        return self.looks_at_state_to_revise or self.sampler.edits

    @property
    def asks_critic(self) -> bool:
        return REVISERS[self.sampler.reviser].asks_critic

    def table(self, num_steps: int):
        return timetable(self.sampler, num_steps, self.block_L.device)

    def is_active(self, state: State) -> Tensor:
        """Positions [B, L] of each row's block."""
        return self.block_L == state.block_B[:, None]


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
    block_size: "int | None" = None,
    context: "int | None" = None,
    guidance: float = 0.0,
    cache: str = "none",
    refresh_every: int = 0,
    logit_bias: Mapping[int, float] = {},
    confidence_bias: Mapping[int, float] = {},
    allow_edits: bool = False,
    edit_ids: Mapping[str, int] = {},
) -> Iterator[State]:
    """The start state, then the state after every pass, until all rows are done.

    predict(x_BL, rows_N) -> log_probs_NV at flat positions, ascending, of a part of the batch; column = id.
    x_BL int64 and is_fixed_BL bool: fixed positions (prompt, text around an infill, padding) are never written, all
    others start masked. num_steps >= 1 is the most looks of a row (a sampler that masks again may take fewer, none
    takes more). temperature 0 takes the likeliest id. Orders read the untempered probabilities.

    block_size: positions are filled block by block, each by the sampler in its share of the steps (None: all at once).
    context: the most positions that predict can look at; rows may be longer where blocks are used, and then slide.
    guidance: w of blind + (w+1) (given - blind), blind with the fixed positions masked; two passes a look, unless 0.
    cache, refresh_every: keep keys and values within a block (caches.py); predict must take the argument `cache`.
    logit_bias: value added to an id's logit. confidence_bias: value added to the score of a position whose id (drawn,
    or likeliest where the order looks at the state alone) it is; -inf: revealed only when nothing else is left.
    allow_edits: the sampler edits visible tokens (edits.py), those that edit anyway need no word. edit_ids: the ids of
    the answers `delete` and `gap`, of those that the network has learnt; they are drawn at visible positions alone.
    Raises ValueError on settings that make no sense.
    """
    sampler = resolve(sampler, allow_edits)
    length = x_BL.shape[-1]
    block_size = 1 if sampler.is_left_to_right else length if block_size is None else min(block_size, length)
    window = length if context is None else min(context, length)
    check_rows(x_BL, is_fixed_BL, num_steps, request_hashes, sample_indices, temperature, top_k, top_p)
    check_blocks(is_fixed_BL, num_steps, block_size, window, context)
    check_extras(predict, sampler, guidance, cache, refresh_every, confidence_bias)
    token_sampler = TOKEN_SAMPLERS["argmax" if temperature == 0 else sampler.token_sampler]
    kept_rows = len(x_BL) * (1 if guidance == 0 else 2)
    kept = None if cache == "none" else KeyValueCache(cache, refresh_every, kept_rows, x_BL.device)
    run = _Run(
        Look(predict, mask_id, window, block_size, guidance, logit_bias, kept),
        sampler,
        num_steps,
        make_noise(seed, request_hashes, sample_indices),
        lambda log_probs_NV, uniform_N: sample_tokens(
            token_sampler, log_probs_NV, uniform_N, temperature, top_k, top_p
        ),
        mask_id,
        torch.tensor(list(stop_ids), dtype=torch.long, device=x_BL.device),
        block_of_L(length, block_size, x_BL.device),
        confidence_bias,
        edit_ids if sampler.edits else {},
    )
    state = _start(run, x_BL, is_fixed_BL)
    yield state
    while not bool(state.is_done_B.all()):
        active_A = (~state.is_done_B).nonzero()[:, 0]
        state = _on_rows(state, active_A, lambda part: _finish(run, _advance(run, part, active_A), active_A))
        yield state


def _on_rows(state: State, row_A: Tensor, change: Callable[[State], State]) -> State:
    """`change` applied to some rows of the state."""
    if len(row_A) == len(state.step_B):
        return change(state)
    changed = change(State(**{name: tensor[row_A] for name, tensor in vars(state).items()}))
    return State(**{name: old.index_copy(0, row_A, getattr(changed, name)) for name, old in vars(state).items()})


def _start(run: _Run, x_BL: Tensor, is_fixed_BL: Tensor) -> State:
    """Everything not fixed is masked, and every row is in its first block."""
    zero_B = torch.zeros(len(x_BL), dtype=torch.long, device=x_BL.device)
    false_BL = torch.zeros_like(is_fixed_BL)
    state = State(
        x_BL=torch.where(is_fixed_BL, x_BL, run.mask_id),
        is_fixed_BL=is_fixed_BL,
        is_masked_BL=~is_fixed_BL,
        is_fresh_BL=false_BL,
        is_revised_BL=false_BL,
        due_BL=torch.zeros_like(x_BL),
        undo_BL=torch.full_like(x_BL, _NEVER),
        confidence_BL=torch.zeros_like(x_BL, dtype=torch.float64),
        step_B=zero_B,
        nfe_B=zero_B,
        block_B=zero_B,
        first_step_B=zero_B,
        num_steps_B=zero_B,
        is_done_B=~(~is_fixed_BL).any(1),
    )
    open_A = (~state.is_done_B).nonzero()[:, 0]
    return _on_rows(state, open_A, lambda part: _enter_block(run, part, open_A))


def _enter_block(run: _Run, state: State, batch_row_B: Tensor) -> State:
    """The rows begin the block of their first masked position: its reveals are scheduled (step 0 of the counter)."""
    block_B = run.block_L[state.is_masked_BL.to(torch.uint8).argmax(1)]
    is_open_BL = ~state.is_fixed_BL
    most_steps = is_open_BL.sum(1, keepdim=True) if run.sampler.is_left_to_right else run.num_steps
    end_BK = block_ends(is_open_BL, run.look.block_size, most_steps)
    first_B = torch.where(block_B > 0, end_BK.gather(1, (block_B - 1).clamp(min=0)[:, None])[:, 0], 0)
    num_steps_B = end_BK.gather(1, block_B[:, None])[:, 0] - first_B
    member_BL = state.is_masked_BL & (run.block_L == block_B[:, None])
    row_N, position_N = member_BL.nonzero(as_tuple=True)
    _, uniform_N = run.noise.uniforms(batch_row_B[row_N], torch.zeros_like(row_N), position_N)
    uniform_BL = torch.zeros_like(state.confidence_BL).index_put((row_N, position_N), uniform_N)
    due_BL = torch.zeros_like(state.due_BL)
    for num_steps in num_steps_B.unique().tolist():
        own_A = (num_steps_B == num_steps).nonzero()[:, 0]
        schedule = SCHEDULES[run.sampler.schedule]
        due_BL[own_A] = schedule(member_BL[own_A], uniform_BL[own_A], run.table(num_steps))
    return replace(
        state,
        due_BL=torch.where(member_BL, due_BL + first_B[:, None], 0),
        step_B=first_B,
        block_B=block_B,
        first_step_B=first_B,
        num_steps_B=num_steps_B,
    )


def _advance(run: _Run, state: State, batch_row_B: Tensor) -> State:
    """One step of every row of `state`; batch_row_B are their numbers in the whole batch."""
    state = replace(state, step_B=_next_step(run, state))
    step_B1 = state.step_B[:, None]
    if run.selector.score is None:
        candidate_BL = state.is_masked_BL & (state.due_BL == step_B1)
    else:
        candidate_BL = state.is_masked_BL & run.is_active(state)
    if run.looks_at_state_to_revise:
        undone_BL = _revised(run, state, batch_row_B)
    else:
        undone_BL = ~state.is_masked_BL & (state.undo_BL == step_B1)
    edited_BL = perhaps_edited(run, state, batch_row_B) if run.sampler.edits else torch.zeros_like(candidate_BL)
    is_seen = bool(candidate_BL.any()) or bool(edited_BL.any())
    after = _reveal(run, state, batch_row_B, candidate_BL, edited_BL) if is_seen else state
    if run.asks_critic:
        return _mask_doubted(run, after, state.is_masked_BL)
    return _mask_again(run, after, batch_row_B, undone_BL) if bool(undone_BL.any()) else after


def _next_step(run: _Run, state: State) -> Tensor:
    """The next step in which something of the row can change; steps without an event cost nothing."""
    if (run.selector.extent is not None and not run.asks_critic) or run.acts_at_every_step:
        return state.step_B + 1
    due_B, undo_B = (_later(steps_BL, state.step_B[:, None]) for steps_BL in (state.due_BL, state.undo_BL))
    return torch.minimum(due_B, undo_B)


def _later(steps_BL: Tensor, step_B1: Tensor) -> Tensor:
    return torch.where(steps_BL > step_B1, steps_BL, _NEVER).amin(1)


def _wait(run: _Run, state: State, kind: str, row_N: Tensor, uniform_N: Tensor) -> Tensor:
    """The step of the next event (Timetable's table `kind`) at positions of these rows; _NEVER past the block's end."""
    step_N, num_steps_N = (state.step_B - state.first_step_B)[row_N], state.num_steps_B[row_N]
    event_N = torch.full_like(row_N, _NEVER)
    for num_steps in num_steps_N.unique().tolist():
        own = (num_steps_N == num_steps).nonzero()[:, 0]
        found = waiting_step(getattr(run.table(num_steps), kind), step_N[own], uniform_N[own])
        event_N[own] = torch.where(found > num_steps, _NEVER, found + state.first_step_B[row_N[own]])
    return event_N


def _reveal(run: _Run, state: State, batch_row_B: Tensor, candidate_BL: Tensor, edited_BL: Tensor) -> State:
    """One pass over the rows that have candidates, or visible tokens that may be edited: choose among the candidates,
    give ids, plan when these are undone; then edit."""
    seen_BL = candidate_BL | edited_BL
    is_live_B = seen_BL.any(1)
    live_A = is_live_B.nonzero()[:, 0]
    look_at = state.x_BL, state.is_fixed_BL, seen_BL, batch_row_B, state.block_B
    if len(live_A) < len(is_live_B):
        look_at = tuple(whole[live_A] for whole in look_at)
    if run.sampler.needs == "local":
        x_AL, _, candidate_AL, _, block_A = look_at
        log_probs_NV, again = run.look.local(x_AL, candidate_AL, block_A)
        place_M, ids_M, log_probs_MV = _choose_in_waves(run, state, batch_row_B, candidate_BL, log_probs_NV, again)
    else:
        log_probs_NV = run.look(*look_at)
        if run.sampler.edits:
            is_edited_N, visible_NV = edited_BL[seen_BL], log_probs_NV
            visible_NV, log_probs_NV = visible_NV[is_edited_N], visible_NV[~is_edited_N]
            log_probs_NV = biased(log_probs_NV, dict.fromkeys(run.edit_ids.values(), -torch.inf))
        place_M, ids_M, log_probs_MV = _choose(run, state, batch_row_B, candidate_BL, log_probs_NV)
    chosen_BL = torch.zeros_like(candidate_BL).index_put(place_M, torch.ones_like(ids_M, dtype=torch.bool))
    after = replace(
        state,
        x_BL=state.x_BL.index_put(place_M, ids_M),
        is_masked_BL=state.is_masked_BL & ~chosen_BL,
        is_fresh_BL=chosen_BL,
        nfe_B=state.nfe_B + is_live_B * run.look.nfe,
    )
    if run.sampler.edits:
        wait = partial(_wait, run, after, "log_masked_T1")
        return edit(run, after, batch_row_B, edited_BL, visible_NV, wait)
    return _plan_revision(run, after, batch_row_B, place_M, log_probs_MV.gather(1, ids_M[:, None])[:, 0])


def _choose(run, state, batch_row_B, candidate_BL, log_probs_NV) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Which candidates are revealed: their place (rows, positions), ids, and log-probabilities."""
    place_N = candidate_BL.nonzero(as_tuple=True)
    if run.selector.score is None:
        token_uniform_N, _ = _uniforms(run, state, batch_row_B, place_N)
        return place_N, run.draw(log_probs_NV, token_uniform_N), log_probs_NV
    ids_N = other_uniform_N = None
    if run.selector.reads_tokens:
        token_uniform_N, other_uniform_N = _uniforms(run, state, batch_row_B, place_N)
        ids_N = run.draw(log_probs_NV, token_uniform_N)
    chosen_M = _ranked(run, state, candidate_BL, log_probs_NV, ids_N, other_uniform_N)
    place_M, log_probs_MV = tuple(index[chosen_M] for index in place_N), log_probs_NV[chosen_M]
    if ids_N is not None:
        return place_M, ids_N[chosen_M], log_probs_MV
    return place_M, run.draw(log_probs_MV, _uniforms(run, state, batch_row_B, place_M)[0]), log_probs_MV


def _choose_in_waves(
    run, state, batch_row_B, candidate_BL, log_probs_NV, again
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """The same with ids that are drawn in waves: `again` gives log-probabilities of candidates given ids beside them."""
    place_N = candidate_BL.nonzero(as_tuple=True)
    chosen_M = torch.arange(len(log_probs_NV), device=log_probs_NV.device)
    if run.selector.score is not None:
        chosen_M = _ranked(run, state, candidate_BL, log_probs_NV, None, None)
    place_M = tuple(index[chosen_M] for index in place_N)
    uniform_M, _ = _uniforms(run, state, batch_row_B, place_M)
    ids_M = fill_in_waves(
        lambda which_K, *beside: again(chosen_M[which_K], *beside), run.draw, state.x_BL, state.x_BL == run.mask_id,
        place_M, uniform_M,
    )  # fmt: skip
    return place_M, ids_M, log_probs_NV[chosen_M]


def _ranked(run, state, candidate_BL, log_probs_NV, ids_N, uniform_N) -> Tensor:
    """Numbers [M] of the candidates that a selector by score reveals."""
    remaining_B = 1 - (state.step_B - state.first_step_B).double() / state.num_steps_B
    candidates = Candidates(log_probs_NV, ids_N, uniform_N, remaining_B[candidate_BL.nonzero(as_tuple=True)[0]])
    return _best(run, state, candidate_BL, _scores(run, candidates)).nonzero()[:, 0]


def _uniforms(run: _Run, state: State, batch_row_B: Tensor, place_N: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    row_N, position_N = place_N
    return run.noise.uniforms(batch_row_B[row_N], (state.step_B - state.first_step_B)[row_N], position_N)


def _scores(run: _Run, candidates: Candidates) -> Tensor:
    """The selector's scores [N] with the bias of the ids, finite."""
    score_N = run.selector.score(candidates, run.sampler)
    if run.confidence_bias:
        ids_N = candidates.log_probs_NV.argmax(-1) if candidates.ids_N is None else candidates.ids_N
        for token, value in run.confidence_bias.items():
            score_N = torch.where(ids_N == token, score_N + value, score_N)
    return score_N.clamp(min=torch.finfo(score_N.dtype).min)  # -inf is what positions out of question have


def _best(run: _Run, state: State, candidate_BL: Tensor, score_N: Tensor) -> Tensor:
    """bool [N]: the candidates with the largest scores of each row, as many as are due or the selector's extent."""
    place_N = candidate_BL.nonzero(as_tuple=True)
    score_BL = torch.full_like(candidate_BL, -torch.inf, dtype=torch.float64).index_put(place_N, score_N)
    sorted_BL, order_BL = score_BL.sort(dim=1, descending=True, stable=True)
    count_B = candidate_BL.sum(1) - (state.due_BL > state.step_B[:, None]).sum(1)
    if run.selector.extent is not None:
        count_B = torch.maximum(count_B, run.selector.extent(sorted_BL, run.sampler)).clamp(min=1)
    is_best_BL = torch.arange(order_BL.shape[1], device=order_BL.device) < count_B[:, None]
    return torch.zeros_like(candidate_BL).scatter(1, order_BL, is_best_BL)[place_N]


def _plan_revision(run, state, batch_row_B, place_M, log_prob_M) -> State:
    """When the tokens just revealed are masked again, or what the reviser will want to know of them."""
    if run.sampler.reviser == "none":
        return state
    if run.looks_at_state_to_revise:
        return replace(state, confidence_BL=state.confidence_BL.index_put(place_M, log_prob_M.double().exp()))
    _, uniform_M = _uniforms(run, state, batch_row_B, place_M)
    undo_M = _wait(run, state, "log_kept_T1", place_M[0], uniform_M)
    return replace(state, undo_BL=state.undo_BL.index_put(place_M, undo_M))


def _revised(run: _Run, state: State, batch_row_B: Tensor) -> Tensor:
    """Positions [B, L] that a reviser which looks at the state masks again in this step."""
    is_revealed_BL = ~state.is_masked_BL & ~state.is_fixed_BL & run.is_active(state)
    sigma_B = torch.zeros_like(state.confidence_BL[:, 0])
    for num_steps in state.num_steps_B.unique().tolist():
        own_A = (state.num_steps_B == num_steps).nonzero()[:, 0]
        sigma_B[own_A] = run.table(num_steps).sigma_T[(state.step_B - state.first_step_B)[own_A] - 1]
    chance_BL = sigma_B[:, None] * REVISERS[run.sampler.reviser].share(state.confidence_BL, is_revealed_BL)
    place_N = is_revealed_BL.nonzero(as_tuple=True)
    token_uniform_N, _ = _uniforms(run, state, batch_row_B, place_N)  # no token is drawn here in this step
    return torch.zeros_like(is_revealed_BL).index_put(place_N, token_uniform_N < chance_BL[place_N])


def _mask_doubted(run: _Run, state: State, was_masked_BL: Tensor) -> State:
    """One more look, a critic's, at rows that are to keep masks in their block: the likeliest errors are masked again,
    whenever they were revealed."""
    count_B = (state.due_BL > state.step_B[:, None]).sum(1)
    judged_A = (count_B > 0).nonzero()[:, 0]
    if len(judged_A) == 0:
        return state
    open_AL = (~state.is_fixed_BL & run.is_active(state))[judged_A]
    logit_N = run.look.critique(state.x_BL[judged_A], open_AL, state.block_B[judged_A]).double()
    lowest = torch.finfo(logit_N.dtype).min  # -inf is what positions out of question have
    score_AL = torch.full_like(open_AL, -torch.inf, dtype=torch.float64).masked_scatter(open_AL, logit_N.clamp(min=lowest))
    order_AL = score_AL.argsort(dim=1, descending=True, stable=True)
    is_worst_AL = torch.arange(order_AL.shape[1], device=order_AL.device) < count_B[judged_A, None]
    doubted_BL = torch.zeros_like(was_masked_BL)
    doubted_BL[judged_A] = torch.zeros_like(open_AL).scatter(1, order_AL, is_worst_AL)
    return replace(
        state,
        x_BL=state.x_BL.masked_fill(doubted_BL, run.mask_id),
        is_masked_BL=state.is_masked_BL | doubted_BL,
        is_fresh_BL=state.is_fresh_BL & ~doubted_BL,
        is_revised_BL=state.is_revised_BL | (doubted_BL & ~was_masked_BL),
        nfe_B=state.nfe_B + (count_B > 0),
    )


def _mask_again(run: _Run, state: State, batch_row_B: Tensor, undone_BL: Tensor) -> State:
    """Mask what is due to be undone, and plan when it is revealed again."""
    place_N = undone_BL.nonzero(as_tuple=True)
    _, uniform_N = _uniforms(run, state, batch_row_B, place_N)
    due_N = _wait(run, state, "log_masked_T1", place_N[0], uniform_N)
    return replace(
        state,
        x_BL=state.x_BL.masked_fill(undone_BL, run.mask_id),
        is_masked_BL=state.is_masked_BL | undone_BL,
        is_fresh_BL=state.is_fresh_BL & ~undone_BL,
        is_revised_BL=state.is_revised_BL | undone_BL,
        due_BL=state.due_BL.index_put(place_N, due_N),
    )


def _finish(run: _Run, state: State, batch_row_B: Tensor) -> State:
    """Rows with nothing left to do in their block go to the next; those without one, or at a stop id, are done."""
    pending_BL = (state.is_masked_BL & run.is_active(state)) | (~state.is_masked_BL & (state.undo_BL != _NEVER))
    is_idle_B = ~pending_BL.any(1)
    if run.acts_at_every_step:
        is_idle_B &= state.step_B == state.first_step_B + state.num_steps_B
    is_done_B = is_idle_B & ~state.is_masked_BL.any(1)
    if len(run.stop_ids):
        is_before_mask_BL = state.is_masked_BL.cumsum(1) == 0
        is_done_B |= (torch.isin(state.x_BL, run.stop_ids) & ~state.is_fixed_BL & is_before_mask_BL).any(1)
    state = replace(state, is_done_B=is_done_B)
    entering_A = (is_idle_B & ~is_done_B).nonzero()[:, 0]
    if len(entering_A) == 0:
        return state
    return _on_rows(state, entering_A, lambda part: _enter_block(run, part, batch_row_B[entering_A]))
