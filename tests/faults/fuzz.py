"""Generated headers, indexes and manifests, each vouched for by the hashes above it: `python -m tests.faults.fuzz`.

Arguments: an empty folder, how many cases, a seed. Each case damages a real file in structure, seals the hashes that
cover it anew, and opens and reads everything. Prints a JSON object: counts, and a line for each case that raised
anything but UsageError, read outside the folder, took a second, or more memory than the files' size + 100 MB.
"""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from dlm_scale.checkpoint.reader import open_checkpoint, weights_hash
from dlm_scale.data.indexed import HEADER, IndexedDataset
from dlm_scale.data.loader import ValidationData, open_data
from dlm_scale.data.tokenizer import load_tokenizer
from dlm_scale.data.meta import TOKENIZER_DOCUMENT
from dlm_scale.errors import UsageError
from tests.faults.hostile import reseal
from tests.faults.specimen import Specimen, make_specimen

SECONDS, MEGABYTES = 1.0, 100
NUMBERS = (-1, 0, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**48, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30)
LEAVES = (*NUMBERS, 1.5, 1e308, True, False, None, "", "../../x", "/etc/passwd", "\0", "a" * 10_000, "F32", "BOOL",
          [], {}, [[]], {"a": {}}, "\ud800", [0] * 1000)


def nested(rng: random.Random) -> Any:
    value: Any = 0
    for _ in range(rng.choice((3, 50, 400))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def mutated(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value with one random place replaced, removed, repeated or renamed."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.12:
        return nested(rng) if rng.random() < 0.05 else rng.choice(LEAVES)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        kept = {"remove": [], "repeat": [value[at], value[at]]}
        middle = kept.get(rng.choice(["remove", "repeat", *["descend"] * 6]), [mutated(rng, value[at])])
        return value[:at] + middle + value[at + 1:]
    key, how = rng.choice(list(value)), rng.random()
    if how < 0.1:
        return {k: v for k, v in value.items() if k != key}
    if how < 0.2:
        name = rng.choice(("../../x", "/etc/passwd", "", "\0", "b" * 5000, "__proto__", key.upper()))
        return {(name if k == key else k): v for k, v in value.items()}
    return {**value, key: mutated(rng, value[key])}


def several(rng: random.Random, value: Any) -> Any:
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = mutated(rng, value)
    return value


def as_bytes(rng: random.Random, value: Any) -> bytes:
    """JSON text; now and then cut, doubled, with other bytes in it, or in another encoding."""
    text, how = json.dumps(value).encode(), rng.random()
    if how < 0.04:
        return text[:rng.randrange(len(text) + 1)]
    if how < 0.06:
        return text + text
    if how < 0.10:
        at = rng.randrange(len(text) + 1)
        return text[:at] + rng.randbytes(rng.randint(1, 8)) + text[at + 1:]
    return json.dumps(value).encode("utf-16") if how < 0.11 else text


class Target:
    """The files of a specimen, put back after each case."""

    def __init__(self, specimen: Specimen):
        self.specimen = specimen
        self.folder = specimen.checkpoint(2)
        self.data = specimen.prefix.parent
        self.files = {path: path.read_bytes() for place in (self.folder, self.data) for path in place.iterdir()}

    def restore(self) -> None:
        for path, content in self.files.items():
            path.write_bytes(content)

    def size(self) -> float:
        return sum(path.stat().st_size for path in self.files) / 2**20

    def read_checkpoint(self) -> None:
        checkpoint = open_checkpoint(self.folder)
        weights_hash(checkpoint)
        checkpoint.state["step"]
        load_tokenizer(self.folder, json.loads(checkpoint.document(TOKENIZER_DOCUMENT))).decode([0, 1])

    def read_data(self) -> None:
        data = open_data(str(self.specimen.prefix), 16, 1)
        data.rows(np.arange(8))
        IndexedDataset(self.specimen.prefix).document(0)
        ValidationData(str(self.specimen.prefix), 16, 4).text()


def header(rng: random.Random, target: Target) -> Callable[[], None]:
    """The header of a safetensors file, or the length before it, or the data behind."""
    path = target.folder / rng.choice(("rank_00000.safetensors", "rank_00001.safetensors"))
    content = target.files[path]
    (length,) = struct.unpack_from("<Q", content)
    values, data = json.loads(content[8:8 + length]), content[8 + length:]
    if rng.random() < 0.15:
        claimed, text = rng.choice((0, 1, length - 8, len(content) - 8, len(content), 2**31, 2**63, 2**64 - 1)), content[8:]
    else:
        text = as_bytes(rng, several(rng, values))
        claimed, data = len(text), data[:rng.randrange(len(data))] if rng.random() < 0.1 else data
        text += data
    path.write_bytes(struct.pack("<Q", claimed) + text)
    reseal(target.folder)
    return target.read_checkpoint


def manifest(rng: random.Random, target: Target) -> Callable[[], None]:
    """The manifest's body under a hash of its own that is right."""
    def change(body: dict) -> None:
        made = several(rng, dict(body))
        body.clear()
        body.update(made if isinstance(made, dict) else {"format": made})

    reseal(target.folder, change)
    return target.read_checkpoint


def document(rng: random.Random, target: Target) -> Callable[[], None]:
    path = target.folder / rng.choice(("state.json", TOKENIZER_DOCUMENT, "characters.json"))
    path.write_bytes(as_bytes(rng, several(rng, json.loads(target.files[path]))))
    reseal(target.folder)
    return target.read_checkpoint


def meta(rng: random.Random, target: Target) -> Callable[[], None]:
    path = target.data / "meta.json"
    path.write_bytes(as_bytes(rng, several(rng, json.loads(target.files[path]))))
    return target.read_data


def index(rng: random.Random, target: Target) -> Callable[[], None]:
    """A .idx: fields of its header, entries of its arrays, its length; meta.json vouches for it."""
    path = target.data / "train.idx"
    content = target.files[path]
    fields, arrays = list(HEADER.unpack_from(content)), np.frombuffer(content[HEADER.size:], dtype="u1").copy()
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.6:
            at = rng.randrange(5)
            fields[at] = rng.randbytes(9) if at == 0 else rng.choice(NUMBERS) % (256 if at == 2 else 2**64)
        else:
            at, value = rng.randrange(len(arrays)), rng.choice((0, 1, 127, 128, 255))
            arrays[at:at + rng.choice((1, 4, 8))] = value
    made = HEADER.pack(*fields) + arrays.tobytes()
    made = made[:rng.randrange(len(made))] if rng.random() < 0.1 else made + bytes(rng.choice((0, 0, 0, 1, 12, 4096)))
    path.write_bytes(made)
    about = json.loads(target.files[target.data / "meta.json"])
    about["splits"]["train"]["idx_xxh3"] = xxhash.xxh3_64_hexdigest(made)
    (target.data / "meta.json").write_text(json.dumps(about))
    return target.read_data


KINDS = {"header": header, "manifest": manifest, "document": document, "meta": meta, "index": index}


class Watch:
    """Opens outside of the folder, seen by an audit hook."""

    def __init__(self, folder: Path):
        self.folder, self.outside, self.is_on = str(folder), [], False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.is_on and event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.normpath(os.fsdecode(arguments[0]))
            if not path.startswith(self.folder):
                self.outside.append(path)


def one(kind: str, rng: random.Random, target: Target, watch: Watch) -> tuple[str, str | None]:
    """(accepted or refused, what went wrong)."""
    read = KINDS[kind](rng, target)
    before, started, problem, outcome = peak_megabytes(), time.process_time(), None, "accepted"
    watch.outside, watch.is_on = [], True
    try:
        read()
    except UsageError:
        outcome = "refused"
    except BaseException as error:
        problem = f"{type(error).__name__}: {str(error)[:200]}"
    watch.is_on = False
    spent, grown = time.process_time() - started, peak_megabytes() - before
    if spent > SECONDS:
        problem = f"took {spent:.1f} s"
    if grown > MEGABYTES + target.size():
        problem = f"took {grown:.0f} MB"
    return outcome, f"read {watch.outside[:3]}" if watch.outside else problem


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(folder: Path, count: int, seed: int) -> dict[str, Any]:
    target, watch = Target(make_specimen(folder)), Watch(folder)
    target.read_checkpoint()
    target.read_data()
    counts, failures = Counter(), []
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        (folder / "case").write_text(f"{kind} {seed}:{number}")  # what it was doing, should it crash
        outcome, problem = one(kind, random.Random(f"{seed}:{number}"), target, watch)
        target.restore()
        counts[f"{kind} {outcome}"] += 1
        if problem:
            failures.append(f"{kind} {seed}:{number}: {problem}")
    return {"total": count, "counts": counts, "failures": failures}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3]))))
