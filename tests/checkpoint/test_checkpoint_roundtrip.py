"""What is written at one layout is read at any other, against plain indexing of the whole tensors."""
import itertools
import json
import os
import random
import struct

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open

from dlm_scale.checkpoint import layout
from dlm_scale.checkpoint.layout import LogicalTensor, Piece
from dlm_scale.checkpoint.reader import open_checkpoint, weights_hash
from dlm_scale.checkpoint.writer import CheckpointError
from dlm_scale.errors import UsageError


def test_rectangles_cover_a_flat_range_in_order():
    for box in [(), ((3, 7),), ((1, 3), (2, 5)), ((0, 2), (1, 3), (4, 7)), ((5, 6), (0, 3), (2, 3), (0, 2))]:
        shape = [stop for _, stop in box]
        inside = np.arange(int(np.prod(shape, dtype=int))).reshape(shape)[tuple(slice(*ends) for ends in box)].ravel()
        everything = np.arange(int(np.prod(shape, dtype=int))).reshape(shape)
        for start, stop in itertools.combinations(range(layout.volume(box) + 1), 2):
            parts = list(layout.rectangles(box, start, stop))
            found = [everything[tuple(slice(*ends) for ends in part)].ravel() for part in parts]
            assert np.array_equal(np.concatenate(found), inside[start:stop])
            assert len(parts) <= max(1, 2 * len(box) - 1)
        assert list(layout.rectangles(box, 0, 0)) == []


@pytest.mark.parametrize("seed", range(25))
def test_any_layout_reads_back_at_any_other(tmp_path, sim, seed):
    rng, tensors = random.Random(seed), sim.random_tensors(seed)
    world = (rng.randint(1, 3), rng.randint(1, 3))
    paths, errors = sim.save(tmp_path, 7, sim.random_layout(tensors, *world, seed))
    assert errors == [None] * (world[0] * world[1]) and set(paths) == {tmp_path / "checkpoints" / "step_00000007"}
    checkpoint = open_checkpoint(paths[0])
    assert checkpoint.tensors == {key: LogicalTensor(*key, tuple(values.shape), values.dtype)
                                  for key, (values, _) in tensors.items()}
    for key, (values, view) in tensors.items():
        whole = checkpoint.read(*key)
        assert whole.dtype == values.dtype and whole.shape == values.shape and torch.equal(whole, values)
        for _ in range(4):
            box = sim.random_box(rng, view)
            assert torch.equal(checkpoint.read(*key, box=box).reshape(-1), sim.cut(values, view, box))
    for piece in itertools.chain(*sim.random_layout(tensors, 2, 3, seed + 1000)):
        got = checkpoint.read_flat(piece.name, piece.slot, piece.box, piece.flat_start, piece.tensor.numel())
        assert torch.equal(got, piece.tensor)


def test_every_element_is_stored_once_and_the_safetensors_library_reads_it(tmp_path, sim):
    tensors = sim.random_tensors(3)
    pieces = sim.random_layout(tensors, 2, 2, 3)
    folder = sim.save(tmp_path, 1, pieces)[0][0]
    offered = {f"{p.slot}/{p.name}/{','.join(f'{a}:{b}' for a, b in p.box)}/{p.flat_start}": p.tensor
               for rank in pieces for p in rank if p.tensor.numel()}
    read = {}
    for file in folder.glob("rank_*.safetensors"):
        data = file.read_bytes()
        assert struct.unpack("<Q", data[:8])[0] % 8 == 0
        with safe_open(file, "pt") as opened:
            for key in opened.keys():
                assert key not in read
                read[key] = opened.get_tensor(key)
    assert read.keys() == offered.keys()
    assert all(torch.equal(read[key], offered[key]) for key in read)
    assert sum(t.numel() for t in read.values()) == sum(values.numel() for values, _ in tensors.values())


def test_every_tensor_lies_aligned_in_its_file(tmp_path, sim):
    pieces = [Piece(name, "param", (3,), (3,), ((0, 3),), 0, torch.ones(3, dtype=dtype)) for name, dtype in
              (("a", torch.bool), ("b", torch.bfloat16), ("c", torch.float64), ("d", torch.float32))]
    data = (sim.save(tmp_path, 1, [pieces])[0][0] / "rank_00000.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    starts = {key.split("/")[1]: entry["data_offsets"][0] for key, entry in header.items() if key[0] != "_"}
    assert all((8 + size + starts[name]) % item_size == 0 for name, item_size in zip("abcd", (1, 2, 8, 4)))


def test_replicas_are_shared_out_over_the_ranks_by_bytes(tmp_path, sim):
    pieces = [Piece(f"w{i}", "param", (1000,), (1000,), ((0, 1000),), 0, torch.randn(1000)) for i in range(12)]
    folder = sim.save(tmp_path, 1, [pieces] * 4)[0][0]
    sizes = [file.stat().st_size for file in sorted(folder.glob("rank_*"))]
    assert len(sizes) == 4 and max(sizes) - min(sizes) < 100 and min(sizes) > 3 * 4000


def test_dtype_of_reading_and_a_view_other_than_the_files(tmp_path, sim):
    values = torch.randn(6, 5)
    piece = Piece("gate_up", "param", (6, 5), (2, 3, 5), ((0, 2), (0, 3), (0, 5)), 0, values.reshape(-1))
    checkpoint = open_checkpoint(sim.save(tmp_path, 1, [[piece]])[0][0])
    half = checkpoint.read("gate_up", box=((0, 2), (1, 3), (0, 5)), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half, values.view(2, 3, 5)[:, 1:].bfloat16())
    assert torch.equal(checkpoint.read("gate_up", box=((1, 5), (2, 4)), view=(6, 5)), values[1:5, 2:4])
    assert torch.equal(checkpoint.read_flat("gate_up", "param", ((1, 5), (2, 4)), 3, 4, view=(6, 5)),
                       values[1:5, 2:4].reshape(-1)[3:7])
    for arguments, words in ((("gate_up", "param", ((0, 2), (0, 4), (0, 5))), "box"), (("gate_u",), "did you mean"),
                             (("gate_up", "ema"), "param/gate_up")):
        with pytest.raises(UsageError, match=words):
            checkpoint.read(*arguments)
    with pytest.raises(UsageError, match="has shape"):
        checkpoint.read("gate_up", box=((0, 2), (0, 4)), view=(6, 4))
    with pytest.raises(UsageError, match="are not in"):
        checkpoint.read_flat("gate_up", "param", ((0, 1), (0, 3), (0, 5)), 1, 15)


def test_large_boxes_are_read_in_chunks(tmp_path, sim, monkeypatch):
    monkeypatch.setattr("dlm_scale.checkpoint.reader.CHUNK_BYTES", 64)
    sizes = []
    from dlm_scale.checkpoint import reader
    monkeypatch.setattr(reader, "read_at", lambda fd, offset, size, name, real=reader.read_at:
                        (sizes.append(size), real(fd, offset, size, name))[1])
    values = torch.randn(7, 11, 13)
    piece = Piece("w", "param", (7, 11, 13), (7, 11, 13), layout.full_box((7, 11, 13)), 0, values.reshape(-1))
    checkpoint = open_checkpoint(sim.save(tmp_path, 1, [[piece]])[0][0])
    for box in (layout.full_box((7, 11, 13)), ((2, 6), (1, 9), (3, 5)), ((0, 7), (0, 11), (12, 13))):
        assert torch.equal(checkpoint.read("w", box=box), values[tuple(slice(*ends) for ends in box)])
    assert max(sizes) <= 64 and len(sizes) > 50


def test_strided_pieces_are_stored_by_value(tmp_path, sim):
    column, one = torch.randn(5, 3)[:, 1], torch.randn(2, 3, dtype=torch.float64)[:1, 2]
    assert column.stride() == (3,) and one.stride() == (3,)
    pieces = [Piece("a", "m", (5,), (5,), ((0, 5),), 0, column), Piece("b", "m", (1,), (1,), ((0, 1),), 0, one)]
    checkpoint = open_checkpoint(sim.save(tmp_path, 1, [pieces])[0][0])
    assert torch.equal(checkpoint.read("a", "m"), column) and torch.equal(checkpoint.read("b", "m"), one)


def test_short_writes_and_reads_of_the_system_are_continued(tmp_path, sim, monkeypatch):
    write, read = os.write, os.preadv
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:5]], offset))
    values = torch.randn(40)
    piece = Piece("w", "param", (40,), (40,), ((0, 40),), 0, values)
    assert torch.equal(open_checkpoint(sim.save(tmp_path, 1, [[piece]])[0][0]).read("w"), values)


def test_documents_and_state(tmp_path, sim):
    documents = {"state.json": b'{"step": 5, "samples": 40}', "config.yaml": b"a: 1\n"}
    folder = sim.save(tmp_path, 5, [[], []], documents)[0][0]
    checkpoint = open_checkpoint(folder)
    assert checkpoint.state == {"step": 5, "samples": 40} and checkpoint.document("config.yaml") == b"a: 1\n"
    assert checkpoint.step == 5 and sorted(p.name for p in folder.iterdir()) == ["config.yaml", "manifest.json",
                                                                                  "state.json"]
    with pytest.raises(UsageError, match="holds no tokenizer.json"):
        checkpoint.document("tokenizer.json")


def test_manifest_hash_is_that_of_its_canonical_json(tmp_path, sim):
    manifest = json.loads((sim.small_checkpoint(tmp_path) / "manifest.json").read_text())
    digest = manifest.pop("manifest_xxh3_128")
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    assert xxhash.xxh3_128_hexdigest(canonical) == digest


def test_weights_hash_depends_on_the_weights_and_not_on_the_layout(tmp_path, sim):
    tensors = {(f"layer.{i}", slot): (torch.randn(4, 3 + i), (4, 3 + i)) for i in (10, 9, 0) for slot in ("param", "m")}
    params = sorted((name, values) for (name, slot), (values, _) in tensors.items() if slot == "param")
    hashes = {weights_hash(params)}
    for index, (tp, dp) in enumerate([(1, 1), (2, 1), (1, 3), (2, 2)]):
        folder = sim.save(tmp_path / str(index), 1, sim.random_layout(tensors, tp, dp, index))[0][0]
        hashes.add(weights_hash(open_checkpoint(folder)))
    by_hand = b"".join(json.dumps([n, list(v.shape)]).encode() + b"\n" + v.numpy().tobytes() for n, v in params)
    assert hashes == {xxhash.xxh3_128_hexdigest(by_hand)}
    changed = [(name, values.clone()) for name, values in params]
    changed[1][1][0, 0] += 1e-6
    assert weights_hash(changed) not in hashes
    assert weights_hash([(name, values.T) for name, values in params]) not in hashes
    with pytest.raises(ValueError, match="name order"):
        weights_hash(reversed(params))
    with pytest.raises(ValueError, match="float32"):
        weights_hash([(name, values.double()) for name, values in params])


def _piece(name="w", box=((0, 4), (0, 4)), start=0, numel=16, shape=(4, 4), view=(4, 4), slot="param", dtype=None):
    return Piece(name, slot, shape, view, box, start, torch.zeros(numel, dtype=dtype))


@pytest.mark.parametrize("pieces, message", [
    ([[_piece(numel=8)], [_piece(start=9, numel=7)]], "gap"),
    ([[_piece(numel=8)], [_piece(start=7, numel=9)]], "overlap"),
    ([[_piece(numel=15)], []], "15 of 16"),
    ([[_piece(box=((0, 2), (0, 4)), numel=8)], [_piece(box=((1, 4), (0, 4)), numel=12)]], "overlap of boxes"),
    ([[_piece(box=((0, 2), (0, 4)), numel=8)], [_piece(box=((2, 4), (0, 3)), numel=6)]], "gap"),
    ([[_piece()], [_piece(box=((0, 2), (0, 4)), numel=8)]], "overlap of boxes"),
    ([[_piece()], [_piece(dtype=torch.float64)]], "stands twice"),
    ([[_piece()], [_piece(view=(2, 2, 4), box=((0, 2), (0, 2), (0, 4)))]], "stands twice"),
    ([[_piece(view=(3, 4))], []], "does not fit view"),
    ([[_piece(box=((0, 5), (0, 4)))], []], "does not fit view"),
    ([[_piece(numel=17)], []], "do not fit box"),
    ([[_piece(start=-1)], []], "do not fit box"),
    ([[_piece(name="../w")], []], "characters"),
    ([[_piece(dtype=torch.complex64)], []], "dtype complex64"),
])
def test_pieces_that_do_not_make_whole_tensors_are_refused_by_all_ranks(tmp_path, sim, pieces, message):
    _, errors = sim.save(tmp_path, 1, pieces)
    assert [type(error) for error in errors] == [CheckpointError] * 2
    assert all(message in str(error) for error in errors), errors[0]
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("options, message", [({"documents": {"../x": b""}}, "../x"), ({"keep_last": 0}, "keep_last=0"),
                                              ({"documents": {"manifest.json": b""}}, "manifest.json")])
def test_bad_arguments_are_refused_by_all_ranks(tmp_path, sim, options, message):
    _, errors = sim.save(tmp_path, 1, [[_piece()], []], **options)
    assert all(isinstance(error, CheckpointError) and message in str(error) for error in errors)
