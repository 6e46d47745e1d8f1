"""What `dlm prepare` reads: files, folders, globs, built-in corpora, and datasets of the Hugging Face Hub."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from dlm_scale.data.corpora import Document, Source, grammar_source, stdlib_source
from dlm_scale.data.files import parse_json, read_regular
from dlm_scale.data.optional import import_optional
from dlm_scale.errors import UsageError

MAX_LINE_BYTES = 256 << 20
ZST_CHUNK_BYTES = 2048  # at most 64 MB come out of so little: 4 bytes can stand for a block of 128 KB

BUILT_IN: dict[str, Callable[[], Source]] = {"stdlib": stdlib_source, "grammar": grammar_source}


def open_source(spec: str | Sequence[str], text_key: str = "text") -> Source:
    """The documents that SOURCE names: a built-in corpus, `hf:NAME[:CONFIG[:SPLIT]]`, or files, folders, globs.

    A text file is one document; a row of JSON Lines or Parquet is one, its text under `text_key`. Raises UsageError.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    if len(specs) == 1 and specs[0] in BUILT_IN:
        return BUILT_IN[specs[0]]()
    if len(specs) == 1 and specs[0].startswith("hf:"):
        return _hub_source(specs[0], text_key)
    return _file_source(specs, text_key)


def _file_source(specs: list[str], text_key: str) -> Source:
    files = [path for spec in specs for path in _matching_files(spec)]
    names = "\n".join(f"{path.name} {path.stat().st_size}" for path in files)
    description = {"name": " ".join(specs), "files": len(files), "files_xxh3": xxhash.xxh3_64_hexdigest(names.encode())}

    def documents() -> Iterator[Document]:
        for path in files:
            for text in _reader(path)(path, text_key):
                yield Document(text)

    return Source(documents, description)


def _matching_files(spec: str) -> list[Path]:
    path = Path(spec).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(tuple(READERS)))
        what = f"holds no {', '.join(READERS)} files"
    else:
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        what = f"is no file, folder, pattern that matches a file, or built-in corpus ({', '.join(BUILT_IN)})"
    if not found:
        raise UsageError(f"SOURCE {spec!r} {what}")
    return found


def _reader(path: Path) -> Callable[[Path, str], Iterator[str]]:
    return next((reader for suffix, reader in READERS.items() if path.name.endswith(suffix)), _read_text)


def _read_text(path: Path, text_key: str) -> Iterator[str]:
    raw = read_regular(path)
    try:
        yield raw.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: byte {error.start} is {raw[error.start]:#04x}") from error


def _read_jsonl(path: Path, text_key: str) -> Iterator[str]:
    with open(path, "rb") as file:
        yield from _json_lines(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), path, text_key)


def _read_jsonl_zst(path: Path, text_key: str) -> Iterator[str]:
    zstandard = import_optional("zstandard", str(path))
    try:
        yield from _json_lines(_zst_lines(path, zstandard.ZstdDecompressor()), path, text_key)
    except zstandard.ZstdError as error:
        raise UsageError(f"{path} is not a Zstandard file: {error}") from error


def _zst_lines(path: Path, decompressor: Any) -> Iterator[bytearray]:
    """Lines of a file of one or more frames; the library's own reader takes a file cut short for a whole one."""
    frame, line, is_inside = decompressor.decompressobj(), bytearray(), False
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(ZST_CHUNK_BYTES), b""):
            while chunk:
                first, *more = frame.decompress(chunk).split(b"\n")
                line += first
                for following in more:
                    yield line
                    line = bytearray(following)
                if len(line) > MAX_LINE_BYTES:
                    yield line  # to be refused
                is_inside, chunk = not frame.eof, frame.unused_data
                frame = frame if is_inside else decompressor.decompressobj()
    if is_inside:
        raise UsageError(f"{path} is cut short: its last Zstandard frame has no end. Copy it again")
    yield line


def _json_lines(lines: Iterable[bytes | bytearray], path: Path, text_key: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_LINE_BYTES:
            raise UsageError(f"{path}:{number}: a line of more than {MAX_LINE_BYTES >> 20} MiB. Cut the document up")
        if line.strip():
            row = parse_json(line, f"{path}:{number}:", "not a line of JSON")
            yield _text_of(row, text_key, f"{path}:{number}")


def _read_parquet(path: Path, text_key: str) -> Iterator[str]:
    parquet, pyarrow = (import_optional(name, str(path)) for name in ("pyarrow.parquet", "pyarrow"))
    try:
        table = parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if text_key not in names:
            raise UsageError(f"{path} has no column {text_key!r}; give --text_key, one of: {', '.join(names)}")
        for batch in table.iter_batches(columns=[text_key]):
            yield from (_text_of(row, text_key, str(path)) for row in batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path} is not a readable Parquet file: {error}") from error


def _hub_source(spec: str, text_key: str) -> Source:
    name, config, split = (*spec[3:].split(":"), "", "")[:3]
    datasets = import_optional("datasets", spec)

    def documents() -> Iterator[Document]:
        try:
            rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
            for number, row in enumerate(rows):
                yield Document(_text_of(row, text_key, f"{spec} row {number}"))
        except UsageError:
            raise
        except Exception as error:  # whatever its many readers raise for files that they do not like
            raise UsageError(f"{spec}: `datasets` cannot open it: {type(error).__name__}: {error}") from error

    return Source(documents, {"name": spec})


def _text_of(row: Any, text_key: str, where: str) -> str:
    text = row.get(text_key) if isinstance(row, dict) else None
    if not isinstance(text, str):
        known = f"; give --text_key, one of: {', '.join(map(str, row))}" if isinstance(row, dict) else ""
        raise UsageError(f"{where}: no text under {text_key!r}{known}")
    # a lone surrogate is legal in JSON and in no encoding
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.zst": _read_jsonl_zst,
    ".parquet": _read_parquet,
}
