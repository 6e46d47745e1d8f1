"""meta.json is read strictly: every missing, unknown, wrongly typed or impossible value names the file and the key."""

import json

import pytest

from dlm_scale.data.meta import load_meta, read_meta, write_meta
from dlm_scale.errors import UsageError


def paths(value, at=()):
    """The path of every key in nested plain data."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield (*at, key)
            yield from paths(child, (*at, key))


def changed(raw, at, value=None, delete=False):
    raw = json.loads(json.dumps(raw))
    inner = raw
    for key in at[:-1]:
        inner = inner[key]
    if delete:
        del inner[at[-1]]
    else:
        inner[at[-1]] = value
    return raw


@pytest.fixture
def meta_path(dataset):
    return dataset / "meta.json"


def test_round_trip(meta_path):
    raw = meta_path.read_bytes()
    write_meta(read_meta(meta_path), meta_path)
    assert meta_path.read_bytes() == raw
    meta, name = load_meta(meta_path.parent / "val")
    assert name == "val" and (meta.vocab_size, meta.mask_id, meta.eos_id) == (257, 256, 0)


def test_every_key_is_needed_and_typed(meta_path):
    raw = json.loads(meta_path.read_text())
    keys = [at for at in paths(raw) if at[0] != "source" or len(at) == 1]
    assert len(keys) > 25
    for at in keys:
        if at in (("splits", "train"), ("splits", "val")):
            continue  # a split may be absent; asking for it is the next test
        meta_path.write_text(json.dumps(changed(raw, at, delete=True)))
        with pytest.raises(UsageError, match=f"{meta_path}.*{at[-1]!r} is missing"):
            read_meta(meta_path)
        for wrong in ("x" if not isinstance(_value(raw, at), str) else 1, True, [[]]):
            meta_path.write_text(json.dumps(changed(raw, at, wrong)))
            with pytest.raises(UsageError, match=f"{meta_path}.*{at[-1]}"):
                read_meta(meta_path)
    meta_path.write_text(json.dumps(raw | {"vocabsize": 1}))
    with pytest.raises(UsageError, match="unknown key 'vocabsize'"):
        read_meta(meta_path)


def _value(raw, at):
    for key in at:
        raw = raw[key]
    return raw


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (("vocab_size",), 1, "vocab_size"),
        (("mask_id",), 257, "mask_id 257 is outside"),
        (("mask_id",), -1, "mask_id"),
        (("suppressed_ids",), [300], "suppressed_ids"),
        (("eos_id",), 256, "eos_id"),
        (("eos_id",), 257, "eos_id"),
        (("tokenizer", "files"), ["../../x"], "plain file name"),
        (("format_version",), 2, "format_version 2"),
        (("splits", "train", "tokens"), 0, "tokens 0"),
        (("splits", "train", "documents"), 0, "documents 0"),
        (("splits", "train", "bytes"), -1, "bytes -1"),
        (("splits", "train", "max_id"), 257, "max_id 257"),
        (("splits", "train", "max_id"), 256, "max_id 256"),
        (("splits", "train", "bin_bytes"), 3, "bin_bytes 3"),
        (("splits", "train", "bin_xxh3"), [], "bin_xxh3"),
    ],
)
def test_impossible_values(meta_path, at, value, reason):
    meta_path.write_text(json.dumps(changed(json.loads(meta_path.read_text()), at, value)))
    with pytest.raises(UsageError, match=reason):
        read_meta(meta_path)


def test_not_a_meta_file(meta_path):
    with pytest.raises(UsageError, match="has no split 'test'; it has: train, val"):
        load_meta(meta_path.parent / "test")
    for text, reason in (("{", "not JSON"), ("[]", "expected dict"), ("\xff", "not JSON")):
        meta_path.write_text(text, encoding="latin-1")
        with pytest.raises(UsageError, match=reason):
            read_meta(meta_path)
    meta_path.unlink()
    with pytest.raises(UsageError, match="dlm prepare"):
        load_meta(meta_path.parent / "train")
