"""Packing: best-fit as one would do it by hand, every token once, rows that keep their documents apart."""

import multiprocessing
import shutil

import numpy as np
import pytest
import torch

from dlm_scale.data import loader, packing
from dlm_scale.data.indexed import IndexedDataset
from dlm_scale.data.loader import open_data
from dlm_scale.data.packing import best_fit, make_plan, open_plan
from dlm_scale.data.prepare import prepare
from dlm_scale.diffusion.corruption import corrupt
from dlm_scale.diffusion.schedule import SCHEDULES
from dlm_scale.diffusion.segments import Rows, check_bounds, segment_times
from dlm_scale.diffusion.timestep import stratified_times
from dlm_scale.diffusion.weighting import WEIGHTINGS
from dlm_scale.errors import UsageError
from dlm_scale.ops import Segments
from tests.model.test_model import made, randomised

L = 16


def rooms_by_hand(lengths, capacity):
    """What best-fit decreasing leaves free, one piece after the other."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        best = min(fitting, key=lambda i: rooms[i]) if fitting else len(rooms)
        rooms[best:best + 1] = [(rooms[best] if fitting else capacity) - length]
    return sorted(rooms)


def test_rows_are_those_of_best_fit_decreasing_by_hand():
    rng = np.random.default_rng(0)
    for _ in range(200):
        capacity = int(rng.integers(1, 30))
        lengths = rng.integers(1, capacity + 1, rng.integers(1, 60))
        rows = best_fit(lengths, capacity)
        used = np.bincount(rows, weights=lengths).astype(int)
        assert sorted((capacity - used).tolist()) == rooms_by_hand(lengths.tolist(), capacity)
    assert best_fit(np.empty(0, np.int64), 5).size == 0


def bounds_of(lengths):
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return lambda start, stop: ends[start : stop + 1]


@pytest.mark.parametrize("lengths", [[3], [16, 32], [16, 5, 40, 1, 1, 15, 16, 33, 9], list(range(1, 60))])
@pytest.mark.parametrize("group", [4, 1 << 20])
def test_a_plan_holds_every_token_once_in_pieces_of_documents(lengths, group, monkeypatch):
    monkeypatch.setattr(packing, "GROUP_DOCUMENTS", group)
    plan, bounds = make_plan(bounds_of(lengths), len(lengths), L), bounds_of(lengths)(0, len(lengths))
    start_S, length_S, count_B = plan.pieces(np.arange(plan.num_rows))
    tokens = np.concatenate([np.arange(a, a + n) for a, n in zip(start_S, length_S)])
    assert sorted(tokens.tolist()) == list(range(sum(lengths)))
    assert np.add.reduceat(length_S, np.cumsum(count_B) - count_B).max() <= L and count_B.min() >= 1
    document_S = np.searchsorted(bounds, start_S, side="right") - 1
    assert (start_S + length_S <= bounds[document_S + 1]).all()
    assert sum(n == L for n in length_S) == sum(n // L for n in lengths)  # cut from the front
    assert plan.used == pytest.approx(sum(lengths) / (plan.num_rows * L))
    rows = np.array([plan.num_rows - 1, 0, plan.num_rows - 1])  # any rows in any sequence
    parts = [plan.pieces(rows[i : i + 1]) for i in range(3)]
    for whole, *pieces in zip(plan.pieces(rows), *parts, strict=True):
        assert whole.tolist() == np.concatenate(pieces).tolist()


def rows_of(data, samples, length=L):
    rows = data.rows(np.asarray(samples))
    assert isinstance(rows, Rows) and rows.ids_BL.dtype == np.int64 and rows.maskable_BL.dtype == np.bool_
    check_bounds(rows.bounds_S1, len(samples), length)
    return rows


def test_an_epoch_is_every_document_once(dataset):
    data = open_data(str(dataset / "train"), L, 1, "best_fit")
    rows = rows_of(data, np.arange(data.num_rows))
    flat, maskable = rows.ids_BL.reshape(-1), rows.maskable_BL.reshape(-1)
    parts = [flat[a:b] for a, b in zip(rows.bounds_S1, rows.bounds_S1[1:]) if maskable[a:b].all()]
    source = IndexedDataset(dataset / "train")
    documents = [source.document(i) for i in range(source.num_documents)]
    pieces = [d[i : i + L] for d in documents for i in range(0, len(d), L)]
    assert sorted(p.tolist() for p in parts) == sorted(p.tolist() for p in pieces)
    assert maskable.sum() == len(source.tokens)
    for a, b in zip(rows.bounds_S1, rows.bounds_S1[1:]):  # padding is a segment of its own, of separators
        assert maskable[a:b].all() or (not maskable[a:b].any() and (flat[a:b] == 0).all())
    assert not np.array_equal(rows.ids_BL, rows_of(data, np.arange(data.num_rows) + data.num_rows).ids_BL)


def test_packed_rows_depend_on_the_sample_alone(dataset, tmp_path):
    (tmp_path / "o.txt").write_text("xyz " * 400)
    prepare(str(tmp_path / "o.txt"), "byte", tmp_path / "O")
    mixture = [{"path": str(dataset / "train"), "weight": 2}, {"path": str(tmp_path / "O/train"), "weight": 1}]
    for source in (mixture, str(dataset / "train")):
        whole = rows_of(open_data(source, L, 1, "best_fit"), np.arange(100, 124))
        again = open_data(source, L, 1, "best_fit")
        for size in (1, 8):
            parts = [rows_of(again, np.arange(i, i + size)) for i in range(100, 124, size)]
            assert np.array_equal(np.concatenate([p.ids_BL for p in parts]), whole.ids_BL)
            assert np.array_equal(np.concatenate([p.maskable_BL for p in parts]), whole.maskable_BL)
            bounds = [p.bounds_S1[:-1] + i * size * L for i, p in enumerate(parts)]
            assert np.concatenate(bounds).tolist() == whole.bounds_S1[:-1].tolist()
    assert (whole.ids_BL != rows_of(open_data(source, L, 2, "best_fit"), np.arange(100, 124)).ids_BL).any()


def test_without_a_separator_padding_is_an_id_that_text_may_hold(tmp_path):
    (tmp_path / "t.txt").write_text("abcab" * 33)
    prepare(str(tmp_path / "t.txt"), "char", tmp_path / "C")
    rows = rows_of(open_data(str(tmp_path / "C" / "train"), L, 1, "best_fit"), np.arange(30))
    assert not rows.maskable_BL.all() and set(rows.ids_BL[~rows.maskable_BL]) == {0}


def test_a_bad_id_of_a_packed_document_is_named(dataset, monkeypatch):
    monkeypatch.setattr(loader, "_scanned_at_open", lambda num_tokens: [])
    data = np.memmap(dataset / "train.bin", dtype="<u2", mode="r+")
    data[53] = 256
    data.flush()
    opened = open_data(str(dataset / "train"), L, 1, "best_fit")
    with pytest.raises(UsageError, match="train.bin: token 53 is id 256, the mask"):
        opened.rows(np.arange(opened.num_rows))


def test_the_fingerprint_knows_packing_and_its_version(dataset, monkeypatch):
    prints = [open_data(str(dataset / "train"), L, 1, kind).fingerprint for kind in ("none", "best_fit")]
    monkeypatch.setattr(loader, "packing_version", 2)
    prints.append(open_data(str(dataset / "train"), L, 1, "best_fit").fingerprint)
    assert len(set(prints)) == 3


def plan_of(dataset):
    data = IndexedDataset(dataset / "train")
    return open_plan(data.prefix, data.bounds, data.num_documents, "index hash", L)


def same(plan, other):
    rows = np.arange(plan.num_rows)
    return all(np.array_equal(a, b) for a, b in zip(plan.pieces(rows), other.pieces(rows), strict=True))


DAMAGE = {
    "cut short": lambda raw: raw[:-4],
    "empty": lambda raw: b"",
    "another element": lambda raw: raw[:-4] + bytes([raw[-4] ^ 1]) + raw[-3:],
    "other sizes": lambda raw: raw[:40] + bytes([raw[40] ^ 1]) + raw[41:],
    "another key": lambda raw: raw[:8] + bytes([raw[8] ^ 1]) + raw[9:],
    "another format": lambda raw: bytes([raw[0] ^ 1]) + raw[1:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_plan_is_made_once_and_again_where_its_file_is_not_whole(damage, dataset, monkeypatch, capsys):
    first = plan_of(dataset)
    (path,) = (dataset / ".packing").glob("*.plan")
    raw = path.read_bytes()
    assert "positions used" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(packing, "make_plan", None)  # not called
        assert same(plan_of(dataset), first)
    path.write_bytes(damage(raw))
    assert same(plan_of(dataset), first) and path.read_bytes() == raw
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(["lock", path.name])


@pytest.mark.parametrize("obstacle", ["read-only", "full disk"])
def test_where_no_file_can_be_written_the_plan_stays_in_memory(obstacle, dataset, monkeypatch, capsys):
    expected = plan_of(dataset)
    (path,) = (dataset / ".packing").glob("*.plan")
    shutil.rmtree(dataset / ".packing")
    if obstacle == "read-only":
        (dataset / ".packing").write_text("")  # no folder can be made there
    else:
        path.parent.mkdir()
        path.with_name(f"{path.name}.{packing.os.getpid()}.part").symlink_to("/dev/full")
    capsys.readouterr()
    assert same(plan_of(dataset), expected) and "in memory only" in capsys.readouterr().err
    assert not path.exists() and not list(dataset.glob(".packing/*.part"))


def test_several_processes_make_one_plan(dataset):
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(4), context.Queue()

    def work():
        barrier.wait()
        made_here, make = [], packing.make_plan
        packing.make_plan = lambda *a: made_here.append(1) or make(*a)
        plan = plan_of(dataset)
        found.put((plan.num_rows, len(made_here)))

    children = [context.Process(target=work) for _ in range(4)]
    for child in children:
        child.start()
    results = [found.get(timeout=30) for _ in children]
    for child in children:
        child.join()
    assert sum(made_here for _, made_here in results) == 1 and len({rows for rows, _ in results}) == 1


@pytest.mark.parametrize("unit", ["lines", "articles"])
def test_wikitext_fills_the_rows(unit, shared_data, tmp_path):
    """At least 97 % of the positions of rows of 1024, documents being lines or whole articles."""
    for name in ("wikitext2_valid.txt", "wikitext2_test.txt"):
        text = shared_data(name).read_text()
        starts = [line for line in text.splitlines(keepends=True) if line.strip()]
        if unit == "articles":
            titles = [i for i, line in enumerate(starts) if line.startswith(" = ") and not line.startswith(" = =")]
            starts = ["".join(starts[a:b]) for a, b in zip(titles, [*titles[1:], None])]
        for i, document in enumerate(starts):
            (tmp_path / f"{name}_{i:05d}.txt").write_text(document)
    prepare(str(tmp_path), str(shared_data("gpt2.tiktoken")), tmp_path / "D")
    data = open_data(str(tmp_path / "D" / "train"), 1024, 1, "best_fit")
    maskable_BL = data.rows(np.arange(data.num_rows)).maskable_BL
    assert maskable_BL.mean() >= 0.97
    assert maskable_BL.sum() == len(IndexedDataset(tmp_path / "D" / "train").tokens)


def test_no_document_reaches_another_through_the_model(dataset):
    """Outputs and gradients of one document's loss, to the bit, whatever stands in the rest of its rows."""
    length = 64
    data = open_data(str(dataset / "train"), length, 1, "best_fit")
    rows = rows_of(data, np.arange(6), length)
    t_S = segment_times(1, np.arange(6), stratified_times(1, 0, 6), rows.bounds_S1, length)
    noised = corrupt(rows.ids_BL, np.arange(6), t_S, seed=1, schedule=SCHEDULES["linear"],
                     weighting=WEIGHTINGS["count"], mask_id=256, denominator=1.0, maskable_BL=rows.maskable_BL,
                     attention=Segments(torch.from_numpy(rows.bounds_S1)))  # fmt: skip
    model = randomised(made(data.vocabulary, seq_len=length, time_conditioning="adaln"))
    is_short_S = torch.from_numpy(np.diff(rows.bounds_S1) < length // 2)
    chosen = int((noised.segment_N.bincount(minlength=len(is_short_S)) * is_short_S).argmax())
    mine_N, (start, stop) = noised.segment_N == chosen, rows.bounds_S1[chosen : chosen + 2]
    assert mine_N.sum() > 1 and 1 < stop - start < length // 2  # it shares its row

    def outcome(change):
        xt_BL = noised.xt_BL.clone()
        other = torch.ones(xt_BL.numel(), dtype=bool)
        other[start:stop] = False
        xt_BL.view(-1)[other] = (xt_BL.view(-1)[other] + change) % 256
        model.zero_grad()
        ask = lambda head: (head.hidden_ND, head.cross_entropy(noised.target_N, mine_N.float())[0])  # noqa: E731
        hidden_ND, loss = model(xt_BL, m_B=noised.m_B, rows_N=noised.rows_N, readout=ask, attention=noised.attention)
        loss.backward()
        return hidden_ND[mine_N].detach(), hidden_ND[~mine_N].detach(), [p.grad.clone() for p in model.parameters()]

    (hidden, others, grads), (hidden_after, others_after, grads_after) = outcome(0), outcome(77)
    assert torch.equal(hidden, hidden_after) and not torch.equal(others, others_after)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_after, strict=True))
    assert any(g.abs().sum() > 0 for g in grads)
