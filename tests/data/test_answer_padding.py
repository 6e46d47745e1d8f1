"""End tokens after answers: how many, where, for which samples; and what they leave alone."""

import json

import numpy as np
import pytest

from dlm_scale.data.answer_padding import continued
from dlm_scale.data.loader import ValidationData, open_data
from dlm_scale.data.meta import read_meta
from dlm_scale.data.prepare import prepare
from dlm_scale.data.tokenizer import load_tokenizer
from dlm_scale.diffusion.segments import Rows, check_bounds
from dlm_scale.errors import UsageError

from .conftest import write_jsonl

SEQ_LEN, END, PAD = 96, 7, 0


def row_of(past: int, answer: int, end: int = END, length: int = 16):
    """Ids 1, past and answer; the answer ends with `end`; the rest is padding."""
    ids = np.full(length, PAD)
    ids[: past + answer] = 1
    ids[past + answer - 1] = end
    return ids, (np.arange(length) >= past) & (np.arange(length) < past + answer), past + answer


def rows_of(*shapes, length: int = 16) -> Rows:
    made = [row_of(*shape, length=length) for shape in shapes]
    bounds = {0} | {at for i, (_, _, used) in enumerate(made) for at in (i * length + used, (i + 1) * length)}
    ids_BL, maskable_BL = (np.array(part) for part in list(zip(*made))[:2])
    return Rows(ids_BL.astype(np.int64), maskable_BL, np.array(sorted(bounds), dtype=np.int32))


def test_a_random_number_is_uniform_over_what_the_row_has_left():
    rows = rows_of(*[(4, 7)] * 6000)  # 5 positions left
    made = continued(rows, "random", 3, np.arange(10**10, 10**10 + 6000), {END})
    counts = np.bincount(made.maskable_BL.sum(1) - 7, minlength=6)
    assert counts.size == 6 and np.abs(counts - 1000).max() < 120  # four standard deviations


def test_what_follows_is_the_end_token_masked_like_the_answer_and_of_its_segment():
    rows = rows_of((4, 5), (0, 1), (15, 1), (3, 13), (2, 3, 5))  # the last two: no room; cut short, so no end
    for policy in ("random", "full"):
        made = continued(rows, policy, 1, np.arange(5), {END, 8})
        check_bounds(made.bounds_S1, 5, 16)
        for b, (used, past) in enumerate([(9, 4), (1, 0), (16, 15), (16, 3), (5, 2)]):
            own = made.bounds_S1[(made.bounds_S1 > 16 * b) & (made.bounds_S1 <= 16 * b + 16)] - 16 * b
            stop = own[0]
            assert list(own) == ([16] if stop == 16 else [stop, 16]) and stop >= used
            assert (made.ids_BL[b, used:stop] == END).all() and (made.ids_BL[b, stop:] == PAD).all()
            assert (made.ids_BL[b, :used] == rows.ids_BL[b, :used]).all()
            assert (np.flatnonzero(made.maskable_BL[b]) == np.arange(past, stop)).all()
            assert stop == 5 if b == 4 else policy == "random" or stop == 16
    assert rows.ids_BL[0, 9:].sum() == 0  # what was given is left alone


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """Two datasets with answers of 1 to 40 bytes."""
    root = tmp_path_factory.mktemp("chat")
    for name in "ab":
        asked = [[{"role": "user", "content": f"{name}{i}"}, {"role": "assistant", "content": name * (i % 40 + 1)}]
                 for i in range(120)]  # fmt: skip
        path = write_jsonl(root / f"{name}.jsonl", asked, "messages")
        prepare(str(path), "byte", root / name, text_key="messages", chat="chatml", workers=1)
    return root


def test_rows_of_a_dataset_are_those_without_and_end_tokens(chat):
    meta = read_meta(chat / "a" / "meta.json")
    end_id = load_tokenizer(chat / "a", meta).special_ids["<|im_end|>"]
    assert meta.end_id == end_id
    plain, made = (open_data(str(chat / "a" / "train"), SEQ_LEN, 1, answer_padding=p) for p in ("none", "random"))
    before, after = (data.rows(np.arange(100)) for data in (plain, made))
    added_BL = after.maskable_BL & ~before.maskable_BL
    assert added_BL.any() and (after.ids_BL[added_BL] == end_id).all()
    assert (after.ids_BL[~added_BL] == before.ids_BL[~added_BL]).all() and (before.maskable_BL <= after.maskable_BL).all()
    assert plain.fingerprint != made.fingerprint and plain.num_rows == made.num_rows
    again = made.rows(np.arange(100) + made.num_rows)  # the next epoch has other lengths
    order = [np.argsort([bytes(row[:40]) for row in rows.ids_BL.astype(np.uint8)]) for rows in (after, again)]
    assert (after.maskable_BL.sum(1)[order[0]] != again.maskable_BL.sum(1)[order[1]][:100]).any()


@pytest.mark.parametrize("policy", ["random", "full"])
def test_no_split_of_the_batch_changes_a_row(chat, policy):
    source = [{"path": chat / "a" / "train", "weight": 2.0}, {"path": chat / "b" / "train", "weight": 1.0}]
    data = open_data(source, SEQ_LEN, 5, answer_padding=policy)
    sample_B = np.arange(50, 82)
    whole = data.rows(sample_B)
    for part in (slice(0, 5), slice(5, 6), slice(6, 32, 3)):
        rows = open_data(source, SEQ_LEN, 5, answer_padding=policy).rows(sample_B[part])
        assert np.array_equal(rows.ids_BL, whole.ids_BL[part])
        assert np.array_equal(rows.maskable_BL, whole.maskable_BL[part])
    other = open_data(source, SEQ_LEN, 6, answer_padding=policy).rows(sample_B)
    assert not np.array_equal(other.maskable_BL, whole.maskable_BL)


def test_text_validation_and_none_are_left_alone(chat, tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [f"text {i}" for i in range(90)])
    prepare(str(path), "byte", tmp_path / "T", workers=1)
    plain, given = (open_data(str(tmp_path / "T" / "train"), 16, 1, answer_padding=p) for p in ("none", "random"))
    assert plain.fingerprint == given.fingerprint and np.array_equal(plain.rows(np.arange(9)), given.rows(np.arange(9)))
    rows = ValidationData(chat / "a" / "val", SEQ_LEN).rows(np.arange(3))
    for ids, maskable in zip(rows.ids_BL, rows.maskable_BL, strict=True):
        assert (ids[maskable] == read_meta(chat / "a" / "meta.json").end_id).sum() == 1


def test_what_cannot_be_had_is_refused(chat, tmp_path):
    with pytest.raises(UsageError, match=r"data.packing=best_fit .* data.answer_padding=random .* set data.packing=none"):
        open_data(str(chat / "a" / "train"), SEQ_LEN, 1, "best_fit", answer_padding="random")
    for name in ("train.bin", "train.idx", "train.prompts", "special_tokens.json"):
        (tmp_path / name).write_bytes((chat / "a" / name).read_bytes())
    meta = json.loads((chat / "a" / "meta.json").read_text())
    for wrong in (None, "x", meta["mask_id"], -1):
        meta["source"]["end_id"] = wrong
        (tmp_path / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(UsageError, match="end_id .* Prepare the conversations again"):
            open_data(str(tmp_path / "train"), SEQ_LEN, 1, answer_padding="random")
