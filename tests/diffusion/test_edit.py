"""The edit stage: the law of each edit, its places and targets, the closed-form optimum, and what stays as it was."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from dlm_scale.diffusion.corruption import KIND_MASKED, corrupt
from dlm_scale.diffusion.edit import (
    KIND_GAP,
    KIND_INSERTED,
    KIND_SUBSTITUTED,
    KIND_VISIBLE,
    Edits,
    corruption_prob,
    edit,
    visible_stats,
)
from dlm_scale.diffusion.schedule import SCHEDULES
from dlm_scale.diffusion.weighting import WEIGHTINGS
from dlm_scale.ops import Segments

MASK, DELETE, GAP, EOS, TEXT = 4, 12, 13, 0, np.array([1, 2, 3, 5, 6, 7, 8, 9])  # 10, 11 are other special ids
FIELDS = ("xt_BL", "is_masked_BL", "target_N", "weight_N", "elbo_weight_N", "kind_N", "num_maskable_B")


def noised(x0_BL, t_B, first=0, maskable_BL=None, attention=None, weighting="count"):
    return corrupt(x0_BL, np.arange(first, first + len(x0_BL)), t_B, seed=7, schedule=SCHEDULES["linear"], mask_id=MASK,
                   weighting=WEIGHTINGS[weighting], denominator=float(x0_BL.size), maskable_BL=maskable_BL,
                   attention=attention)  # fmt: skip


def made(x0_BL, t_B, edits, first=0, maskable_BL=None, attention=None):
    """(stage 1, with edits)."""
    before = noised(x0_BL, t_B, first, maskable_BL, attention)
    index_B = np.arange(first, first + len(x0_BL))
    return before, edit(before, x0_BL, index_B, edits, seed=7, mask_id=MASK, maskable_BL=maskable_BL)


def clean(num_rows, length, ids=TEXT, seed=0):
    return np.random.default_rng(seed).choice(ids, (num_rows, length))


def times(num_rows, seed=1):
    return 1 - np.random.default_rng(seed).random(num_rows)


def whole(corrupted, values_N, fill=-1):
    """Values of the rows with loss at their positions [B, L]."""
    out_BL = np.full(corrupted.xt_BL.shape, fill)
    out_BL.reshape(-1)[corrupted.rows_N.numpy()] = values_N.numpy()
    return out_BL


def replayed(x0_BL, maskable_BL, bounds_S1, before, after, edits):
    """The edited batch once more, token by token in plain Python, from the counter table alone."""
    from dlm_scale.diffusion.rng import Stream, philox

    num_rows, length = x0_BL.shape
    xt, masked, rows = x0_BL.copy(), np.zeros(x0_BL.shape, bool), {}
    is_masked, starts = before.is_masked_BL.numpy(), {int(b) for b in bounds_S1}
    threshold = math.ceil(edits.prob * 2**24)
    for b in range(num_rows):
        words = [[[int(w) for w in philox(7, b, 0, j, stream)] for j in range(length)]
                 for stream in (Stream.REPLACEMENT, Stream.EDIT)]  # fmt: skip
        hit = [[[w >> 8 < threshold for w in word] for word in table] for table in words]
        j = 0
        while j < length:
            if not maskable_BL[b, j]:
                j += 1
                continue
            end = j + 1
            while end < length and maskable_BL[b, end] and b * length + end not in starts:
                end += 1
            out, wanted_before = [], False
            for i in range(j, end):
                own = int(x0_BL[b, i])
                substituted = not is_masked[b, i] and hit[0][i][0]
                inserted = edits.delete_id is not None and hit[1][i][0]
                says = out and out[-1][2] == KIND_VISIBLE and not inserted
                wanted = bool(edits.gap_id is not None and says and not is_masked[b, i] and hit[1][i][1])
                if wanted and not wanted_before:
                    out[-1] = (out[-1][0], edits.gap_id, KIND_GAP)
                    wanted_before = True
                    continue
                if inserted:
                    out.append((int(TEXT[words[0][i][2] * len(TEXT) >> 32]), edits.delete_id, KIND_INSERTED))
                others = [int(v) for v in TEXT if v != own]
                wrong = others[words[0][i][1] * len(others) >> 32]
                out.append((MASK, own, KIND_MASKED) if is_masked[b, i] else
                           (wrong, own, KIND_SUBSTITUTED) if substituted else (own, own, KIND_VISIBLE))  # fmt: skip
                wanted_before = False
            for i in range(j, end):
                token = out[i - j] if i - j < len(out) else None
                xt[b, i], masked[b, i] = (MASK, True) if token is None else (token[0], token[2] == KIND_MASKED)
                if token is not None:
                    rows[b * length + i] = token[1:]
            j = end
    found = [list(map(int, pair)) for pair in zip(after.target_N, after.kind_N)]
    assert after.xt_BL.tolist() == xt.tolist() and after.is_masked_BL.tolist() == masked.tolist()
    assert after.rows_N.tolist() == sorted(rows) and found == [list(rows[row]) for row in sorted(rows)]


@pytest.mark.parametrize("ids", [{}, {"delete_id": DELETE}, {"gap_id": GAP}, {"delete_id": DELETE, "gap_id": GAP}])
def test_it_is_what_the_counter_table_says_token_by_token(ids):
    x0_BL, bounds = clean(24, 20, [*TEXT, EOS]), [0, 7, 20, 26, 28, *range(40, 481, 20)]
    maskable_BL = np.random.default_rng(2).random(x0_BL.shape) < 0.8
    attention = Segments(torch.tensor(bounds, dtype=torch.int32))
    t_S = times(len(bounds) - 1) * 0.6
    before, after = made(x0_BL, t_S, Edits(0.3, TEXT, **ids), 0, maskable_BL, attention)
    replayed(x0_BL, maskable_BL, bounds, before, after, Edits(0.3, TEXT, **ids))
    assert (after.xt_BL.numpy() == x0_BL)[~maskable_BL].all()
    assert not np.isin(after.rows_N, np.flatnonzero(~maskable_BL)).any()
    is_masked_N, weight_S = after.kind_N == KIND_MASKED, torch.zeros(len(bounds) - 1)
    weight_S[before.segment_N] = before.weight_N  # one a segment
    assert torch.equal(after.weight_N, torch.where(is_masked_N, weight_S[after.segment_N], 1.0))
    assert torch.equal(after.elbo_weight_N, torch.where(is_masked_N, weight_S[after.segment_N], 0.0))
    kinds = {0, 1, 3} | ({2} if "delete_id" in ids else set()) | ({4} if "gap_id" in ids else set())
    assert set(after.kind_N.tolist()) == kinds


def test_anneal_rises_in_the_first_half_of_the_stage():
    for start in (0.0, 0.5, 0.8):
        values = [corruption_prob(x, start, 0.1, True) for x in (0.0, start, (1 + start) / 2, 1.0)]
        assert values == pytest.approx([0.0, 0.0, 0.1, 0.1])
        assert corruption_prob((3 * start + 1) / 4, start, 0.1, True) == pytest.approx(0.05)
        assert corruption_prob(start, start, 0.1, False) == 0.1
    assert corruption_prob(0.0, 0.8, 0.1, True) == corruption_prob(0.79, 0.8, 0.1, False) == 0.0


def test_without_a_probability_nothing_but_visible_loss_is_added():
    x0_BL, t_B = clean(9, 30), times(9)
    before, after = made(x0_BL, t_B, Edits(0.0, TEXT, DELETE, GAP, visible_loss="corrupted"))
    for field in dataclasses.fields(before):
        a, b = getattr(before, field.name), getattr(after, field.name)
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, field.name
    after = made(x0_BL, t_B, Edits(0.0, TEXT, DELETE, GAP))[1]
    assert torch.equal(after.xt_BL, before.xt_BL) and after.rows_N.tolist() == list(range(270))
    masked = before.is_masked_BL.numpy()
    assert np.array_equal(whole(after, after.kind_N), np.where(masked, KIND_MASKED, KIND_VISIBLE))
    weight_BL, elbo_weight_BL = (whole(after, values, 0.0) for values in (after.weight_N, after.elbo_weight_N))
    assert (weight_BL[~masked] == 1).all() and (elbo_weight_BL[~masked] == 0).all()
    assert np.array_equal(weight_BL[masked], before.weight_N.numpy().astype(float))


def test_substitutions_have_their_rate_and_are_uniform_over_the_other_ids(chi_square_p):
    x0_BL = clean(400, 256, [*TEXT, EOS])
    before, after = made(x0_BL, np.full(400, 0.25), Edits(0.1, TEXT))
    visible, kind_BL = ~before.is_masked_BL.numpy(), whole(after, after.kind_N)
    wrong = kind_BL == KIND_SUBSTITUTED
    n, k = visible.sum(), wrong.sum()
    assert abs(k - 0.1 * n) < 4 * math.sqrt(n * 0.09) and not (wrong & ~visible).any()
    drawn, own = after.xt_BL.numpy()[wrong], x0_BL[wrong]
    assert np.isin(drawn, TEXT).all() and (drawn != own).all()
    pairs = np.array([[((own == a) & (drawn == b)).sum() for b in TEXT] for a in TEXT])
    off_diagonal = pairs[~np.eye(len(TEXT), dtype=bool)]
    expected = np.repeat(pairs.sum(1), len(TEXT) - 1) / (len(TEXT) - 1)
    assert chi_square_p(off_diagonal, expected) > 1e-3
    assert (own == EOS).sum() > 400  # a separator may be wrong, and is never drawn
    assert (after.xt_BL.numpy() == np.where(wrong, after.xt_BL.numpy(), before.xt_BL.numpy())).all()


def test_insertions_and_deletions_have_their_rates():
    x0_BL, p = clean(300, 200), 0.05
    _, inserted = made(x0_BL, np.full(300, 0.5), Edits(p, TEXT, delete_id=DELETE))
    count_B = (whole(inserted, inserted.kind_N) == KIND_INSERTED).sum(1)
    # n ~ Binomial(L, p), less those pushed off the end: about p n of them
    expected = 200 * p * (1 - p)
    assert abs(count_B.mean() - expected) < 4 * math.sqrt(200 * p * (1 - p) / 300) + 0.1
    assert count_B.var() == pytest.approx(200 * p * (1 - p), rel=0.25)
    targets = whole(inserted, inserted.target_N)
    assert ((targets == DELETE) == (whole(inserted, inserted.kind_N) == KIND_INSERTED)).all()
    assert np.isin(inserted.xt_BL.numpy()[targets == DELETE], TEXT).all()
    m = 0.2
    before, deleted = made(x0_BL, np.full(300, m), Edits(p, TEXT, gap_id=GAP))
    num_gaps = (whole(deleted, deleted.target_N) == GAP).sum()
    freed = (deleted.xt_BL.numpy() == MASK).sum() - (whole(deleted, deleted.kind_N) == KIND_MASKED).sum()
    # a pair of visible tokens, the left one right and not wanted itself (which takes a visible one before it)
    wanted = 299 * 200 * (1 - m) ** 2 * (1 - p) * p
    assert num_gaps == freed and num_gaps == pytest.approx(wanted * (1 - (1 - m) * (1 - p) * p), rel=0.1)


def test_rows_are_edited_alike_in_any_split():
    x0_BL, t_B, edits = clean(12, 40), times(12), Edits(0.2, TEXT, DELETE, GAP, visible_subsample=0.5)
    at_once = made(x0_BL, t_B, edits, 50)[1]
    for bounds in ([0, 1, 12], [0, 5, 6, 12]):
        parts = [made(x0_BL[a:b], t_B[a:b], edits, 50 + a)[1] for a, b in zip(bounds, bounds[1:])]
        for name in FIELDS:
            assert torch.equal(getattr(at_once, name), torch.cat([getattr(part, name) for part in parts])), name
    assert not torch.equal(at_once.xt_BL, made(x0_BL, t_B, edits, 51)[1].xt_BL)


def test_a_prompt_is_neither_edited_nor_lost_and_nothing_crosses_an_answer():
    """Rows of prompt, answer, prompt, answer, padding: each answer alone is a stretch."""
    x0_BL = clean(200, 24)
    maskable_BL = np.zeros(x0_BL.shape, bool)
    maskable_BL[:, 4:10] = maskable_BL[:, 13:20] = True
    edits = Edits(0.4, TEXT, DELETE, GAP)
    before, after = made(x0_BL, times(200), edits, 0, maskable_BL)
    assert (after.xt_BL.numpy()[~maskable_BL] == x0_BL[~maskable_BL]).all()
    assert maskable_BL.reshape(-1)[after.rows_N.numpy()].all()
    assert after.num_maskable_B.tolist() == before.num_maskable_B.tolist() and after.denominator == before.denominator
    alone_BL = np.where(np.arange(24) < 11, x0_BL, TEXT[0])
    other = made(alone_BL, times(200), edits, 0, maskable_BL)[1]
    assert torch.equal(after.xt_BL[:, :11], other.xt_BL[:, :11])


def test_the_subsample_of_visible_tokens_is_unbiased():
    x0_BL, t_B = clean(200, 100), np.full(200, 0.3)
    full, part = (made(x0_BL, t_B, Edits(0.1, TEXT, DELETE, GAP, visible_subsample=r))[1] for r in (1.0, 0.25))
    assert torch.equal(full.xt_BL, part.xt_BL)
    kept, kind = whole(part, part.kind_N), whole(full, full.kind_N)
    assert (kept == kind)[kept >= 0].all() and ((kept >= 0) | (kind != KIND_MASKED)).all()
    for name in (KIND_SUBSTITUTED, KIND_INSERTED, KIND_VISIBLE, KIND_GAP):
        n = (kind == name).sum()
        assert abs((kept == name).sum() - n / 4) < 4 * math.sqrt(n * 3 / 16)
    assert (part.weight_N[part.kind_N != KIND_MASKED] == 4).all()
    corrupted = made(x0_BL, t_B, Edits(0.1, TEXT, DELETE, GAP, visible_loss="corrupted"))[1]
    assert np.array_equal(whole(corrupted, corrupted.kind_N), np.where(kind == KIND_VISIBLE, -1, kind))


def test_the_optimum_of_the_substitution_channel_is_its_posterior():
    """An iid source: p(x0=a | x~=b) is prop. to p(a) [(1-p) 1(a=b) + p/(V-1) 1(a!=b)]; the best table of visible
    answers, fitted by minimising the loss of drawn batches, has its cross-entropy H(x0|x~) and its entries."""
    p, law_V = 0.3, np.array([0.4, 0.25, 0.15, 0.08, 0.05, 0.04, 0.02, 0.01])
    V = len(law_V)
    joint_VV = law_V[:, None] * np.where(np.eye(V, dtype=bool), 1 - p, p / (V - 1))  # [x0, x~]
    posterior_VV = joint_VV / joint_VV.sum(0)
    optimum = -(joint_VV * np.log(posterior_VV)).sum()
    x0_BL = np.random.default_rng(5).choice(TEXT, (1500, 128), p=law_V)
    _, c = made(x0_BL, np.full(1500, 0.5), Edits(p, TEXT))
    visible = c.kind_N != KIND_MASKED
    given, target = (torch.from_numpy(np.searchsorted(TEXT, ids.numpy()))
                     for ids in (c.xt_BL.flatten()[c.rows_N][visible], c.target_N[visible]))  # fmt: skip
    counts_VV = torch.bincount(given * V + target, minlength=V * V).view(V, V).double()  # [x~, x0]
    table_VV = torch.zeros(V, V, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([table_VV], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -(counts_VV * table_VV.log_softmax(1)).sum() / counts_VV.sum()
        value.backward()
        return value

    optimizer.step(loss)
    n = counts_VV.sum().item()
    sd = math.sqrt((joint_VV * (np.log(posterior_VV) + optimum) ** 2).sum() / n)
    assert abs(loss().item() - optimum) < 4 * sd + V * V / n
    assert optimum < -(law_V * np.log(law_V)).sum() - 0.3  # well below the source's own entropy
    weight_V = counts_VV.sum(1, keepdim=True)
    error = (table_VV.detach().softmax(1).T.numpy() - posterior_VV) * weight_V.T.sqrt().numpy()
    assert abs(error).max() < 4 * 0.5


def test_the_means_of_visible_tokens_count_nothing_else():
    _, c = made(clean(6, 40), np.full(6, 0.4), Edits(0.2, TEXT, DELETE, GAP))
    ce_N = torch.arange(len(c.rows_N), dtype=torch.float32)
    is_correct_N = c.kind_N == KIND_INSERTED
    stats = visible_stats(c, ce_N, is_correct_N)
    visible = c.kind_N != KIND_MASKED
    assert stats["visible_ce"].tolist() == [ce_N[visible].sum().item(), visible.sum().item()]
    inserted = is_correct_N.sum().item()
    assert stats["visible_accuracy"].tolist() == [inserted, visible.sum().item()]
    assert stats["corrupted_accuracy"].tolist() == [inserted, (visible & (c.kind_N != KIND_VISIBLE)).sum().item()]


@pytest.mark.parametrize("bad", [{"prob": 1.1}, {"replacement_ids": np.array([1, MASK, 5])}, {"visible_subsample": 0.0},
                                 {"replacement_ids": np.array([1])}, {"visible_loss": "some"}, {"delete_id": 5}])
def test_edits_that_cannot_be_are_refused(bad):
    edits = dataclasses.replace(Edits(0.1, TEXT, DELETE, GAP), **bad)
    with pytest.raises(ValueError):
        made(clean(2, 8), times(2), edits)
