"""meta.json: everything about a dataset that its .bin/.idx pairs do not say, strictly read."""

from __future__ import annotations

import json
import types
import typing
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from dlm_scale.data.files import parse_json, read_regular
from dlm_scale.data.indexed import token_dtype
from dlm_scale.data.vocabulary import Vocabulary
from dlm_scale.errors import UsageError

FORMAT_VERSION = 1
BLOCK_BYTES = 64 << 20
META_NAME = "meta.json"
TOKENIZER_DOCUMENT = "tokenizer_meta.json"  # TokenizerMeta.tokenizer_dict() inside a checkpoint


@dataclass(frozen=True)
class TokenizerFiles:
    """`kind` of tokenizer (`none` for synthetic tokens), the files it needs, and the hash over both."""

    kind: str
    files: tuple[str, ...]
    hash: str


@dataclass(frozen=True)
class TokenizerMeta:
    """The part that a checkpoint keeps too: enough, with the files beside it, to rebuild the tokenizer."""

    tokenizer: TokenizerFiles
    vocab_size: int
    mask_id: int
    suppressed_ids: tuple[int, ...]
    eos_id: int | None

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.vocab_size, self.mask_id, self.suppressed_ids)

    def tokenizer_dict(self) -> dict[str, Any]:
        """These five keys as plain data, to be kept in a checkpoint and given to `load_tokenizer`."""
        whole = json.loads(json.dumps(asdict(self)))
        return {field.name: whole[field.name] for field in fields(TokenizerMeta)}


@dataclass(frozen=True)
class SplitMeta:
    """One .bin/.idx pair. `bytes` are UTF-8 bytes of its text, `unigram_entropy` nats per token, `bin_xxh3` 64-bit
    hashes per 64 MiB of the .bin."""

    tokens: int
    documents: int
    bytes: int
    max_id: int
    unigram_entropy: float
    bin_bytes: int
    bin_xxh3: tuple[str, ...]
    idx_xxh3: str


@dataclass(frozen=True)
class Floor:
    """Exact entropy of the source, nats per token: `first` of one token alone, `rate` of each further one."""

    first: float
    rate: float

    def per_token(self, seq_len: int) -> float:
        """H_L / L of a window of L tokens: no model's NELBO can be below it."""
        return (self.first + (seq_len - 1) * self.rate) / seq_len


@dataclass(frozen=True)
class DatasetMeta(TokenizerMeta):
    """The whole meta.json."""

    format_version: int
    splits: dict[str, SplitMeta]
    source: dict[str, Any]
    floor: Floor | None

    @property
    def is_chat(self) -> bool:
        """Whether each document is an answer with its past."""
        return bool(self.source.get("chat"))

    @property
    def end_id(self) -> int:
        """The token that ends an answer of conversations. Raises UsageError."""
        found = self.source.get("end_id")
        if type(found) is not int or not 0 <= found < self.vocab_size or found == self.mask_id:
            raise UsageError(f"{META_NAME}: source: end_id {found!r} is no token that could end an answer. Prepare the "
                             "conversations again")  # fmt: skip
        return found

    def content(self, split: str) -> dict[str, Any]:
        """What identifies the tokens of a split, wherever it lies: the base of a run's data fingerprint."""
        past = {"prompts": self.source.get("prompts_xxh3")} if self.is_chat else {}
        return {**self.tokenizer_dict(), "split": asdict(self.splits[split])} | past


def load_meta(prefix: str | Path) -> tuple[DatasetMeta, str]:
    """(meta, split name) of the dataset prefix D/train, from D/meta.json. Raises UsageError naming file and key."""
    prefix = Path(prefix)
    path = prefix.parent / META_NAME
    meta = read_meta(path)
    if prefix.name not in meta.splits:
        raise UsageError(f"{path} has no split {prefix.name!r}; it has: {', '.join(sorted(meta.splits))}")
    return meta, prefix.name


def read_meta(path: Path) -> DatasetMeta:
    """Read and check one meta.json."""
    try:
        content = read_regular(path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}. A dataset is what `dlm prepare ... --out DIR` writes") from error
    raw = parse_json(content, str(path), "is not JSON", ". Prepare the dataset again")
    if isinstance(raw, dict) and raw.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise UsageError(f"{path}: format_version {raw['format_version']} is not {FORMAT_VERSION}: prepare it again")
    meta = parse(DatasetMeta, raw, str(path))
    _check_values(meta, str(path))
    return meta


def write_meta(meta: DatasetMeta, path: Path) -> None:
    """Write meta.json as stable, readable JSON."""
    path.write_text(json.dumps(asdict(meta), indent=1, sort_keys=True) + "\n")


def parse(kind: Any, value: Any, where: str) -> Any:
    """`value` (from JSON) as the annotated type `kind`; UsageError names the path of keys that does not fit."""
    if is_dataclass(kind):
        return _parse_dataclass(kind, value, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else parse(args[0], value, where)
    if origin is tuple:
        return tuple(parse(args[0], v, f"{where}[{i}]") for i, v in enumerate(_expect(list, value, where)))
    if origin is dict:
        return {k: parse(args[1], v, f"{where}: {k}") for k, v in _expect(dict, value, where).items()}
    return value if kind is Any else _expect(kind, value, where)


def _parse_dataclass(kind: Any, value: Any, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    given = set(_expect(dict, value, where))
    if given != set(hints):
        missing, unknown = sorted(set(hints) - given), sorted(given - set(hints))
        fault = f"key {missing[0]!r} is missing" if missing else f"unknown key {unknown[0]!r}"
        raise UsageError(f"{where}: {fault}")
    return kind(**{name: parse(hint, value[name], f"{where}: {name}") for name, hint in hints.items()})


def _expect(kind: Any, value: Any, where: str) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UsageError(f"{where}: expected {kind.__name__}, found {json.dumps(value)[:60]}")
    return value


def _check_values(meta: DatasetMeta, where: str) -> None:
    try:
        vocabulary = meta.vocabulary
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    if meta.eos_id is not None and (not 0 <= meta.eos_id < vocabulary.size or meta.eos_id == meta.mask_id):
        raise UsageError(f"{where}: eos_id {meta.eos_id} is outside the vocabulary or is the mask")
    for name in meta.tokenizer.files:
        if Path(name).name != name:
            raise UsageError(f"{where}: tokenizer: files: {name!r} is not a plain file name")
    for name, split in meta.splits.items():
        _check_split(split, vocabulary, f"{where}: splits: {name}")


def _check_split(split: SplitMeta, vocabulary: Vocabulary, where: str) -> None:
    faults = {
        "tokens": split.tokens < 1,
        "documents": not 1 <= split.documents <= split.tokens,
        "bytes": split.bytes < 0,
        "max_id": not 0 <= split.max_id < vocabulary.size or split.max_id == vocabulary.mask_id,
        "bin_bytes": split.bin_bytes != split.tokens * token_dtype(vocabulary.size).itemsize,
        "bin_xxh3": len(split.bin_xxh3) != -(-split.bin_bytes // BLOCK_BYTES),
    }
    for key, is_wrong in faults.items():
        if is_wrong:
            raise UsageError(f"{where}: {key} {getattr(split, key)!r} does not fit the rest. Prepare the dataset again")
