"""Ids that another program made, as a source: nanoGPT's .bin (bare uint16), datatrove's .ds and .ds.index."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dlm_scale.data.assemble import Choice
from dlm_scale.data.documents import Chunk, Document, Source
from dlm_scale.data.files import open_regular
from dlm_scale.data.meta import DatasetMeta
from dlm_scale.data.prepare import prepare_source
from dlm_scale.data.tokenizer import Tokenizer, make_tokenizer
from dlm_scale.errors import UsageError

CHUNK_TOKENS = 1 << 22


def import_ids(
    source: str | Path,
    tokenizer: str,
    out: str | Path,
    *,
    val_fraction: float = 0.1,
    workers: int = 0,
    overwrite: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> DatasetMeta:
    """The ids of `source`, made by `tokenizer`, as a dataset in `out`; they are not changed.

    source: a .bin of nanoGPT or a folder with train.bin and val.bin; a .ds of datatrove (its .ds.index beside it) or a
    folder of them. A document of a .bin ends at a separator. Where there is no validation, documents are split as
    `prepare` splits texts. Raises UsageError, naming the file, for what is not such ids.
    """
    if tokenizer == "char":
        raise UsageError("--tokenizer char: its ids depend on the text it was made from. Prepare that text instead")
    if not 0 < val_fraction < 1:
        raise UsageError(f"--val_fraction {val_fraction} must lie between 0 and 1")
    made, path = make_tokenizer(tokenizer), Path(source).expanduser()
    files = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.name.endswith((".bin", ".ds")))
    if not files or len({file.suffix for file in files}) > 1:
        raise UsageError(f"{path} is no .bin or .ds file, and no folder of either kind")
    stretches = [s for file in files for s in _stretches(file, made, chunk_tokens, _split_of(file, files))]
    total = sum(stop - start for _, _, start, stop, *_ in stretches)

    def chunks(chunk_bytes: int, cut: str | None) -> Iterator[Chunk]:
        for file, dtype, start, stop, ends, split in stretches:
            yield Chunk(read_ids, (file, dtype, start, stop, ends, split, tokenizer), (stop - start) / total)

    identity = [(str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    described = {"name": f"import {source}", "files": len(files)}
    return prepare_source(
        Source(chunks, described, identity=[identity, chunk_tokens]),
        tokenizer,
        out,
        Choice(val_fraction),
        workers=workers,
        overwrite=overwrite,
    )


def _split_of(file: Path, files: list[Path]) -> str | None:
    """nanoGPT's own split, where both are there."""
    is_split = file.stem in ("train", "val") and {"train.bin", "val.bin"} == {f.name for f in files}
    return file.stem if is_split else None


def _stretches(file: Path, made: Tokenizer, chunk_tokens: int, split: str | None) -> Iterator[tuple]:
    """(file, dtype, first token, end, ends of the documents or None, split) of whole documents each."""
    ends = _index_of(file) if file.suffix == ".ds" else None
    dtype, num_tokens = _shape_of(file, ends)
    borders = [0]
    while borders[-1] < num_tokens:
        borders.append(_border(file, dtype, min(borders[-1] + chunk_tokens, num_tokens), num_tokens, ends, made.eos_id))
    for start, stop in zip(borders, borders[1:]):
        inside = None if ends is None else ends[(ends > start) & (ends <= stop)]
        yield file, dtype.str, start, stop, inside, split


def _index_of(file: Path) -> np.ndarray:
    index = Path(f"{file}.index")
    try:
        with open_regular(index) as opened:
            raw = opened.read()
    except OSError as error:
        raise UsageError(f"{index}: {error.strerror}. It says where the documents of {file.name} end") from error
    ends = np.frombuffer(raw[: len(raw) // 8 * 8], dtype="<u8").astype(np.int64)
    if len(raw) % 8 or not len(ends) or ends[0] <= 0 or (np.diff(ends) <= 0).any():
        raise UsageError(f"{index}: its {len(raw)} bytes are not rising ends of documents. Copy it again")
    return ends


def _shape_of(file: Path, ends: np.ndarray | None) -> tuple[np.dtype, int]:
    """(type, number) of the ids."""
    with open_regular(file) as opened:
        size = opened.seek(0, 2)
    if not size:
        raise UsageError(f"{file} is empty")
    if ends is None:
        if size % 2:
            raise UsageError(f"{file}: {size} bytes are no whole number of uint16 ids. Copy it again")
        return np.dtype("<u2"), size // 2
    width, rest = divmod(size, int(ends[-1]))
    if rest or width not in (2, 4):
        raise UsageError(f"{file}: {size} bytes are not 2 or 4 for each of the {ends[-1]} tokens that its index counts")
    return np.dtype(f"<u{width}"), int(ends[-1])


def _border(file: Path, dtype: np.dtype, at: int, num_tokens: int, ends: np.ndarray | None, eos_id: int | None) -> int:
    """The end of the document that holds token `at` - 1."""
    if ends is not None:
        return int(ends[np.searchsorted(ends, at)])
    while eos_id is not None and at < num_tokens:
        ids = np.fromfile(file, dtype, CHUNK_TOKENS, offset=(at - 1) * dtype.itemsize)
        found = np.flatnonzero(ids == eos_id)
        if len(found):
            return at + int(found[0])
        at += len(ids)
    return num_tokens


def read_ids(
    file: Path, dtype: str, start: int, stop: int, ends: np.ndarray | None, split: str | None, tokenizer: str
) -> Iterator[Document]:
    """The documents of one stretch; UsageError names the first id that no text has."""
    made = _known_tokenizer(tokenizer)
    ids = np.fromfile(file, dtype, stop - start, offset=start * np.dtype(dtype).itemsize)
    bad = made.vocabulary.first_invalid(ids)
    if bad is not None:
        raise UsageError(f"{file}: token {start + bad} is id {ids[bad]}, which {tokenizer} gives no text"
                         f" (vocab_size {made.vocabulary.size}). Name the --tokenizer that made it")  # fmt: skip
    if ends is not None:
        inner = ends[:-1] - start
    else:
        inner = np.flatnonzero(ids[:-1] == made.eos_id) + 1 if made.eos_id is not None else np.array([], dtype=int)
    for one in np.split(ids, inner):
        has_end = made.eos_id is not None and one[-1] == made.eos_id
        yield Document(made.decode(one[:-1] if has_end else one), split=split, ids=one)


@functools.lru_cache(maxsize=1)
def _known_tokenizer(spec: str) -> Tokenizer:
    return make_tokenizer(spec)
