"""The formats of the output: JSON Lines, or Parquet where the name ends so."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from dlm_scale.sampling.journal import sync_folder, write_atomic

_ROWS_OF_A_GROUP = 1024


def write_jsonl(path: Path, lines: Iterator[bytes]) -> None:
    """One object a line. Raises OSError."""
    write_atomic(path, (line + b"\n" for line in lines))


def write_parquet(path: Path, lines: Iterator[bytes]) -> None:
    """Columns id (text), sample, text, tokens, nfe; written by groups of rows. Raises OSError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("id", pa.string()), ("sample", pa.int64()), ("text", pa.string()),
                        ("tokens", pa.list_(pa.int32())), ("nfe", pa.int32())])  # fmt: skip
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with pq.ParquetWriter(beside, schema) as writer:
            while rows := [json.loads(line) for line in itertools.islice(lines, _ROWS_OF_A_GROUP)]:
                rows = [row | {"id": str(row["id"])} for row in rows]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def writer_of(path: Path) -> Callable[[Path, Iterator[bytes]], None]:
    return write_parquet if path.suffix == ".parquet" else write_jsonl
