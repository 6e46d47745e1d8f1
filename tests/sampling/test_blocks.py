"""Semi-autoregressive blocks and text beyond the context, against the same sampler run by hand block by block."""

from dataclasses import replace

import pytest
import torch

from dlm_scale.sampling import SAMPLERS, generate, stream
from dlm_scale.sampling.blocks import block_ends, window_starts
from tests.sampling.test_engine import REMASKING, ROWS, L, V, predict, sample

ALL = [*SAMPLERS, REMASKING]
NAMES = [*SAMPLERS, "remasking"]


def canvases():
    generator = torch.Generator().manual_seed(2)
    x_BL = torch.randint(V, (7, L), generator=generator)
    is_fixed_BL = torch.rand(7, L, generator=generator) < torch.tensor([0, 0.2, 0.4, 0.5, 0.6, 0.9, 0])[:, None]
    is_fixed_BL[0, :5] = True  # a prompt that ends inside a block
    return x_BL, is_fixed_BL


@pytest.mark.parametrize("sampler", ALL, ids=NAMES)
@pytest.mark.parametrize("block_size", [L, L + 5])
def test_one_block_of_the_whole_row_is_no_block(sampler, block_size):
    x_BL, is_fixed_BL = canvases()
    plain, blocked = (
        sample(sampler, ROWS, 12, x_BL=x_BL, is_fixed_BL=is_fixed_BL, **settings)
        for settings in ({}, {"block_size": block_size, "context": L})
    )
    assert blocked.ids_BL.equal(plain.ids_BL) and blocked.nfe_B.equal(plain.nfe_B)


@pytest.mark.parametrize("sampler", ALL, ids=NAMES)
@pytest.mark.parametrize("num_steps", [3, 11, 40])
def test_blocks_are_the_sampler_run_on_one_block_after_the_other(sampler, num_steps):
    """Oracle: everything but the block is fixed, the masks behind it too; num_steps are the block's."""
    x_BL, is_fixed_BL = canvases()
    made = sample(sampler, ROWS, num_steps, x_BL=x_BL, is_fixed_BL=is_fixed_BL, block_size=4)
    ends_BK = block_ends(~is_fixed_BL, 4, num_steps)
    for number, row in enumerate(ROWS):
        canvas_L, nfe, before = torch.where(is_fixed_BL[number], x_BL[number], V), 0, 0
        for k, end in enumerate(ends_BK[number].tolist()):
            outside_L = is_fixed_BL[number] | (torch.arange(L) // 4 != k)
            if not outside_L.all():
                part = sample(sampler, [row], end - before, x_BL=canvas_L[None], is_fixed_BL=outside_L[None])
                canvas_L, nfe = part.ids_BL[0], nfe + int(part.nfe_B)
            before = end
        assert made.ids_BL[number].equal(canvas_L) and int(made.nfe_B[number]) == nfe
        assert nfe <= num_steps * (2 if sampler == "critic" else 1)


@pytest.mark.parametrize("sampler", ["entropy", "ancestral", REMASKING], ids=["entropy", "ancestral", "remasking"])
def test_a_sample_in_blocks_does_not_depend_on_its_batch(sampler):
    x_BL, is_fixed_BL = canvases()
    settings = {"block_size": 3, "context": 6, "stop_ids": [2]}
    whole = sample(sampler, ROWS, 15, x_BL=x_BL, is_fixed_BL=is_fixed_BL, **settings)
    for number, row in enumerate(ROWS):
        one = slice(number, number + 1)
        alone = sample(sampler, [row], 15, x_BL=x_BL[one], is_fixed_BL=is_fixed_BL[one], **settings)
        assert alone.ids_BL[0].equal(whole.ids_BL[number]) and alone.nfe_B[0] == whole.nfe_B[number]


@pytest.mark.parametrize("num_steps", [3, 4, 7, 16, 23, 100])
def test_the_steps_of_the_blocks(num_steps):
    is_open_BL = torch.rand(200, 23, generator=torch.Generator().manual_seed(num_steps)) < 0.5
    is_open_BL[:, 10:15] &= (torch.arange(200) % 3 > 0)[:, None]  # blocks without an open position
    is_open_BL[0] = True
    rows = is_open_BL[[bool(row.any()) and sum(row[i : i + 5].any() for i in range(0, 23, 5)) <= num_steps
                       for row in is_open_BL]]  # fmt: skip
    ends_BK = block_ends(rows, 5, num_steps)
    assert ends_BK.shape == (len(rows), 5) and (ends_BK[:, -1] == num_steps).all()
    for row_L, ends in zip(rows, ends_BK.tolist()):
        counts = [int(row_L[i : i + 5].sum()) for i in range(0, 23, 5)]
        steps = [end - before for before, end in zip([0, *ends], ends)]
        assert all((step >= 1) == (count > 0) for step, count in zip(steps, counts))
        if num_steps > 5 * sum(counts):
            share = [num_steps * count / sum(counts) for count in counts]
            assert all(abs(step - want) <= 1 for step, want in zip(steps, share))
    full = rows[rows.sum(1) == num_steps]
    if len(full):
        assert block_ends(full, 5, num_steps).equal(torch.stack([full[:, : i + 5].sum(1) for i in range(0, 23, 5)], 1))


def test_blocks_fill_from_left_to_right():
    for state in stream(
        predict, torch.zeros(2, L, dtype=torch.long), torch.zeros(2, L, dtype=torch.bool), sampler="entropy",
        num_steps=L, seed=1, request_hashes=[1, 2], sample_indices=[0, 0], mask_id=V, block_size=4,
    ):  # fmt: skip
        for row in state.is_masked_BL:
            first = int(row.to(torch.uint8).argmax()) if row.any() else L
            assert not row[: first // 4 * 4].any() and row[(first // 4 + 1) * 4 :].all()
    assert state.nfe_B.tolist() == [L, L]  # one token a step stays one token a step


@pytest.mark.parametrize("name", ["random", "entropy"])
def test_blocks_with_one_token_a_pass_sample_the_exact_law(chain, name):
    made = chain.sample(100_000, name, num_steps=4, block_size=2)
    assert chain.distance(made.ids_BL) < 0.011 and made.nfe_B.unique().tolist() == [4]


@pytest.mark.parametrize("sampler", ["ancestral", "threshold", REMASKING], ids=["ancestral", "threshold", "remasking"])
@pytest.mark.parametrize("context", [8, 11])
def test_beyond_the_context_the_network_sees_the_last_window(sampler, context):
    """The beginning until the block leaves it, then the last context - block tokens and the block."""
    length, x_BL = 30, torch.randint(V, (3, 30), generator=torch.Generator().manual_seed(0))
    is_fixed_BL = torch.zeros(3, length, dtype=torch.bool)
    is_fixed_BL[0, :2] = is_fixed_BL[1, :17] = True
    seen, states = [], []

    def looking(x_BW, rows_N):
        seen.append(x_BW)
        assert (x_BW.flatten()[rows_N] == V).all() and x_BW.shape[1] == context
        return predict(x_BW, rows_N)

    settings = {"sampler": sampler, "num_steps": 60, "seed": 3, "mask_id": V, "block_size": 4, "context": context}
    for state in stream(looking, x_BL, is_fixed_BL, request_hashes=[1, 2, 3], sample_indices=[0] * 3, **settings):
        states.append(state)
    assert not states[-1].is_masked_BL.any()
    looks = iter(seen)
    for before, after in zip(states, states[1:]):
        live = (after.nfe_B > before.nfe_B).nonzero()[:, 0]
        if len(live):
            start_B = [max(0, min(max(context, 4 * int(before.block_B[b]) + 4), length) - context) for b in live]
            expected = [before.x_BL[b, start : start + context] for b, start in zip(live, start_B)]
            assert next(looks).equal(torch.stack(expected))
    assert next(looks, None) is None


def test_windows():
    starts = window_starts(torch.arange(8), 4, window=11, length=30)
    assert starts.tolist() == [0, 0, 1, 5, 9, 13, 17, 19]  # the last block has two positions


def test_a_stop_id_ends_the_text_before_later_blocks():
    def says_stop_at_5(x_BL, rows_N):
        log_probs_NV = torch.full((len(rows_N), V + 1), -torch.inf)
        log_probs_NV[torch.arange(len(rows_N)), torch.where(rows_N % L == 5, 2, 1)] = 0.0
        return log_probs_NV

    made = sample("threshold", ROWS[:2], L, predict=says_stop_at_5, block_size=2, stop_ids=[2])
    assert made.ids_BL[0].tolist() == [1, 1, 1, 1, 1, 2, V, V, V, V] and made.nfe_B.tolist() == [3, 3]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_size": 0}, "block_size and context are 1 or more"),
        ({"context": 6}, "rows of 10 positions are longer than the context of 6: fill them in blocks"),
        ({"context": 6, "block_size": 7}, "blocks .block_size. of at most 6"),
        ({"block_size": 2, "num_steps": 4}, "5 blocks need 5 steps at least, not 4"),
        ({"cache": "all"}, "cache is one of none, prefix, dual, not 'all'"),
        ({"cache": "dual"}, "'dual' needs a predict that takes the argument `cache`"),
        ({"refresh_every": 2}, "needs a cache"),
        ({"guidance": -1.0}, "guidance is not negative"),
        ({"confidence_bias": {1: 2.0}}, "selector 'due' has none"),
    ],
)
def test_senseless_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        sample("random", ROWS, **change)


def test_steps_of_a_block_follow_its_own_timetable():
    """A maskgit block of 4 in 4 of 12 steps reveals what maskgit reveals of 4 positions in 4 steps."""
    sampler = replace(SAMPLERS["maskgit"], gumbel=0.0)
    states = list(stream(
        predict, torch.zeros(1, 12, dtype=torch.long), torch.zeros(1, 12, dtype=torch.bool), sampler=sampler,
        num_steps=12, seed=1, request_hashes=[1], sample_indices=[0], mask_id=V, block_size=4,
    ))  # fmt: skip
    alone = []
    x_BL = torch.zeros(1, 4, dtype=torch.long)
    generate(
        predict, x_BL, x_BL > 0, sampler=sampler, num_steps=4, seed=1, request_hashes=[1], sample_indices=[0],
        mask_id=V, on_step=lambda state: alone.append(int(state.is_masked_BL.sum())),
    )  # fmt: skip
    counts = [int(state.is_masked_BL.sum()) for state in states]
    assert counts == [8 + n for n in alone] + [4 + n for n in alone[1:]] + alone[1:]
