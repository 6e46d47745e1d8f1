"""Edits while sampling: how tokens move, the law under an exact denoiser, and what stays as it was."""

from dataclasses import replace

import pytest
import torch

from dlm_scale.sampling import SAMPLERS, Sampler, generate, stream
from dlm_scale.sampling.edits import moves

DELETE, GAP, V, L = 4, 5, 7, 12  # ids 0-3 are text, 6 is the mask
MASK = 6
EDIT_IDS = {"delete": DELETE, "gap": GAP}


def moved(tokens: str, is_deleted: str, is_gap: str, is_open: str = "") -> str:
    """The row after the moves, as text; `_` is a mask."""
    marks = (is_open or "o" * len(tokens), is_deleted, is_gap)
    is_open_BL, is_deleted_BL, is_gap_BL = (torch.tensor([[c != "." for c in mark]]) for mark in marks)
    to = moves(is_open_BL, torch.tensor([[c == "_" for c in tokens]]), is_deleted_BL, is_gap_BL)
    places = zip(to.source_BL[0].tolist(), to.is_new_BL[0].tolist())
    return "".join("_" if is_new else tokens[source] for source, is_new in places)


@pytest.mark.parametrize(
    "tokens, is_deleted, is_gap, is_open, expected",
    [("abcdef", "..x...", "......", "", "abdef_"), ("abcdef", "x...x.", "......", "", "bcdf__"),
     ("abc_ef", "....x.", "......", "", "abc_f_"), ("abcd__", "......", ".x....", "", "ab_cd_"),
     ("abcd__", "......", "xx.x..", "", "a_b_cd"),  # room for two
     ("abcdef", "......", ".x....", "", "abcdef"), ("abcdef", "....x.", ".x....", "", "ab_cdf"),
     ("abcdef", "..x...", ".x....", "", "ab_def"), ("ab_def", "......", "..x...", "", "ab_def"),
     ("PPcdPf__", "........", "..x..x..", "..oo.ooo", "PPcdPf__"),  # the first stretch has no room
     ("PPcdPf__", "..x.....", ".....x..", "..oo.ooo", "PPd_Pf__"), ("PPcdPf", "..x..x", "......", "..oo.o", "PPd_P_")],
)  # fmt: skip
def test_tokens_move_within_their_stretch(tokens, is_deleted, is_gap, is_open, expected):
    assert moved(tokens, is_deleted, is_gap, is_open) == expected


def predict(x_BL, rows_N, attention=None):
    """Any id but the mask, and often the two answers."""
    table = torch.randn(101, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table[:, MASK] = -torch.inf
    row_N, position_N = rows_N // x_BL.shape[1], rows_N % x_BL.shape[1]
    code_B = (x_BL * torch.arange(3, 3 + x_BL.shape[1])).sum(1)
    return torch.log_softmax(table[(code_B[row_N] * 7 + position_N * 13) % 101], -1)


def states(sampler, num_steps=20, rows=range(30), is_fixed_BL=None, **settings):
    x_BL = torch.full((len(rows), L), 1)
    is_fixed_BL = torch.zeros_like(x_BL, dtype=torch.bool) if is_fixed_BL is None else is_fixed_BL
    return list(stream(settings.pop("predict", predict), x_BL, is_fixed_BL, sampler=sampler, num_steps=num_steps, seed=2,
                       mask_id=MASK, request_hashes=[3] * len(rows), sample_indices=rows, edit_ids=EDIT_IDS,
                       **settings))  # fmt: skip


BUSY = {"random": replace(SAMPLERS["edit"], edit_rate=0.8), "gated": replace(SAMPLERS["edit_gated"], edit_below=0.3),
        "by confidence": Sampler(selector="sampled_confidence", edit_rate=0.5),
        "threshold": replace(SAMPLERS["threshold"], threshold=0.6, edit_rate=0.5)}  # fmt: skip


@pytest.mark.parametrize("name", BUSY)
@pytest.mark.parametrize("settings", [{}, {"block_size": 5}], ids=["whole", "blocks"])
def test_rows_end_full_of_text_and_the_prompt_stands(name, settings):
    is_fixed_BL = torch.zeros(30, L, dtype=torch.bool)
    is_fixed_BL[:, :3] = is_fixed_BL[:, 7] = True
    seen = states(BUSY[name], is_fixed_BL=is_fixed_BL, **settings)
    for before, after in zip(seen, seen[1:]):
        assert (after.x_BL[is_fixed_BL] == 1).all()
        assert not torch.isin(after.x_BL, torch.tensor([DELETE, GAP])).any()
        assert (after.is_masked_BL == (after.x_BL == MASK)).all()
        assert (after.nfe_B - before.nfe_B <= 1).all()
    assert not seen[-1].is_masked_BL.any() and (seen[-1].nfe_B <= 20).all()
    # tokens moved right and left, and were changed where they stood
    counts = torch.stack([state.is_masked_BL.sum(1) for state in seen])
    assert (counts[1:] > counts[:-1]).any() and seen[-1].is_revised_BL.any()


def test_a_sample_with_edits_does_not_depend_on_its_batch():
    for sampler in BUSY.values():
        whole = states(sampler)[-1]
        for row in (0, 7, 29):
            alone = states(sampler, rows=[row])[-1]
            assert alone.x_BL[0].equal(whole.x_BL[row]) and alone.nfe_B[0] == whole.nfe_B[row]


def test_edits_that_never_come_change_no_bit():
    for name in ("ancestral", "random", "entropy", "maskgit", "threshold"):
        nothing = states(replace(SAMPLERS[name], edit_below=1e-30), predict=without_answers)[-1]
        assert nothing.x_BL.equal(states(name, predict=without_answers)[-1].x_BL)
    busy = states("ancestral", allow_edits=True)[-1]
    assert busy.x_BL.equal(states("edit")[-1].x_BL) and not busy.x_BL.equal(states("ancestral")[-1].x_BL)


def without_answers(x_BL, rows_N, attention=None):
    log_probs_NV = predict(x_BL, rows_N)
    log_probs_NV[:, [DELETE, GAP]] = -torch.inf
    return log_probs_NV.log_softmax(-1)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="masks again what edits would draw anew"):
        states("remdm", allow_edits=True)
    with pytest.raises(ValueError, match="edit_rate and edit_below"):
        Sampler(edit_rate=1.5)


def test_edits_leave_the_law_of_an_exact_denoiser_in_the_limit(chain):
    """At a visible position the exact denoiser says what stands there given all others, so one edit at a time is a step
    of Gibbs's sampler and keeps the law; edits and reveals that fall into one pass do not know of each other."""

    def gibbs(x_BL, rows_N, attention=None):
        row_N, position_N = rows_N // chain.L, rows_N % chain.L
        blind_NL = x_BL[row_N].scatter(1, position_N[:, None], chain.mask_id)
        return chain.table[(blind_NL * (chain.V + 1) ** torch.arange(chain.L - 1, -1, -1)).sum(1), position_N]

    def made(num_steps, num_rows=40_000, predict=gibbs, **options):
        x_BL = torch.zeros(num_rows, chain.L, dtype=torch.long)
        sampler, nothing_BL = replace(SAMPLERS["edit"], **options), torch.zeros_like(x_BL, dtype=torch.bool)
        return generate(predict, x_BL, nothing_BL, sampler=sampler, num_steps=num_steps, seed=3, mask_id=chain.mask_id, request_hashes=[17] * num_rows,
                        sample_indices=range(num_rows))  # fmt: skip

    few, many = made(8, edit_rate=0.5), made(64, edit_rate=1 / 16)
    assert float(many.nfe_B.double().mean()) > 6  # two edits and more a row
    assert chain.distance(many.ids_BL) < 0.02 < 0.05 < chain.distance(few.ids_BL)
    gated = made(64, 4000, edit_rate=0.0, edit_below=0.1)
    assert chain.distance(gated.ids_BL) > 0.06  # it prefers likely tokens
