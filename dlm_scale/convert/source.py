"""Whatever can be converted, opened as a model of ours: its shape, its vocabulary, and its tensors one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dlm_scale.checkpoint.files import read_file
from dlm_scale.checkpoint.folders import find_checkpoint
from dlm_scale.checkpoint.layout import Box, extents, full_box, relative_slices
from dlm_scale.checkpoint.manifest import MANIFEST_NAME
from dlm_scale.checkpoint.reader import Checkpoint, open_checkpoint
from dlm_scale.config import Config, ModelConfig, config_from_dict, config_from_text, dump_config
from dlm_scale.convert.deepspeed import deepspeed_store, is_deepspeed
from dlm_scale.convert.families import FAMILIES, Family, family_of
from dlm_scale.convert.folding import Folded
from dlm_scale.convert.mapping import Match, Row, check_store, match_tensors, read_ours
from dlm_scale.convert.stores import INDEX_NAME, SINGLE_NAME, Store, Stored, read_json_file, safetensors_store
from dlm_scale.convert.torch_files import read_torch_file
from dlm_scale.data.meta import TOKENIZER_DOCUMENT, TokenizerFiles, TokenizerMeta, load_meta, parse
from dlm_scale.data.tokenizer import HF_FILE, make_tokenizer
from dlm_scale.data.vocabulary import Vocabulary
from dlm_scale.errors import UsageError
from dlm_scale.model.parameters import ParameterSpec, parameter_table

ORIGINAL = "original"  # folder of an export that holds the documents of the checkpoint it came from
BIN_NAME = "pytorch_model.bin"
MAX_DOCUMENT_BYTES = 64 << 20


@dataclass(frozen=True)
class Model:
    """A model in our terms. `read(name, slot, box, dtype)` gives a box of a logical tensor, by default the whole of it.

    `documents` are the small files that make a checkpoint self-contained. `notes` say what was decided on the way,
    `mapping` where each tensor comes from. `identity` changes when the source does.
    """

    path: Path
    family: str
    config: Config
    meta: TokenizerMeta
    table: dict[str, ParameterSpec]
    slots: tuple[str, ...]
    read: Callable[[str, str, Box | None, torch.dtype], torch.Tensor]
    documents: dict[str, bytes]
    identity: str
    notes: tuple[str, ...] = ()
    mapping: tuple[str, ...] = ()

    @property
    def shape(self) -> ModelConfig:
        return self.config.model


def open_model(path: Path, config_path: Path | None = None, mask_id: int | None = None) -> Model:
    """Open a run or checkpoint of ours, a Hugging Face folder, or a DeepSpeed checkpoint with `config_path`, the
    config.json or our YAML that it was trained with. Raises UsageError."""
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{path} does not exist: give a run, a checkpoint, or a Hugging Face folder")
    if (path / MANIFEST_NAME).exists() or (path / "checkpoints").is_dir():
        return _checkpoint_model(path)
    if is_deepspeed(path):
        if config_path is None:
            raise UsageError(f"{path} is DeepSpeed's and does not say what model it is of: add --config CONFIG, the"
                             " config.json or our YAML that it was trained with, or convert it --to safetensors")  # fmt: skip
        store = deepspeed_store(path)
        return (
            _yaml_model(store, config_path)
            if config_path.suffix != ".json"
            else _foreign_model(store, config_path, mask_id)
        )
    if not (path / "config.json").is_file():
        raise UsageError(f"{path} is neither a run nor a checkpoint of ours, no Hugging Face folder (it has no"
                         " config.json) and no DeepSpeed checkpoint")  # fmt: skip
    return _foreign_model(_weights(path), path / "config.json", mask_id)


def _checkpoint_model(path: Path) -> Model:
    folder, _ = find_checkpoint(path)
    checkpoint = open_checkpoint(folder, verify=False)  # hashed just now
    config = config_from_text(checkpoint.document("config.yaml").decode(), f"{folder}/config.yaml")
    if config.objective.kind == "gaussian":
        raise UsageError(f"{folder} is of objective.kind=gaussian, which no other format carries: sample it with dlm sample")
    meta = _meta(checkpoint.document(TOKENIZER_DOCUMENT), f"{folder}/{TOKENIZER_DOCUMENT}")
    names = [name for name in checkpoint.manifest.files if not name.startswith("rank_")]
    documents = {name: checkpoint.document(name) for name in names}
    identity = json.dumps(sorted(checkpoint.manifest.files.items()))
    table = parameter_table(config.model, meta.vocabulary)
    slots = tuple(sorted({slot for _, slot in checkpoint.tensors}))
    _check_checkpoint(checkpoint, table, slots)

    def read(name: str, slot: str, box: Box | None, dtype: torch.dtype) -> torch.Tensor:
        return checkpoint.read(name, slot, box, dtype=dtype, view=table[name].view if box else None)

    return Model(folder, "checkpoint", config, meta, table, slots, read, documents, identity)


def _check_checkpoint(checkpoint: Checkpoint, table: dict[str, ParameterSpec], slots: tuple[str, ...]) -> None:
    stored = {key: tuple(tensor.shape) for key, tensor in checkpoint.tensors.items() if key[1] in ("param", "ema")}
    wanted = {(name, slot): spec.shape for slot in {"param", "ema"} & set(slots) for name, spec in table.items()}
    if stored != wanted:
        wrong = sorted(key for key in {*stored, *wanted} if stored.get(key) != wanted.get(key))[0]
        raise UsageError(
            f"{checkpoint.path}: tensor {wrong[0]} ({wrong[1]}) does not fit its config.yaml: take another checkpoint"
        )


def _weights(path: Path) -> Store:
    """The tensors of a Hugging Face folder."""
    if (path / BIN_NAME).is_file() and not ((path / SINGLE_NAME).exists() or (path / INDEX_NAME).exists()):
        tensors = read_torch_file(path / BIN_NAME)
        if not isinstance(tensors, dict) or not all(isinstance(value, Stored) for value in tensors.values()):
            raise UsageError(f"{path / BIN_NAME}: holds more than tensors by name")
        return Store(path, tensors)
    return safetensors_store(path)


def _foreign_model(store: Store, config_path: Path, mask_id: int | None) -> Model:
    values, where = read_json_file(config_path), str(config_path)
    name = family_of(values, where)
    family, folder = FAMILIES[name], config_path.parent
    if name == "dlm_scale":
        return _own_model(store, values, folder)
    shape = family.shape_of(values, where)
    vocabulary, meta, files, notes = _vocabulary(family, values, folder, mask_id)
    config = plain_config(shape, str(store.path))
    table = parameter_table(config.model, vocabulary)
    rows = _rows_as_named(family.rows, store)
    matches = match_tensors(rows, table, config.model.num_layers)
    folds = family.fold(store, values) if family.fold else {}
    _check_foreign(store, matches, folds, family, table, where)
    documents = _documents(config, meta, files, where)
    notes = (*notes, *_row_notes(store, matches, table))
    return _model(store, name, config, meta, table, matches, documents, notes, folds)


def _own_model(store: Store, values: Mapping[str, Any], folder: Path) -> Model:
    """An export of ours, with what it remembers of its checkpoint if that still fits."""
    shape = {key: values[key] for key in ModelConfig.model_fields if key in values}
    vocabulary = Vocabulary(values["vocab_size"], values["mask_token_id"], tuple(values.get("suppressed_ids", ())))
    documents = _original_documents(folder)
    config = (
        config_from_text(documents["config.yaml"].decode(), f"{folder}/{ORIGINAL}/config.yaml") if documents else None
    )
    meta = _meta(documents[TOKENIZER_DOCUMENT], f"{folder}/{ORIGINAL}") if documents else _no_tokenizer(vocabulary)
    if config is None or meta.vocabulary != vocabulary or config.model.model_dump(include=set(shape)) != shape:
        config, meta = plain_config(shape, str(folder)), _no_tokenizer(vocabulary)
        documents = _documents(config, meta, {}, str(folder))
    table = parameter_table(config.model, vocabulary)
    matches = match_tensors(own_rows(table), table, config.model.num_layers)
    check_store(store, matches, (), str(folder))
    return _model(store, "dlm_scale", config, meta, table, matches, documents)


def _yaml_model(store: Store, config_path: Path) -> Model:
    """Our own model under DeepSpeed's checkpointing: tables are padded there."""
    config = config_from_text(read_file(config_path, MAX_DOCUMENT_BYTES).decode(), str(config_path))
    if config.data.is_synthetic:
        size = config.data.synthetic_vocab_size
        meta, files = _no_tokenizer(Vocabulary(size, size - 1)), {}
    else:
        prefix = Path(config.data.train[0].path)
        whole, _ = load_meta(prefix)
        meta = _meta(json.dumps(whole.tokenizer_dict()).encode(), str(prefix))
        files = {name: read_file(prefix.parent / name, MAX_DOCUMENT_BYTES) for name in meta.tokenizer.files}
    table = parameter_table(config.model, meta.vocabulary)
    matches = match_tensors([(name, name, "same") for name in table], table, config.model.num_layers)
    _check_foreign(store, matches, {}, Family(), table, str(config_path))
    return _model(store, "deepspeed", config, meta, table, matches, _documents(config, meta, files, str(store.path)))


def own_rows(table: dict[str, ParameterSpec]) -> list[Row]:
    """The names of hub.modeling.DlmScaleForMaskedLM."""
    return [(name, f"transformer.{name}", "same") for name in table]


def _model(store, family, config, meta, table, matches, documents, notes=(), folds={}) -> Model:
    by_name: dict[str, list[Match]] = {}
    for match in matches:
        by_name.setdefault(match.ours, []).append(match)
    folded = _FoldedStore(store, folds)

    def read(name: str, slot: str, box: Box | None, dtype: torch.dtype) -> torch.Tensor:
        spec = table[name]
        stored = folded.shape(by_name[name][0].theirs)
        if has_rows(spec) and stored[0] != spec.shape[0]:
            whole = resized_rows(folded.read(by_name[name][0].theirs, dtype), spec.shape[0])
        else:
            whole = read_ours(folded, by_name[name], spec, dtype)
        if box is None:
            return whole
        return whole.view(spec.view)[relative_slices(box, full_box(spec.view))].reshape(extents(box))

    lines = tuple(f"{m.ours} <- {m.theirs} {list(m.shape)}{' (transposed)' * m.is_transposed}" for m in matches)
    files = {str(run.path): _stamp(run.path) for stored in store.tensors.values() for run in stored.runs}
    identity = json.dumps(sorted(files.items()))
    return Model(store.path, family, config, meta, table, ("param",), read, documents, identity, tuple(notes), lines)


@dataclass(frozen=True)
class _FoldedStore:
    """A store in which some tensors are made of others."""

    store: Store
    folds: dict[str, Folded] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.folds[name].shape if name in self.folds else _stored(self.store, name).shape

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        if name not in self.folds:
            return self.store.read(name, dtype)
        return self.folds[name].make(lambda part: self.store.read(part, torch.float64)).to(dtype)


def _stored(store: Store, name: str) -> Stored:
    return store.tensors[store.aliases.get(name, name)]


def _check_foreign(store: Store, matches: list[Match], folds: dict, family: Family, table: dict, where: str) -> None:
    """As check_store, but tables may have other rows, and what is folded counts for what it is made of."""
    expected = []
    for match in matches:
        if match.theirs in folds:
            continue
        stored, spec = store.tensors.get(store.aliases.get(match.theirs, match.theirs)), table[match.ours]
        if stored is not None and has_rows(spec) and len(stored.shape) == len(match.shape):
            match = replace(match, shape=(stored.shape[0], *match.shape[1:]))
        expected.append(match)
    parts = {part for fold in folds.values() for part in fold.parts}
    missing = sorted(parts - store.tensors.keys())
    if missing:
        raise UsageError(f"{where}: tensor {missing[0]} is missing ({len(missing)} are)")
    tied = {theirs for ours, theirs, _ in family.rows if ours == "head.weight" and ours not in table}
    ignored = {n for n in store.tensors if n in tied | parts or any(re.fullmatch(p, n) for p in family.ignored)}
    check_store(store, expected, ignored, where)


def has_rows(spec: ParameterSpec) -> bool:
    """Whether its first dimension counts ids of the vocabulary."""
    return spec.is_table or spec.name == "head.bias"


def resized_rows(values: torch.Tensor, rows: int) -> torch.Tensor:
    """The first `rows` rows; rows that are new are the mean of those that there are."""
    if rows <= len(values):
        return values[:rows].contiguous()
    out = values.new_empty(rows, *values.shape[1:])
    out[: len(values)] = values
    out[len(values) :] = values.float().mean(0).to(values.dtype)
    return out


def _row_notes(store: Store, matches: list[Match], table: dict[str, ParameterSpec]) -> list[str]:
    notes = []
    for match in matches:
        if has_rows(table[match.ours]):
            have, want = _stored(store, match.theirs).shape[0], table[match.ours].shape[0]
            if want > have:
                notes.append(f"{match.ours}: {have} rows, and {want - have} new (the mean of the others)")
            elif want < have:
                notes.append(
                    f"{match.ours}: {want} of {have} rows (the rest are no ids of the tokenizer, or the mask's)"
                )
    return notes


def _rows_as_named(rows: tuple[Row, ...], store: Store) -> tuple[Row, ...]:
    """Some folders leave out the first part of all names (GPT-2's own)."""
    first, _, rest = rows[0][1].partition(".")
    if rows[0][1] in store.tensors or rest not in store.tensors:
        return rows
    return tuple(
        (ours, " ".join(name.removeprefix(f"{first}.") for name in theirs.split()), how) for ours, theirs, how in rows
    )


def _vocabulary(family: Family, config: Mapping[str, Any], folder: Path, mask_id: int | None):
    """(vocabulary, meta, tokenizer files, notes): from the folder's tokenizer, or from config.json or `mask_id`."""
    size = config.get("vocab_size")
    if type(size) is not int or size < 2:
        raise UsageError(f"{folder}/config.json: vocab_size is {size!r}")
    if mask_id is None and (folder / HF_FILE).is_file():
        tokenizer = make_tokenizer(str(folder))
        return tokenizer.vocabulary, tokenizer.meta, dict(tokenizer.files), ()
    found = config.get("mask_token_id") if mask_id is None else mask_id
    if found is None and family.mask is None:
        raise UsageError(f"{folder} has no tokenizer.json that would name the mask: add --mask_id ID")
    if found is None:
        found, size = (size - 1, size) if family.mask == "last" else (size, size + 1)
    vocabulary = Vocabulary(max(size, found + 1), found)
    return vocabulary, _no_tokenizer(vocabulary), {}, (f"no tokenizer: the mask is id {found}",)


def _no_tokenizer(vocabulary: Vocabulary) -> TokenizerMeta:
    none = TokenizerFiles("none", (), "")
    return TokenizerMeta(none, vocabulary.size, vocabulary.mask_id, vocabulary.suppressed_ids, None)


def _meta(data: bytes, where: str) -> TokenizerMeta:
    return parse(TokenizerMeta, json.loads(data), where)


def plain_config(shape: Mapping[str, Any], origin: str) -> Config:
    """A config around a shape that came without one: what training it needs is for its next config to say."""
    raw = {
        "model": dict(shape), "data": {"train": f"converted from {origin}"},
        "train": {"global_batch_size": 1, "micro_batch_size": 1, "num_steps": 1, "precision": "fp32",
                  "out": "converted"},
        "optimizer": {"learning_rate": 1e-4},
    }  # fmt: skip
    return config_from_dict(raw, origin)


def _documents(config: Config, meta: TokenizerMeta, files: dict[str, bytes], origin: str) -> dict[str, bytes]:
    state = {"step": 0, "samples": 0, "tokens": 0, "data_fingerprint": "converted"}
    made = {
        "config.yaml": dump_config(config).encode(),
        TOKENIZER_DOCUMENT: json.dumps(meta.tokenizer_dict(), indent=1).encode(),
        "state.json": json.dumps(state).encode(),
        "provenance.json": json.dumps({"converted_from": origin}).encode(),
    }
    return made | files


def _original_documents(folder: Path) -> dict[str, bytes]:
    source = folder / ORIGINAL
    if not (source / "config.yaml").is_file():
        return {}
    return {path.name: read_file(path, MAX_DOCUMENT_BYTES) for path in sorted(source.iterdir())}


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
