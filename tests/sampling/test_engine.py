"""The loop: independence of the batch, fixed positions, stopping, and what a pass costs."""

from dataclasses import replace

import pytest
import torch

from dlm_scale.sampling import SAMPLERS, generate, stream

V, L = 6, 10
REMASKING = replace(SAMPLERS["remdm"], eta=0.2)


def predict(x_BL, rows_N, attention=None):
    """A made-up denoiser, each position depending on its whole row; id V (the mask) is impossible."""
    table = torch.randn(211, V + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table[:, V] = -torch.inf
    row_N, position_N = rows_N // x_BL.shape[1], rows_N % x_BL.shape[1]
    code_B = (x_BL * torch.arange(3, 3 + x_BL.shape[1])).sum(1)
    return torch.log_softmax(table[(code_B[row_N] * 7 + position_N * 13) % 211], -1)


def critique(x_BL, rows_N):
    """Made up too: the less likely the denoiser finds an id, the more it is doubted."""
    return -predict(x_BL, rows_N).gather(1, x_BL.flatten()[rows_N][:, None])[:, 0]


def local(x_BL, rows_N):
    """The made-up denoiser, told the ids beside a position."""

    def again(which_M, left_M, right_M):
        found_MV = predict(x_BL, rows_N)[which_M] + 0.3 * left_M[:, None] * torch.arange(V + 1) - 0.2 * right_M[:, None]
        return found_MV.log_softmax(-1)

    return predict(x_BL, rows_N), again


predict.critique, predict.local = critique, local


def sample(sampler, rows, num_steps=6, x_BL=None, is_fixed_BL=None, **settings):
    """Rows are (request hash, sample index) pairs."""
    x_BL = torch.zeros(len(rows), L, dtype=torch.long) if x_BL is None else x_BL
    return generate(
        settings.pop("predict", predict),
        x_BL,
        torch.zeros_like(x_BL, dtype=torch.bool) if is_fixed_BL is None else is_fixed_BL,
        sampler=sampler,
        num_steps=num_steps,
        mask_id=V,
        request_hashes=[row[0] for row in rows],
        sample_indices=[row[1] for row in rows],
        **{"seed": 5} | settings,
    )


ROWS = [(7, 0), (7, 1), (7, 2), (4_000_000_000, 0), (9, 0), (9, 1), (1, 5)]


@pytest.mark.parametrize("sampler", [*SAMPLERS, REMASKING], ids=[*SAMPLERS, "remasking"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_k": 4, "top_p": 0.9}], ids=["plain", "cut"])
def test_a_sample_does_not_depend_on_its_batch(sampler, settings):
    whole = sample(sampler, ROWS, **settings)
    reverse = sample(sampler, ROWS[::-1], **settings)
    assert whole.ids_BL.equal(reverse.ids_BL.flip(0)) and whole.nfe_B.equal(reverse.nfe_B.flip(0))
    for number, row in enumerate(ROWS):
        alone = sample(sampler, [row], **settings)
        assert alone.ids_BL[0].equal(whole.ids_BL[number]) and alone.nfe_B[0] == whole.nfe_B[number]


@pytest.mark.parametrize("sampler", [*SAMPLERS, REMASKING], ids=[*SAMPLERS, "remasking"])
def test_a_row_that_is_done_leaves_the_others_as_they_were(sampler):
    x_BL, is_fixed_BL = torch.ones(8, L, dtype=torch.long), torch.zeros(8, L, dtype=torch.bool)
    is_fixed_BL[0] = True
    made = sample(sampler, [(0, 0), *ROWS], 20, x_BL=x_BL, is_fixed_BL=is_fixed_BL)
    assert made.ids_BL[1:].equal(sample(sampler, ROWS, 20).ids_BL)
    assert made.ids_BL[0].equal(x_BL[0]) and made.nfe_B[0] == 0


def test_seed_request_and_sample_index_all_matter():
    pairs = [(request, index) for request in range(8) for index in range(5)]
    base, other = sample("ancestral", pairs), sample("ancestral", pairs, seed=6)
    assert len({tuple(row) for row in base.ids_BL.tolist()}) == 40
    assert not base.ids_BL.equal(other.ids_BL)
    assert sample("ancestral", ROWS, seed=2**64 - 1).ids_BL.shape == (7, L)


@pytest.mark.parametrize("sampler", [*SAMPLERS, REMASKING], ids=[*SAMPLERS, "remasking"])
@pytest.mark.parametrize("num_steps", [1, 3, 10, 60])
def test_fixed_positions_are_never_written(sampler, num_steps):
    generator = torch.Generator().manual_seed(1)
    x_BL = torch.randint(V, (7, L), generator=generator)
    is_fixed_BL = torch.rand(7, L, generator=generator) < torch.linspace(0, 1, 7)[:, None]
    seen = []

    def on_step(state):
        seen.append(state)
        assert state.x_BL[is_fixed_BL].equal(x_BL[is_fixed_BL])
        assert ((state.x_BL == V) == state.is_masked_BL).all() and not (state.is_masked_BL & is_fixed_BL).any()

    made = sample(sampler, ROWS, num_steps, x_BL=x_BL, is_fixed_BL=is_fixed_BL, on_step=on_step)
    assert made.ids_BL[is_fixed_BL].equal(x_BL[is_fixed_BL]) and int(made.ids_BL.max()) < V
    most = 2 * num_steps - 1 if sampler == "critic" else num_steps  # a look of the critic's after each but the last
    assert (made.nfe_B <= most).all() and made.nfe_B[-1] == 0  # the last row was all fixed
    assert not seen[0].x_BL[~is_fixed_BL].ne(V).any()  # what stood at open positions is not looked at


@pytest.mark.parametrize("sampler", ["ancestral", "first_hitting", "random"])
def test_state_free_orders_look_only_where_they_reveal(sampler):
    looks = []

    def counting(x_BL, rows_N):
        assert (x_BL.flatten()[rows_N] == V).all() and (rows_N.diff() > 0).all()
        assert (rows_N // L).unique().numel() == len(x_BL)  # no idle row in a pass
        looks.append((len(x_BL), len(rows_N)))
        return predict(x_BL, rows_N)

    made = sample(sampler, ROWS, 50, predict=counting)
    assert sum(rows for _, rows in looks) == 7 * L
    assert sum(batch for batch, _ in looks) == int(made.nfe_B.sum())


def test_orders_by_score_look_at_all_masked_positions():
    looks = []

    def counting(x_BL, rows_N):
        looks.append(len(rows_N))
        return predict(x_BL, rows_N)

    sample("entropy", ROWS[:1], num_steps=L, predict=counting)
    assert looks == list(range(L, 0, -1))


def test_passes_of_ancestral_are_the_steps_with_an_event():
    """E[NFE] = T (1 - (1 - 1/T)^L)."""
    for num_steps in (4, 40):
        made = sample("ancestral", [(3, i) for i in range(4000)], num_steps)
        expected = num_steps * (1 - (1 - 1 / num_steps) ** L)
        assert float(made.nfe_B.double().mean()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("num_steps, passes", [(60, L), (L, L), (4, 4)])
def test_adaptive_orders_reveal_at_least_one_and_keep_within_the_steps(num_steps, passes):
    for never_sure in (replace(SAMPLERS["threshold"], threshold=1.1), replace(SAMPLERS["entropy_bounded"], gamma=0.0)):
        assert sample(never_sure, ROWS, num_steps).nfe_B.unique().tolist() == [passes]
    assert sample(replace(SAMPLERS["threshold"], threshold=0.0), ROWS, num_steps).nfe_B.unique().tolist() == [1]


def test_temperature_zero_takes_the_likeliest_token():
    rows = [(i, 0) for i in range(5)]
    greedy = sample("entropy", rows, num_steps=L, temperature=0.0)
    assert (greedy.ids_BL == greedy.ids_BL[0]).all()
    x_BL = torch.full((1, L), V)
    for _ in range(L):
        log_probs_LV = predict(x_BL, torch.arange(L))
        entropy_L = -(log_probs_LV.exp() * log_probs_LV.clamp(min=-1e9)).sum(-1)
        position = int(torch.where(x_BL[0] == V, entropy_L, torch.inf).argmin())
        x_BL[0, position] = log_probs_LV[position].argmax()
    assert greedy.ids_BL[0].equal(x_BL[0])


@pytest.mark.parametrize("reads", ["entropy", "threshold", "low_confidence", "margin"])
def test_ties_go_to_the_earlier_position(reads):
    order = []

    def on_step(state):
        order.extend(state.is_fresh_BL[0].nonzero().flatten().tolist())

    log_probs_V = torch.tensor([0.25, 0.25, 0.25, 0.25]).log()
    generate(
        lambda x_BL, rows_N: log_probs_V.expand(len(rows_N), -1),
        torch.zeros(1, 6, dtype=torch.long), torch.zeros(1, 6, dtype=torch.bool),
        sampler=reads, num_steps=6, seed=0, request_hashes=[0], sample_indices=[0], mask_id=4, on_step=on_step,
    )  # fmt: skip
    assert order == list(range(6))


def test_a_row_stops_at_a_stop_id_after_unbroken_text():
    x_BL = torch.full((2, L), 2)
    is_fixed_BL = torch.zeros(2, L, dtype=torch.bool)
    is_fixed_BL[:, 0] = True  # a stop id in the prompt does not count

    def left_to_right(x_BL, rows_N):
        """Position i is surer than i + 1; row by row it says 1, and 2 at position 4 of a row that starts with 2."""
        position_N = rows_N % L
        log_probs_NV = torch.full((len(rows_N), V + 1), -40.0, dtype=torch.float64)
        says_N = torch.where((position_N == 4) & (x_BL[rows_N // L, 0] == 2), 2, 1)
        log_probs_NV[torch.arange(len(rows_N)), says_N] = -1e-6 * (1 + position_N.double())
        return log_probs_NV

    x_BL[1, 0] = 3
    made = sample(
        "low_confidence", ROWS[:2], 100, x_BL=x_BL, is_fixed_BL=is_fixed_BL, predict=left_to_right, stop_ids=[2]
    )
    assert made.ids_BL[0].tolist() == [2, 1, 1, 1, 2, V, V, V, V, V]
    assert made.ids_BL[1].tolist() == [3] + [1] * 9
    assert made.nfe_B.tolist() == [4, 9]


def test_a_stop_id_with_a_hole_before_it_does_not_stop():
    def predict_stop(x_BL, rows_N):
        return torch.tensor([0.0, -torch.inf]).expand(len(rows_N), -1)

    states = list(stream(
        predict_stop, torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.bool),
        sampler="random", num_steps=4, seed=1, request_hashes=[0], sample_indices=[0], mask_id=1, stop_ids=[0],
    ))  # fmt: skip
    for state in states:
        assert bool(state.is_done_B[0]) == (not bool(state.is_masked_BL[0, 0]))
    assert len(states) >= 3


def test_stream_shows_what_is_fresh():
    before = None
    for state in stream(
        predict, torch.zeros(2, L, dtype=torch.long), torch.zeros(2, L, dtype=torch.bool), sampler="random",
        num_steps=5, seed=1, request_hashes=[1, 2], sample_indices=[0, 0], mask_id=V,
    ):  # fmt: skip
        if before is not None:
            assert state.is_fresh_BL.equal(before.is_masked_BL & ~state.is_masked_BL)
            assert state.is_fresh_BL.sum(1).tolist() == [2, 2]
        before = state
    assert before.is_done_B.all() and before.nfe_B.tolist() == [5, 5]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_steps": 0}, "num_steps"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"sampler": "ancestrel"}, "unknown sampler 'ancestrel'; choose one of: ancestral"),
        ({"x_BL": torch.zeros(3, L, dtype=torch.long)}, "one request hash"),
    ],
)
def test_senseless_settings_are_refused(change, message):
    settings = {"sampler": "random", "rows": ROWS} | change
    with pytest.raises(ValueError, match=message):
        sample(**settings)
