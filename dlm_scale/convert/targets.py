"""What a model can become: a Hugging Face folder of ours or of another family, a checkpoint at any layout, one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
import xxhash

from dlm_scale.checkpoint.files import FileRecord
from dlm_scale.checkpoint.layout import PieceSpec, full_box, volume
from dlm_scale.checkpoint.manifest import MANIFEST_NAME, describe_tensors, encode_manifest, rank_file_name
from dlm_scale.convert.bundle import ENTRY_POINTS, bundle_files
from dlm_scale.convert.card import model_card
from dlm_scale.convert.families import FAMILIES
from dlm_scale.convert.mapping import Match, match_tensors
from dlm_scale.convert.source import ORIGINAL, Model, has_rows, own_rows, resized_rows
from dlm_scale.convert.stores import INDEX_NAME, SINGLE_NAME, Store
from dlm_scale.convert.tokenizers import tokenizer_files
from dlm_scale.convert.writing import Entry, split_shards, write_target
from dlm_scale.errors import UsageError
from dlm_scale.model.parameters import EXTRA_HEADS, ParameterSpec
from dlm_scale.model.sharding import Box, local_boxes
from dlm_scale.parallel.layers import padded_rows

HF_METADATA = {"format": "pt"}
Say = Callable[[str], None]


def write_hf(model: Model, target: Path, *, dtype: str, slot: str, family: str, max_shard_bytes: int, say: Say) -> None:
    """A folder for `from_pretrained`: of our own class with all that it needs (family dlm_scale), or of another's."""
    if model.shape.labels or model.shape.score:
        head = "labels" if model.shape.labels else "score"
        raise UsageError(f"{model.path} is no language model (its head is model.{head}): a Hugging Face folder is one; "
                         "convert it --to safetensors or --to dlm")
    own = family == "dlm_scale"
    entries = hf_entries(model, family, dtype, slot)
    if dropped := [] if own else [name for name in model.table if name.startswith(EXTRA_HEADS)]:
        say(f"left out, for {family} has no place for them: {', '.join(dropped)}")
    shards = split_shards(entries, max_shard_bytes)
    names = (
        [SINGLE_NAME]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    files = {"config.json": _json(hf_config(model, family, dtype))} | tokenizer_files(model)
    if own:
        files |= bundle_files() | {"README.md": model_card(model, slot)}
        files |= {f"{ORIGINAL}/{name}": data for name, data in model.documents.items()}
    if len(shards) > 1:
        weight_map = {entry.key: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        total = sum(entry.num_bytes for entry in entries)
        files[INDEX_NAME] = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
    identity = f"{model.identity} {slot} {family}"
    write_target(target, dict(zip(names, shards, strict=True)), lambda records: files, identity, HF_METADATA, say)


def hf_entries(model: Model, family: str, dtype: str, slot: str) -> list[Entry]:
    """The tensors of a model under the names of a family; another's without the heads beside the output table. Raises
    UsageError where it has no place for one."""
    table, rows = model.table, own_rows(model.table)
    if family != "dlm_scale":
        table = {name: spec for name, spec in table.items() if not name.startswith(EXTRA_HEADS)}
        rows = FAMILIES[family].rows
    matches = match_tensors(rows, table, model.shape.num_layers)
    read = partial(_read_theirs, model, slot=slot)
    extra, dropped = FAMILIES[family].unfold(model.shape) if FAMILIES[family].unfold else ({}, ())
    by_name = {match.theirs: match for match in matches}

    def rows_of(match: Match) -> tuple[int, ...]:
        """A table of another family has a row for every id, the mask's too."""
        is_short = family != "dlm_scale" and has_rows(model.table[match.ours])
        return (model.meta.vocab_size, *match.shape[1:]) if is_short else match.shape

    torch_dtype = getattr(torch, dtype)
    entries = [Entry(match.theirs, rows_of(match), dtype, partial(read, match, rows_of(match), torch_dtype))
               for match in matches if match.theirs not in dropped]  # fmt: skip
    return entries + [
        Entry(name, folded.shape, dtype, lambda folded=folded: folded.make(
            lambda part: read(by_name[part], by_name[part].shape, torch.float64)).to(torch_dtype))
        for name, folded in extra.items()
    ]  # fmt: skip


def _read_theirs(model: Model, match: Match, shape: tuple[int, ...], dtype: torch.dtype, *, slot: str) -> torch.Tensor:
    """A tensor of another program's model, out of ours."""
    whole = full_box(model.table[match.ours].view)
    if match.boxes == (whole,):
        values = model.read(match.ours, slot, None, dtype)
    else:
        values = torch.cat([model.read(match.ours, slot, box, dtype).view(-1) for box in match.boxes])
    if match.is_transposed:
        return values.view(shape[::-1]).T.contiguous()
    return (
        resized_rows(values.view(-1, *shape[1:]), shape[0])
        if values.numel() != volume(full_box(shape))
        else values.view(shape)
    )


def hf_config(model: Model, family: str, dtype: str) -> dict:
    """config.json."""
    sizes = dict.fromkeys(FAMILIES[family].sizes, model.meta.vocab_size)
    common = {"model_type": family, "dtype": dtype, "mask_token_id": model.meta.mask_id, **sizes}
    if model.meta.eos_id is not None:
        common["eos_token_id"] = model.meta.eos_id
    if family != "dlm_scale":
        kind = "Dream" if family == "dream" else family
        return FAMILIES[family].config_of(model.shape) | common | {"model_type": kind}
    shape = model.shape.model_dump(mode="json", exclude={"init_from"})
    return common | shape | ENTRY_POINTS | {"suppressed_ids": list(model.meta.suppressed_ids)}


def write_file_target(model: Model, target: Path, *, dtype: str, slot: str, say: Say) -> None:
    """One .safetensors file with our own names."""
    entries = [_entry(model, spec, slot, dtype) for spec in model.table.values()]
    _write_single(entries, target, f"{model.identity} {slot}", _metadata(model, slot), say)


def write_store_target(store: Store, target: Path, *, dtype: str, say: Say) -> None:
    """One .safetensors file with the names of a DeepSpeed checkpoint; names of tied weights stand in its metadata."""
    entries = []
    for name, stored in store.tensors.items():
        kept = dtype if stored.dtype.startswith(("float", "bfloat")) else stored.dtype
        entries.append(Entry(name, stored.shape, kept, partial(store.read, name, getattr(torch, kept))))
    _write_single(entries, target, str(store.path), {"format": "pt", "aliases": json.dumps(store.aliases)}, say)


def _write_single(entries: list[Entry], target: Path, identity: str, metadata: dict[str, str], say: Say) -> None:
    if target.suffix != ".safetensors":
        raise UsageError(f"{target}: the destination of --to safetensors is one file, NAME.safetensors")
    write_target(target, {target.name: entries}, lambda records: {}, identity, metadata, say, is_file=True)


def _entry(model: Model, spec: ParameterSpec, slot: str, dtype: str) -> Entry:
    return Entry(spec.name, spec.shape, dtype, partial(model.read, spec.name, slot, None, getattr(torch, dtype)))


def _metadata(model: Model, slot: str) -> dict[str, str]:
    shape = json.dumps(model.shape.model_dump(mode="json"))
    return {"format": "pt", "model": shape, "vocabulary": json.dumps(model.meta.tokenizer_dict()), "weights": slot}


def write_checkpoint_target(
    model: Model, target: Path, *, slot: str | None, ranks: int, tensor_size: int, say: Say
) -> None:
    """A checkpoint folder as `ranks` ranks would have written it, `tensor_size` of them to a model.

    slot None: everything that there is, optimizer included; else only those weights, as `param`.
    """
    _check_layout(model, ranks, tensor_size)
    slots = {name: name for name in model.slots} if slot is None else {"param": slot}
    owners: dict[PieceSpec, int] = {}
    shards: dict[str, list[Entry]] = {}
    for spec, piece_slot, rank, box, start, numel in _pieces(model, slots, ranks, tensor_size):
        piece = PieceSpec(spec.name, piece_slot, spec.shape, spec.view, "float32", box, start, numel)
        owners[piece] = rank
        read = partial(_read_piece, model, slots[piece_slot], piece)
        shards.setdefault(rank_file_name(rank), []).append(Entry(piece.key, (numel,), "float32", read))
    owners = dict(sorted(owners.items()))
    step = json.loads(model.documents["state.json"]).get("step", 0)

    def files(records: dict) -> Mapping[str, bytes]:
        documents = dict(model.documents)
        own = records | {name: _record(data) for name, data in documents.items()}
        return documents | {MANIFEST_NAME: encode_manifest(step, ranks, own, describe_tensors(owners))}

    identity = f"{model.identity} {slot} {ranks} {tensor_size}"
    write_target(target, shards, files, identity, {"step": str(step)}, say)


def _pieces(model: Model, slots: Mapping[str, str], ranks: int, tensor_size: int) -> Iterator[tuple]:
    """(spec, slot, rank, box, start, numel): each tensor-parallel rank's boxes, shared out over the data-parallel."""
    data_size = ranks // tensor_size
    for spec in model.table.values():
        rows = padded_rows(spec.shape[0], tensor_size) // tensor_size if spec.is_table else spec.shape[0]
        for tensor_rank in range(tensor_size):
            for item in local_boxes(spec, tensor_rank, tensor_size, rows):
                if not item.is_counted or not item.numel:
                    continue
                share = -(-item.numel // data_size)
                for data_rank in range(data_size):
                    start, stop = share * data_rank, min(item.numel, share * (data_rank + 1))
                    for slot in slots if start < stop else ():
                        yield spec, slot, data_rank * tensor_size + tensor_rank, item.box, start, stop - start


def _read_piece(model: Model, slot: str, piece: PieceSpec) -> torch.Tensor:
    """A piece, out of as little of its box as whole rows of the first dimensions allow."""
    first, box = _covering(piece.box, piece.flat_start, piece.numel)
    values = model.read(piece.name, slot, box, torch.float32).reshape(-1)
    offset = piece.flat_start - first
    return values[offset : offset + piece.numel]


def _covering(box: Box, start: int, numel: int) -> tuple[int, Box]:
    """(elements before it, box): the fewest slices of the first dimension that hold a flat range of a box."""
    inner = volume(box[1:])
    low, high = start // inner, -(-(start + numel) // inner)
    return low * inner, ((box[0][0] + low, box[0][0] + high), *box[1:])


def _check_layout(model: Model, ranks: int, tensor_size: int) -> None:
    shape = model.shape
    uneven = [name for name in ("num_heads", "ffn_size") if getattr(shape, name) % tensor_size]
    if shape.num_kv_heads % tensor_size and tensor_size % shape.num_kv_heads:
        uneven.append("num_kv_heads")
    if ranks < 1 or tensor_size < 1 or ranks % tensor_size or uneven:
        cause = (
            f"model.{uneven[0]} = {getattr(shape, uneven[0])} does not divide by it"
            if uneven
            else f"--ranks is {ranks}"
        )
        raise UsageError(f"--tensor_parallel_size {tensor_size}: {cause}; --ranks must be a multiple of it")


def _record(data: bytes) -> FileRecord:
    return FileRecord(len(data), xxhash.xxh3_128_hexdigest(data))


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
