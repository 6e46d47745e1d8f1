"""What `dlm prepare` reads: files, folders and globs, cut into chunks that any process can read; built-in corpora."""

from __future__ import annotations

import glob
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dlm_scale.data.corpora import grammar_source, stdlib_source
from dlm_scale.data.documents import Chunk, Document, Hashes, Source, given
from dlm_scale.data.files import open_regular, parse_json, read_regular
from dlm_scale.data.hub import RECIPES, HubOptions, document_of, hub_source, recipe_source
from dlm_scale.data.optional import import_optional
from dlm_scale.data.tokenizer import CUTS
from dlm_scale.errors import UsageError

MAX_LINE_BYTES = 256 << 20
ZST_CHUNK_BYTES = 2048  # at most 64 MB come out of so little: 4 bytes can stand for a block of 128 KB
BLOCK_BYTES = 1 << 20
MAX_FILES_A_CHUNK = 4096

TRAIN_HALF, VAL_HALF = (Hashes(0, b"train"), "train"), (Hashes(0, b"val"), "val")  # of one document

BUILT_IN: dict[str, Callable[[], Source]] = {"stdlib": stdlib_source, "grammar": grammar_source}


def open_source(spec: str | Sequence[str], text_key: str = "text", hub: HubOptions = HubOptions()) -> Source:
    """The documents that SOURCE names: built-in corpus, recipe, `hf:NAME[:CONFIG[:SPLIT]]`, or files, folders, globs.

    A text file is one document; a row of JSON Lines or Parquet is one, its text under `text_key`. Raises UsageError.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    name = specs[0] if len(specs) == 1 else ""
    if name in RECIPES:
        return recipe_source(name, text_key, hub)
    if name.startswith("hf:"):
        return hub_source(name, text_key, hub)
    if hub.folder:
        raise UsageError(f"--from stands for the files of a recipe ({', '.join(RECIPES)}) or hf:NAME, not of {specs}")
    return BUILT_IN[name]() if name in BUILT_IN else _file_source(specs, text_key)


def _file_source(specs: list[str], text_key: str) -> Source:
    files = [path for spec in specs for path in _matching_files(spec)]
    sizes = [path.stat().st_size for path in files]
    names = "\n".join(f"{path.name} {size}" for path, size in zip(files, sizes, strict=True))
    description = {"name": " ".join(specs), "files": len(files), "files_xxh3": xxhash.xxh3_64_hexdigest(names.encode())}
    identity = [(str(path.absolute()), path.stat().st_mtime_ns) for path in files]
    text_bytes = sum(size for path, size in zip(files, sizes, strict=True) if _splitter(path) is None)

    def chunks(chunk_bytes: int, cut: str | None) -> Iterator[Chunk]:
        return _file_chunks(list(zip(files, sizes, strict=True)), text_key, chunk_bytes, cut)

    return Source(chunks, description, identity=identity, text_bytes=text_bytes)


def _matching_files(spec: str) -> list[Path]:
    path = Path(spec).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith((*TEXT_SUFFIXES, *SPLITTERS)))
        what = f"holds no {', '.join((*TEXT_SUFFIXES, *SPLITTERS))} files"
    else:
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        known = ", ".join((*BUILT_IN, *RECIPES))
        what = f"is no file, folder, pattern that matches a file, built-in corpus or recipe ({known})"
    if not found:
        raise UsageError(f"SOURCE {spec!r} {what}")
    return found


def _splitter(path: Path) -> Callable[..., Iterator[Chunk]] | None:
    """How a file of rows becomes chunks; None for a text file."""
    return next((splitter for suffix, splitter in SPLITTERS.items() if path.name.endswith(suffix)), None)


def _file_chunks(
    files: list[tuple[Path, int]], text_key: str, chunk_bytes: int, cut: str | None
) -> Iterator[Chunk]:
    """Small text files share a chunk, large files make several."""
    whole = max(1, sum(size for _, size in files))
    waiting: list[tuple[Path, int]] = []

    def together() -> Iterator[Chunk]:
        if waiting:
            paths, sizes = zip(*waiting, strict=True)
            yield Chunk(read_texts, (paths,), sum(sizes) / whole, sum(size > 0 for size in sizes))
            waiting.clear()

    for path, size in files:
        splitter = _splitter(path)
        if splitter is None and (size <= chunk_bytes or cut is None):
            waiting.append((path, size))
            if sum(s for _, s in waiting) >= chunk_bytes or len(waiting) == MAX_FILES_A_CHUNK:
                yield from together()
        else:
            yield from together()
            made = splitter(path, text_key, chunk_bytes) if splitter else _pieces(path, chunk_bytes, cut)
            yield from (chunk._replace(share=chunk.share * size / whole) for chunk in made)
    yield from together()


# text files


def read_texts(paths: tuple[Path, ...]) -> Iterator[Document]:
    """Each file as one document."""
    for path in paths:
        yield Document(_decoded(read_regular(path), path, 0))


def _decoded(raw: bytes, path: Path, start: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        where = f"byte {start + error.start} is {raw[error.start]:#04x}"
        raise UsageError(f"{path} is not UTF-8 text: {where}") from error


def _pieces(path: Path, chunk_bytes: int, cut: str) -> Iterator[Chunk]:
    """One document, in pieces of about `chunk_bytes`."""
    return _stretch(path, 0, path.stat().st_size, chunk_bytes, cut, _hashes_of_file(path), None)


def _stretch(path, start: int, stop: int, chunk_bytes: int, cut: str, hashes: Hashes, split: str | None):
    wanted = range(start + chunk_bytes, stop, chunk_bytes)
    borders = sorted({start, *(min(safe_cut(path, at, cut), stop) for at in wanted), stop})
    for first, last in itertools.pairwise(borders):
        args = (path, first, last, hashes, last == stop, split)
        yield Chunk(read_piece, args, (last - first) / path.stat().st_size, int(first == start))


def read_piece(
    path: Path, start: int, stop: int, hashes: Hashes, is_end: bool, split: str | None
) -> Iterator[Document]:
    """Bytes [start, stop) of a file, as a piece of the document with these hashes."""
    with open_regular(path) as file:
        file.seek(start)
        text = _decoded(file.read(stop - start), path, start)
    yield Document(text, split=split, is_separated=split is None, is_end=is_end, hashes=hashes)


def safe_cut(path: Path, at: int, cut: str) -> int:
    """The first place from byte `at` + 4 on where the document may be cut, else its end; it depends on nothing else."""
    with open_regular(path) as file:
        file.seek(at)
        window = b""
        while block := file.read(max(BLOCK_BYTES, len(window))):
            window += block
            if found := CUTS[cut].search(window, 4):
                return at + found.end()
        return file.tell()


def _hashes_of_file(path: Path) -> Hashes:
    key, content = xxhash.xxh3_64(), xxhash.xxh3_128()
    with open_regular(path) as file:
        for block in iter(lambda: file.read(BLOCK_BYTES), b""):
            key.update(block)
            content.update(block)
    return Hashes(key.intdigest(), content.digest())


def halves(chunk: Chunk, val_fraction: float, chunk_bytes: int, cut: str | None) -> list[Chunk]:
    """Chunks of the only document of a source, whose beginning is `chunk`: cut at a character, train first."""
    if chunk.read is read_piece:
        path = chunk.args[0]
        size, at = path.stat().st_size, _byte_of_share(path, 1 - val_fraction)
        parts = [_stretch(path, start, stop, chunk_bytes, cut, hashes, split)
                 for start, stop, hashes, split in ((0, at, *TRAIN_HALF), (at, size, *VAL_HALF))]  # fmt: skip
        return [chunk for part in parts for chunk in part]
    whole = next(chunk.documents())
    at = int(len(whole.text if whole.ids is None else whole.ids) * (1 - val_fraction))
    parts = [
        whole._replace(text=whole.text[part], split=split, is_separated=False, hashes=hashes)
        if whole.ids is None
        else whole._replace(ids=whole.ids[part], split=split, hashes=hashes)
        for part, (hashes, split) in ((slice(at), TRAIN_HALF), (slice(at, None), VAL_HALF))
    ]
    return [Chunk(given, (tuple(parts),), 1.0)]


def _byte_of_share(path: Path, share: float) -> int:
    """The byte at which so large a share of a file's characters ends."""
    starts = [0]
    with open_regular(path) as file:
        for block in iter(lambda: file.read(BLOCK_BYTES), b""):
            starts.append(starts[-1] + np.count_nonzero(_begins_character(block)))
        wanted = int(starts[-1] * share)
        number = int(np.searchsorted(starts, wanted, side="right")) - 1
        file.seek(number * BLOCK_BYTES)
        begins = np.flatnonzero(_begins_character(file.read(BLOCK_BYTES)))
    return number * BLOCK_BYTES + int(begins[wanted - starts[number]])


def _begins_character(block: bytes) -> np.ndarray:
    return (np.frombuffer(block, dtype=np.uint8) & 0xC0) != 0x80


# JSON Lines


def _jsonl_chunks(path: Path, text_key: str, chunk_bytes: int) -> Iterator[Chunk]:
    size = path.stat().st_size
    for start in range(0, size, chunk_bytes):
        stop = min(start + chunk_bytes, size)
        yield Chunk(read_jsonl, (path, start, stop, text_key), (stop - start) / size)


def read_jsonl(path: Path, start: int, stop: int, text_key: str) -> Iterator[Document]:
    """The lines that begin in bytes [start, stop)."""
    with open_regular(path) as file:
        if start:
            file.seek(start - 1)
            while (line := file.readline(MAX_LINE_BYTES + 1)) and not line.endswith(b"\n"):
                pass
        at = file.tell()
        while at < stop and (line := file.readline(MAX_LINE_BYTES + 1)):
            yield from _of_line(line, text_key, lambda: f"{path}:{_line_number(path, at)}")
            at += len(line)


def _line_number(path: Path, offset: int) -> int:
    with open_regular(path) as file:
        return 1 + sum(file.read(min(BLOCK_BYTES, offset - at)).count(b"\n") for at in range(0, offset, BLOCK_BYTES))


def _of_line(line: bytes | bytearray, text_key: str, where: Callable[[], str]) -> Iterator[Document]:
    _require_short(line, where)
    if line.strip():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = parse_json(line, f"{where()}:", "not a line of JSON")
        yield document_of(row, text_key, where)


def _require_short(line: bytes | bytearray, where: Callable[[], str]) -> None:
    if len(line) > MAX_LINE_BYTES:
        raise UsageError(f"{where()}: a line of more than {MAX_LINE_BYTES >> 20} MiB. Cut the document up")


def _zst_chunks(path: Path, text_key: str, chunk_bytes: int) -> Iterator[Chunk]:
    """Only one process can unpack a file: it hands on its lines."""
    zstandard = import_optional("zstandard", str(path))
    batch, size, first, read = [], 0, 1, 0
    try:
        for number, (line, position) in enumerate(_zst_lines(path, zstandard.ZstdDecompressor()), 1):
            _require_short(line, lambda: f"{path}:{number}")
            batch.append(bytes(line))
            size += len(line)
            if size >= chunk_bytes:
                share = (position - read) / path.stat().st_size
                yield Chunk(read_lines, (path, first, tuple(batch), text_key), share)
                batch, size, first, read = [], 0, number + 1, position
    except zstandard.ZstdError as error:
        raise UsageError(f"{path} is not a Zstandard file: {error}") from error
    yield Chunk(read_lines, (path, first, tuple(batch), text_key), 1 - read / max(1, path.stat().st_size))


def read_lines(path: Path, first: int, lines: Iterable[bytes], text_key: str) -> Iterator[Document]:
    """Lines of JSON, the first of which has that number in the file."""
    for number, line in enumerate(lines, first):
        yield from _of_line(line, text_key, lambda: f"{path}:{number}")


def _zst_lines(path: Path, decompressor: Any) -> Iterator[tuple[bytearray, int]]:
    """(line, bytes read) of one or more frames; the library's own reader takes a file cut short for a whole one."""
    frame, line, is_inside = decompressor.decompressobj(), bytearray(), False
    with open_regular(path) as file:
        for chunk in iter(lambda: file.read(ZST_CHUNK_BYTES), b""):
            while chunk:
                first, *more = frame.decompress(chunk).split(b"\n")
                line += first
                for following in more:
                    yield line, file.tell()
                    line = bytearray(following)
                if len(line) > MAX_LINE_BYTES:
                    yield line, file.tell()  # to be refused
                    return
                is_inside, chunk = not frame.eof, frame.unused_data
                frame = frame if is_inside else decompressor.decompressobj()
    if is_inside:
        raise UsageError(f"{path} is cut short: its last Zstandard frame has no end. Copy it again")
    yield line, os.path.getsize(path)


# Parquet


def _parquet_chunks(path: Path, text_key: str, chunk_bytes: int) -> Iterator[Chunk]:
    with _parquet(path) as table:
        names = table.schema_arrow.names
        if text_key not in names:
            raise UsageError(f"{path} has no column {text_key!r}; give --text_key, one of: {', '.join(names)}")
        metadata = table.metadata
        columns = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path.split(".")[0] == text_key]
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        sizes = [sum(group.column(i).total_uncompressed_size for i in columns) for group in groups]
    first = size = 0
    for number, of_group in enumerate(sizes, 1):
        size += of_group
        if size >= chunk_bytes or number == len(sizes):
            yield Chunk(read_parquet, (path, first, number, text_key), size / max(1, sum(sizes)))
            first, size = number, 0


def read_parquet(path: Path, first: int, stop: int, text_key: str) -> Iterator[Document]:
    """The rows of row groups [first, stop)."""
    with _parquet(path) as table:
        rows = table.iter_batches(
            batch_size=1024, row_groups=range(first, stop), columns=[text_key], use_threads=False
        )
        for batch in rows:
            yield from (document_of(row, text_key, lambda: str(path)) for row in batch.to_pylist())


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """The open file; what pyarrow finds wrong with it becomes UsageError."""
    parquet, pyarrow = (import_optional(name, str(path)) for name in ("pyarrow.parquet", "pyarrow"))
    try:
        with parquet.ParquetFile(path, buffer_size=BLOCK_BYTES, pre_buffer=False) as file:
            yield file
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path} is not a readable Parquet file: {error}") from error


TEXT_SUFFIXES = (".txt", ".md")
SPLITTERS: dict[str, Callable[[Path, str, int], Iterator[Chunk]]] = {
    ".jsonl": _jsonl_chunks,
    ".jsonl.zst": _zst_chunks,
    ".parquet": _parquet_chunks,
}
