"""Built-in corpora that need no network: `stdlib` (Python's own sources) and `grammar` (exact entropy known)."""

from __future__ import annotations

import ast
import math
import platform
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from dlm_scale.data.documents import Chunk, Document, Source
from dlm_scale.data.meta import Floor
from dlm_scale.diffusion.rng import Stream, philox
from dlm_scale.errors import UsageError

# pydoc_data is one generated English text of 0.7 MB: whichever split it fell into would be mostly that
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
MIN_STDLIB_FILES = 100

GRAMMAR_SYMBOLS = "abcdefghij"
GRAMMAR_STEPS = (0, 1, 2, 3)
GRAMMAR_STEP_PROBABILITY = (0.5, 0.25, 0.125, 0.125)
GRAMMAR_SEED = 1
GRAMMAR_LENGTH = {"train": 2_000_000, "val": 200_000}


def stdlib_source(root: Path | None = None) -> Source:
    """The .py files of the running interpreter's standard library (tests left out) that are UTF-8 and parse.

    Split by file name. Raises UsageError where the interpreter came without sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    files = sorted(p for p in root.rglob("*.py") if not NOT_STDLIB & set(p.relative_to(root).parts))
    if len(files) < MIN_STDLIB_FILES:
        raise UsageError(
            f"stdlib: only {len(files)} .py files under {root}: this Python came without its library's sources."
            " Install the full package (python3, not python3-minimal), or prepare a text file of your own"
        )
    names = "\n".join(p.relative_to(root).as_posix() for p in files)
    description = {"name": "stdlib", "python": platform.python_version(), "files": len(files)}
    description["files_xxh3"] = xxhash.xxh3_64_hexdigest(names.encode())
    sizes = [path.stat().st_size for path in files]

    def chunks(chunk_bytes: int, cut: str | None) -> Iterator[Chunk]:
        for numbers in np.split(np.arange(len(files)), _borders(sizes, chunk_bytes)):
            paths, size = tuple(str(files[i]) for i in numbers), sum(sizes[i] for i in numbers)
            yield Chunk(parsable, (paths, str(root)), size / sum(sizes))

    return Source(chunks, description, identity=str(root))


def _borders(sizes: Sequence[int], chunk_bytes: int) -> np.ndarray:
    """Where a list of files is split so that each part begins in another stretch of `chunk_bytes`."""
    starts = np.cumsum([0, *sizes])[:-1]
    return np.flatnonzero(np.diff(starts // chunk_bytes)) + 1


def parsable(paths: tuple[str, ...], root: str) -> Iterator[Document]:
    """Those files that are UTF-8 and Python."""
    for path in map(Path, paths):
        try:
            text = path.read_bytes().decode()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ast.parse(text)
        except (ValueError, SyntaxError):
            continue
        yield Document(text, key=path.relative_to(root).as_posix())


def grammar_source() -> Source:
    """One stationary stream of 10 letters per split: a random walk on a ring with four unequal steps.

    Its transition matrix is doubly stochastic, so a letter alone has entropy ln 10 and each further one the entropy h
    of the step; a window of L letters has exactly H_L = ln 10 + (L - 1) h nats.
    """
    rate = -sum(p * math.log(p) for p in GRAMMAR_STEP_PROBABILITY)
    description = {"name": "grammar", "seed": GRAMMAR_SEED, "symbols": len(GRAMMAR_SYMBOLS)}

    def chunks(chunk_bytes: int, cut: str | None) -> Iterator[Chunk]:
        for number, (split, length) in enumerate(GRAMMAR_LENGTH.items()):
            yield Chunk(grammar_stream, (split, length, number), length / sum(GRAMMAR_LENGTH.values()), 1)

    return Source(chunks, description, Floor(math.log(len(GRAMMAR_SYMBOLS)), rate), sorted(GRAMMAR_LENGTH.items()))


def grammar_stream(split: str, length: int, number: int) -> Iterator[Document]:
    """The whole split as one document."""
    yield Document(grammar_text(length, GRAMMAR_SEED, number), split=split, is_separated=False)


def grammar_text(length: int, seed: int, number: int) -> str:
    """`length` letters of stream `number`; the same seed gives the same text everywhere."""
    word = philox(seed, np.arange(length, dtype=np.int64), 0, number, int(Stream.SYNTHETIC))[0]
    limits = np.cumsum(GRAMMAR_STEP_PROBABILITY)[:-1] * 2.0**32
    steps = np.array(GRAMMAR_STEPS)[np.searchsorted(limits, word, side="right")]
    steps[0] = int(word[0]) * len(GRAMMAR_SYMBOLS) >> 32  # the first letter is uniform: stationary from the start
    states = np.cumsum(steps) % len(GRAMMAR_SYMBOLS)
    return np.frombuffer(GRAMMAR_SYMBOLS.encode(), dtype=np.uint8)[states].tobytes().decode()
