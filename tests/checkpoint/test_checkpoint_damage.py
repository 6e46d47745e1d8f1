"""Whatever is changed in a checkpoint is noticed, and named, before any tensor is used."""
import json
import os
import random
import resource
import shutil
import struct

import pytest
import torch
import xxhash

from dlm_scale.checkpoint.folders import find_checkpoint, inspect_checkpoint, inspect_together, list_checkpoints
from dlm_scale.checkpoint.reader import open_checkpoint
from dlm_scale.errors import UsageError
from tests.forked import run_ranks


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, sim):
    return sim.small_checkpoint(tmp_path_factory.mktemp("pristine"), world=2)


@pytest.fixture
def victim(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "victim")


def replace(path, data):
    """A new file: overwriting the old one would wait for the disk."""
    path.unlink()
    path.write_bytes(data)


def refused(folder, name):
    """Opening fails, and the first of the problems names the file."""
    with pytest.raises(UsageError) as caught:
        open_checkpoint(folder)
    return name in str(caught.value)


def test_every_byte_flipped_is_detected(victim):
    rng, flips = random.Random(0), 0
    for path in sorted(victim.iterdir()):
        with open(path, "r+b", buffering=0) as file:
            for position, good in enumerate(path.read_bytes()):
                file.seek(position)
                file.write(bytes([good ^ 1 << rng.randrange(8)]))
                assert refused(victim, path.name), (path, position)
                file.seek(position)
                file.write(bytes([good]))
                flips += 1
    assert flips > 1500 and not inspect_checkpoint(victim)[1]


def test_random_truncations_extensions_and_zeroed_ranges_are_detected(victim):
    rng, seen = random.Random(1), 0
    for path in sorted(victim.iterdir()):
        good = path.read_bytes()
        for _ in range(60):
            start = rng.randrange(len(good))
            zeroed = good[:start] + bytes(min(512, len(good) - start)) + good[start + 512:]
            for bad in (good[:start], good + rng.randbytes(rng.randint(1, 9)), zeroed, good[start:] + good[:start]):
                if bad != good:
                    replace(path, bad)
                    assert refused(victim, path.name), path
                    seen += 1
        path.write_bytes(good)
    assert seen > 600 and not inspect_checkpoint(victim)[1]


def test_missing_swapped_linked_and_special_files_are_named(victim, tmp_path, pristine, sim):
    def fifo(path):
        path.unlink()
        os.mkfifo(path)

    def link(path):
        path.unlink()
        path.symlink_to(pristine / path.name)

    def folder(path):
        path.unlink()
        path.mkdir()

    for name in sorted(path.name for path in pristine.iterdir()):
        for damage in (os.unlink, fifo, link, folder):
            copy = shutil.copytree(pristine, tmp_path / f"{name}.{damage.__name__}")
            damage(copy / name)
            assert refused(copy, name), (name, damage)
    files = sorted(victim.glob("rank_*"))
    swapped = [file.read_bytes() for file in files]
    for file, data in zip(files, reversed(swapped)):
        file.write_bytes(data)
    *problems, hint = inspect_checkpoint(victim)[1]
    assert len(problems) == 2 and "manifest.json is another checkpoint's" in hint
    assert all(file.name in problem for file, problem in zip(files, problems))


def test_files_of_another_run_and_of_another_step_are_detected(tmp_path, sim):
    values = [(torch.full((64,), float(i)), (64,)) for i in range(3)]
    runs = [sim.save(tmp_path / str(i), 1, sim.random_layout({("w", "param"): values[i]}, 1, 1, 0))[0][0]
            for i in range(3)]
    for name in ("rank_00000.safetensors", "manifest.json"):
        copy = shutil.copytree(runs[0], tmp_path / f"copy.{name}")
        shutil.copy(runs[1] / name, copy / name)
        assert (copy / name).stat().st_size == (runs[0] / name).stat().st_size
        assert refused(copy, "rank_00000.safetensors")


def test_sizes_are_checked_without_hashing_and_contents_only_with(victim):
    path = next(victim.glob("rank_*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    open_checkpoint(victim, verify=False)
    path.write_bytes(data[:-1])
    with pytest.raises(UsageError, match="bytes, the manifest says"):
        open_checkpoint(victim, verify=False)


def test_a_document_is_hashed_again_when_it_is_read(victim):
    checkpoint = open_checkpoint(victim)
    (victim / "state.json").write_bytes(b'{"step":2}')
    with pytest.raises(UsageError, match="state.json: content has hash"):
        checkpoint.state


def test_the_newest_good_checkpoint_is_found_and_the_others_named(tmp_path, sim):
    folders = [sim.small_checkpoint(tmp_path, step=step) for step in (1, 2, 30, 4)]
    folders.sort()
    assert list_checkpoints(tmp_path) == folders and find_checkpoint(tmp_path) == (folders[3], [])
    (folders[3] / "manifest.json").unlink()
    data = next(folders[2].glob("rank_*")).read_bytes()
    next(folders[2].glob("rank_*")).write_bytes(data[:-1])
    found, messages = find_checkpoint(tmp_path)
    assert found == folders[1] and find_checkpoint(folders[1]) == (folders[1], [])
    assert len(messages) == 2 and "step_00000030 is damaged: manifest.json: missing" in messages[0]
    assert "step_00000004 is damaged: rank_0000" in messages[1]
    for folder in folders[:2]:
        (folder / "state.json").unlink()
    for path in (tmp_path, folders[2]):
        with pytest.raises(UsageError, match="no good checkpoint in .*rank_0000"):
            find_checkpoint(path)


def test_ranks_share_the_hashing_and_all_learn_of_every_damage(pristine, tmp_path):
    victim = shutil.copytree(pristine, tmp_path / "step_00000007")
    names = sorted(path.name for path in pristine.iterdir() if path.name != "manifest.json")
    for name in names:
        data = (victim / name).read_bytes()
        (victim / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        shares = [inspect_checkpoint(victim, share=(rank, 3))[1] for rank in range(3)]
        assert sum(bool(lines) for lines in shares) == 1  # each file is hashed by one rank
        found = [inspect_together(rank, 3, lambda value: [(value[0], lines) for lines in shares])(victim)[1]
                 for rank in range(3)]
        assert found[0] == found[1] == found[2] and [name in line for line in found[0]] == [True]
        (victim / name).write_bytes(data)
    with pytest.raises(UsageError, match="see different checkpoints.*step_00000006, step_00000007"):
        inspect_together(0, 2, lambda value: [("step_00000006", []), value])(victim)


def test_paths_that_hold_no_checkpoint_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints" / "step_00000001.tmp-00000000").mkdir(parents=True)
    (tmp_path / "file").touch()
    assert list_checkpoints(tmp_path / "empty") == list_checkpoints(tmp_path / "run") == []
    for name, words in (("absent", "not a folder"), ("file", "not a folder"), ("empty", "no manifest.json"),
                        ("run", "no checkpoint yet")):
        with pytest.raises(UsageError, match=words):
            find_checkpoint(tmp_path / name)


def rewrite_manifest(folder, change):
    """Apply `change` to the manifest and hash it anew, as somebody with bad intent would."""
    path = folder / "manifest.json"
    value = json.loads(path.read_bytes())
    del value["manifest_xxh3_128"]
    change(value)
    body = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    replace(path, b'{"manifest_xxh3_128":"' + xxhash.xxh3_128_hexdigest(body).encode() + b'",' + body[1:])


def first_tensor(change):
    return lambda m: change(m["tensors"][0])


def first_box(change):
    return lambda m: change(m["tensors"][0]["boxes"][0])


def rename_file(new):
    return lambda m: m["files"].update({new: m["files"].pop("state.json")})


MANIFEST_CHANGES = [
    (lambda m: m.update(version=2), "dlm_scale.checkpoint 2"),
    (lambda m: m.update(version=True), "dlm_scale.checkpoint True"),
    (lambda m: m.update(format="x"), "of format x"),
    (lambda m: m.update(extra=1), "exactly the keys"),
    (lambda m: m.pop("step"), "exactly the keys"),
    (lambda m: m.update(step=-1), "step: not an integer"),
    (lambda m: m.update(step=True), "step: not an integer"),
    (lambda m: m.update(step="1"), "step: not an integer"),
    (lambda m: m.update(world_size=0), "world_size"),
    (lambda m: m.update(world_size=1), "rank 1 at .* world 1"),
    (lambda m: m.update(files=[]), "files is not an object"),
    (rename_file("../state.json"), "not valid"),
    (rename_file("/etc/passwd"), "not valid"),
    (rename_file("."), "not valid"),
    (rename_file("manifest.json"), "not valid"),
    (rename_file("a\u0000b"), "not valid"),
    (lambda m: m["files"].pop("rank_00000.safetensors"), "not among the files"),
    (lambda m: m["files"]["state.json"].update(size=-1), "state.json"),
    (lambda m: m["files"]["state.json"].update(size=1e1), "state.json"),
    (lambda m: m["files"]["state.json"].update(size=11), "state.json"),
    (lambda m: m["files"]["state.json"].update(xxh3_128=None), "hash not valid"),
    (lambda m: m["files"]["state.json"].update(xxh3_128="0" * 31), "hash not valid"),
    (lambda m: m["files"]["state.json"].update(xxh3_128="0" * 32), "content has hash"),
    (lambda m: m["tensors"].append(m["tensors"][0]), "stands twice"),
    (lambda m: m.update(tensors={}), "not a list"),
    (lambda m: m["tensors"].append(None), "exactly the keys"),
    (first_tensor(lambda t: t.update(name="a/../b")), "name is not valid"),
    (first_tensor(lambda t: t.update(name=3)), "name is not valid"),
    (first_tensor(lambda t: t.update(slot="a.b")), "slot of"),
    (first_tensor(lambda t: t.update(dtype="object")), "dtype is not known"),
    (first_tensor(lambda t: t.update(dtype=["float32"])), "dtype is not known"),
    (first_tensor(lambda t: t.update(dtype="int8")), "other tensors than the manifest says"),
    (first_tensor(lambda t: t.update(name="other")), "other tensors than the manifest says"),
    (first_tensor(lambda t: t.update(shape=[1 << 50])), "shape"),
    (first_tensor(lambda t: t.update(shape=[1 << 40] * 2, view=[1 << 40] * 2)), "view does not fit"),
    (first_tensor(lambda t: t.update(shape=[0])), "shape"),
    (first_tensor(lambda t: t.update(shape=[7, 7])), "view does not fit"),
    (first_tensor(lambda t: t.update(shape=[1] * 17)), "too long"),
    (first_tensor(lambda t: t.update(boxes=[])), "gap"),
    (first_tensor(lambda t: t["boxes"].append(t["boxes"][0])), "overlap of boxes"),
    (first_tensor(lambda t: t.update(boxes=t["boxes"] * 2000)), "too long"),
    (first_box(lambda b: b.update(box=[[0, 10 ** 9]] * len(b["box"]))), "is not in"),
    (first_box(lambda b: b.update(box=[[0]] * len(b["box"]))), "is not in"),
    (first_box(lambda b: b.update(box=[[-1, 1]] * len(b["box"]))), "not an integer"),
    (first_box(lambda b: b.update(box=[[1, 1]] * len(b["box"]))), "is not in"),
    (first_box(lambda b: b.update(box=b["box"] + [[0, 1]])), "is not in"),
    (first_box(lambda b: b["pieces"].pop()), "elements of box"),
    (first_box(lambda b: b["pieces"].append(b["pieces"][0])), "overlap"),
    (first_box(lambda b: b["pieces"][0].__setitem__(0, 1)), "gap"),
    (first_box(lambda b: b["pieces"][0].__setitem__(1, 0)), "overlap at"),
    (first_box(lambda b: b["pieces"][0].__setitem__(2, 9)), "rank 9 at .* world 2"),
    (first_box(lambda b: b["pieces"][0].append(1)), "not \\[flat_start"),
    (first_box(lambda b: b.update(pieces=[7])), "not \\[flat_start"),
]


@pytest.mark.parametrize("change, message", MANIFEST_CHANGES)
def test_forged_manifests_are_refused(victim, change, message):
    rewrite_manifest(victim, change)
    with pytest.raises(UsageError, match=message):
        open_checkpoint(victim)


def mutate_json(rng, value, is_root=False):
    """A copy of a JSON value with one random node replaced, removed or repeated."""
    if isinstance(value, (dict, list)) and value and (is_root or rng.random() < 0.9):
        copy = value.copy()
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        if rng.random() < 0.1:
            del copy[key]
        else:
            copy[key] = mutate_json(rng, value[key])
        return copy
    return rng.choice([None, True, -1, 0, 1, 2, 1 << 62, 1 << 80, 1.5, "", "float64", "../x", [], {}, [[0, 1]],
                       [value, value], {"box": value}])


def test_random_forged_manifests_are_refused_or_harmless(victim):
    rng, refusals = random.Random(2), 0
    original = (victim / "manifest.json").read_bytes()
    wanted = {key: open_checkpoint(victim).read(*key) for key in open_checkpoint(victim).tensors}
    for _ in range(1500):
        replace(victim / "manifest.json", original)
        rewrite_manifest(victim, lambda m: m.update(mutate_json(rng, m, is_root=True)))
        try:
            checkpoint = open_checkpoint(victim)
        except UsageError:
            refusals += 1
            continue
        for key in checkpoint.tensors:
            assert torch.equal(checkpoint.read(*key).reshape(-1), wanted[key].reshape(-1))
    assert refusals > 1000


def forge_rank_file(folder, data):
    """Replace rank 0's file and hash it in the manifest."""
    (folder / "rank_00000.safetensors").write_bytes(data)
    record = {"size": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    rewrite_manifest(folder, lambda m: m["files"].update({"rank_00000.safetensors": record}))


def safetensors_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), ends=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": ends}


@pytest.mark.parametrize("data, message", [
    (b"", "ends at byte 0"),
    (b"\x02\0\0\0\0\0\0", "ends at byte 7"),
    (struct.pack("<Q", 1 << 63) + b"{}", "header of"),
    (struct.pack("<Q", 3) + b"{}", "header of 3 bytes"),
    (safetensors_bytes(b"{"), "not valid JSON"),
    (safetensors_bytes(b"[]"), "not a JSON object"),
    (safetensors_bytes(b"[" * 100_000), "not valid JSON"),
    (safetensors_bytes(b"\xff\xfe{}"), "not valid JSON"),
    (safetensors_bytes(b'{"a":' + json.dumps(entry()).encode() + b',"a":1}', bytes(8)), "stands twice"),
    (safetensors_bytes({"a": entry()}, bytes(7)), "do not tile"),
    (safetensors_bytes({"a": entry()}, bytes(9)), "do not tile"),
    (safetensors_bytes({"a": entry(ends=(4, 12))}, bytes(12)), "do not tile"),
    (safetensors_bytes({"a": entry(), "b": entry(ends=(4, 12))}, bytes(12)), "do not tile"),
    (safetensors_bytes({"a": entry(), "b": entry()}, bytes(8)), "do not tile"),
    (safetensors_bytes({"a": entry(), "b": entry(ends=(12, 20))}, bytes(20)), "do not tile"),
    (safetensors_bytes({"a": entry(shape=(1 << 61,), ends=(0, 1 << 63))}, bytes(8)), "do not tile"),
    (safetensors_bytes({"a": entry(shape=(-2,), ends=(8, 0))}, bytes(8)), "not the entry"),
    (safetensors_bytes({"a": entry(shape=(2, 1))}, bytes(8)), "not the entry"),
    (safetensors_bytes({"a": entry(shape=(True,), ends=(0, 4))}, bytes(4)), "not the entry"),
    (safetensors_bytes({"a": entry(shape=(2.0,))}, bytes(8)), "not the entry"),
    (safetensors_bytes({"a": entry(shape=3)}, bytes(8)), "not the entry"),
    (safetensors_bytes({"a": entry(dtype="F33")}, bytes(8)), "not the entry"),
    (safetensors_bytes({"a": entry(dtype=[])}, bytes(8)), "not the entry"),
    (safetensors_bytes({"a": entry(ends=(0, 4))}, bytes(4)), "not the entry"),
    (safetensors_bytes({"a": entry(ends=(0, 8, 8))}, bytes(8)), "not the entry"),
    (safetensors_bytes({"a": {**entry(), "x": 1}}, bytes(8)), "not the entry"),
    (safetensors_bytes({"a": None}), "not the entry"),
    (safetensors_bytes({"a": "dtype"}), "not the entry"),
    (safetensors_bytes({"a": entry()}, bytes(8)), "other tensors"),
    (safetensors_bytes({}), "other tensors"),
])
def test_forged_safetensors_are_refused(victim, data, message):
    forge_rank_file(victim, data)
    with pytest.raises(UsageError, match=f"rank_00000.safetensors.*{message}"):
        open_checkpoint(victim)
    checkpoint = open_checkpoint(victim, verify=False)
    with pytest.raises(UsageError, match="rank_00000.safetensors"):
        for key in checkpoint.tensors:
            checkpoint.read(*key)


def test_a_header_that_disagrees_with_the_manifest_is_refused_on_reading(tmp_path, sim):
    folder = sim.save(tmp_path, 1, sim.random_layout({("w", "param"): (torch.zeros(4), (4,))}, 1, 1, 0))[0][0]
    key, rest = "param/w/0:4/0", {"x": entry("F32", (1,), (12, 16))}
    for lie in ({key: entry("F64", (2,), (0, 16))}, {key: entry("F32", (3,), (0, 12)), **rest},
                {"param/w/0:4/1": entry("F32", (4,), (0, 16))}):
        forge_rank_file(folder, safetensors_bytes(lie, bytes(16)))
        with pytest.raises(UsageError, match="does not hold param/w/0:4/0 as the manifest says"):
            open_checkpoint(folder, verify=False).read("w")


@pytest.mark.parametrize("data", [b"{}", b"[1]", b'{"manifest_xxh3_128":"', b"", b"\x80\x04]"])
def test_files_that_are_no_manifest_are_refused(victim, data):
    (victim / "manifest.json").write_bytes(data)
    assert refused(victim, "manifest.json: its own hash does not match")


def test_memory_of_a_narrow_read_is_a_few_chunks(tmp_path, sim):
    rows = 1 << 15
    values = torch.arange(rows * 1024, dtype=torch.float32)
    pieces = sim.random_layout({("w", "param"): (values.view(rows, 1024), (rows, 1024))}, 1, 1, 0)
    folder = sim.save(tmp_path, 1, pieces)[0][0]

    def read_columns():
        checkpoint, before = open_checkpoint(folder), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        columns = checkpoint.read("w", box=((0, rows), (5, 7)))
        assert torch.equal(columns, values.view(rows, 1024)[:, 5:7])
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10

    run_ranks(1, read_columns)
