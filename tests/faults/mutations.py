"""Random damage to the files of a checkpoint, and of a dataset: it must be found before anything is used."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dlm_scale.checkpoint.folders import find_checkpoint
from dlm_scale.checkpoint.reader import open_checkpoint
from dlm_scale.data.loader import open_data
from dlm_scale.data.verify import verify
from dlm_scale.errors import UsageError
from tests.faults.figures import Figure, figure
from tests.faults.specimen import Specimen

PAGE = 4096
Mutator = Callable[[bytes, random.Random], "bytes | None"]  # None: the file goes


def _truncated(data: bytes, rng: random.Random) -> bytes:
    return data[:rng.randrange(len(data))]


def _extended(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice((1, 8, PAGE)))


def _bit_flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(8 * len(data))
    return data[:at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1:]


def _zero_page(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(-(-len(data) // PAGE)) * PAGE
    return data[:start] + bytes(min(PAGE, len(data) - start)) + data[start + PAGE:]


def _missing(data: bytes, rng: random.Random) -> None:
    return None


MUTATORS: dict[str, Mutator] = {"truncated": _truncated, "extended": _extended, "bit flipped": _bit_flipped,
                                "zero page": _zero_page, "missing": _missing}


@contextmanager
def damaged(path: Path, data: bytes | None) -> Iterator[None]:
    """The file with other content, or gone, for a while."""
    original = path.read_bytes()
    path.unlink() if data is None else path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(original)


def draw(files: list[Path], others: Callable[[Path], list[Path]], rng: random.Random) -> tuple[str, Path, bytes | None]:
    """(kind, file, its new content): one of MUTATORS, or swapped with one of `others(file)`; never without effect."""
    while True:
        path = rng.choice(files)
        kind = rng.choice([*MUTATORS, "swapped"])
        data = path.read_bytes()
        new = rng.choice(others(path)).read_bytes() if kind == "swapped" else MUTATORS[kind](data, rng)
        if new != data:
            return kind, path, new


def checkpoint_mutations(specimen: Specimen, count: int, seed: int = 0) -> Figure:
    """Damage to the newer of two checkpoints: refused by name, and the older one is taken."""
    rng, (old, new) = random.Random(seed), (specimen.checkpoint(step) for step in (1, 2))
    files = sorted(new.iterdir())

    def others(path: Path) -> list[Path]:
        return [old / path.name, *(f for f in files if f != path)]

    return figure(_checkpoint_case(specimen, old, new, *draw(files, others, rng)) for _ in range(count))


def _checkpoint_case(specimen: Specimen, old: Path, new: Path, kind: str, path: Path, data: bytes | None) -> str | None:
    with damaged(path, data):
        try:
            open_checkpoint(new)
            return f"{kind} {path.name}: opened as if nothing had happened"
        except UsageError as error:
            if path.name not in str(error):
                return f"{kind} {path.name}: not named in: {error}"
        found, messages = find_checkpoint(specimen.run)
        if found != old or len(messages) != 1 or path.name not in messages[0]:
            return f"{kind} {path.name}: fell back to {found}, saying {messages}"
    return None


def dataset_mutations(specimen: Specimen, count: int, seed: int = 0) -> Figure:
    """Damage to a dataset: `dlm data verify` names the file; all but changed bytes of text is seen on opening."""
    rng, folder = random.Random(seed), specimen.prefix.parent
    files = [folder / name for name in ("train.bin", "train.idx", "characters.json")]

    def others(path: Path) -> list[Path]:
        return [folder / f"val{path.suffix}" if path.suffix != ".json" else folder / "meta.json"]

    return figure(_dataset_case(specimen, *draw(files, others, rng)) for _ in range(count))


def _dataset_case(specimen: Specimen, kind: str, path: Path, data: bytes | None) -> str | None:
    changes_size = data is None or len(data) != path.stat().st_size
    with damaged(path, data):
        if path.suffix == ".idx" or path.suffix == ".bin" and changes_size:
            try:
                open_data(str(specimen.prefix), 16, 1)
                return f"{kind} {path.name}: opened as if nothing had happened"
            except UsageError as error:
                if specimen.prefix.name not in str(error):
                    return f"{kind} {path.name}: not named in: {error}"
        try:
            verify(str(specimen.prefix))
            return f"{kind} {path.name}: verified as if nothing had happened"
        except UsageError as error:
            if path.stem not in str(error):
                return f"{kind} {path.name}: not named in: {error}"
    return None
