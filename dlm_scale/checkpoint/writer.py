"""Writing a checkpoint: every rank its own file, then one manifest, then one rename that makes it visible.

    plan_save      agree which rank writes which piece            (needs no values)
    stage          copy the values to the host                    (training must wait for this)
    write_staged   write, hash, fsync, manifest, rename, retention (training need not wait for this)

`gather(value)` returns the values of all ranks in rank order, on every rank. Every phase ends with one, so a failure
on any rank is known to all, and all raise.
"""
from __future__ import annotations

import errno
import logging
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, Mapping

from dlm_scale.checkpoint.files import FileRecord, fsync_folder, fsync_folders_above, write_file
from dlm_scale.checkpoint.folders import (checkpoint_name, checkpoints_folder, clean_leftovers, list_checkpoints, prune,
                                          replace_folder)
from dlm_scale.checkpoint.layout import DTYPES, Piece, PieceSpec, assign_owners, piece_spec
from dlm_scale.checkpoint.manifest import (FILE_NAME, MANIFEST_NAME, decode_tensors, describe_tensors, encode_manifest,
                                           rank_file_name)
from dlm_scale.checkpoint.safetensors_format import encode_header

if TYPE_CHECKING:
    import torch

Gather = Callable[[Any], list]
FREE_SPACE_FACTOR = 1.1


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved. Every rank raises it; earlier checkpoints and the training state are intact."""


@dataclass(frozen=True)
class Save:
    """What all phases of one save need; `write_checkpoint` explains the fields."""

    root: Path
    step: int
    rank: int
    world_size: int
    gather: Gather
    documents: Mapping[str, bytes]
    keep_last: int
    keep_every: int

    @property
    def final(self) -> Path:
        return checkpoints_folder(self.root) / checkpoint_name(self.step)


@dataclass(frozen=True)
class SavePlan:
    """`owners`: the writing rank of every piece of the world, sorted. `owned`: this rank's, in file order."""

    owners: dict[PieceSpec, int]
    owned: tuple[tuple[PieceSpec, torch.Tensor], ...]


def write_checkpoint(root: Path, step: int, pieces: Iterable[Piece], *, rank: int, world_size: int, gather: Gather,
                     documents: Mapping[str, bytes], keep_last: int, keep_every: int = 0) -> Path:
    """Save `pieces` and (rank 0's) `documents` as RUN/checkpoints/step_N and return that folder. Collective.

    `root` is the run folder. A piece that several ranks offer is written by one of them; values are copied to the
    host one piece at a time. Afterwards the last `keep_last` checkpoints stay, and every one whose step is a multiple
    of `keep_every` (0: none). Raises CheckpointError on every rank when any of them fails; then nothing of this save
    is visible, unless it was complete and only its durability could not be confirmed.
    """
    save = Save(Path(root), step, rank, world_size, gather, documents, keep_last, keep_every)
    plan = plan_save(save, pieces)
    return write_staged(save, plan, stage(plan))


def plan_save(save: Save, pieces: Iterable[Piece]) -> SavePlan:
    """Agree which rank writes which piece. Collective. Raises CheckpointError."""
    offered: dict[PieceSpec, torch.Tensor] = {}

    def list_offers() -> list[PieceSpec]:
        offered.update((piece_spec(piece), piece.tensor) for piece in pieces if piece.tensor.numel())
        return list(offered)

    owners = assign_owners(_agreed(save, "listing the tensors", list_offers))
    mine = [spec for spec, owner in owners.items() if owner == save.rank]
    mine.sort(key=lambda spec: -DTYPES[spec.dtype][1])  # wide dtypes first: all tensors of the file lie aligned
    return SavePlan(owners, tuple((spec, offered[spec]) for spec in mine))


def stage(plan: SavePlan) -> Iterator[torch.Tensor]:
    """Host copies of this rank's pieces, each made when it is asked for."""
    import torch

    for _, tensor in plan.owned:
        yield torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def write_staged(save: Save, plan: SavePlan, staged: Iterable[torch.Tensor]) -> Path:
    """Write what `stage(plan)` gives. Collective. Returns and raises as `write_checkpoint`."""
    def on_rank_0(work: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        return partial(work, *arguments) if save.rank == 0 else lambda: None

    try:
        tmp, tensors = _agreed(save, "preparing", on_rank_0(_prepare, save, plan))[0]
        records = _agreed(save, "writing", lambda: _write_pieces(save, plan, staged, tmp))
        files = {rank_file_name(rank): record for rank, record in enumerate(records) if record}
        _agreed(save, "completing", on_rank_0(_commit, save, tmp, files, tensors))
    except CheckpointError:
        if save.rank == 0:
            with suppress(OSError):
                clean_leftovers(save.final.parent)
        raise
    if save.rank == 0:
        _apply_retention(save)
    return save.final


def _agreed(save: Save, phase: str, work: Callable[[], Any]) -> list:
    """Do `work` on this rank; return its results of all ranks, or raise CheckpointError on all if it failed on any."""
    cause = None
    try:
        outcome = (work(), None)
    except Exception as error:  # whatever it is, the other ranks wait in gather and must hear of it
        outcome, cause = (None, f"rank {save.rank}: {type(error).__name__}: {error}"), error
    outcomes = save.gather(outcome)
    failures = [failure for _, failure in outcomes if failure]
    if failures:
        raise CheckpointError(f"checkpoint {save.final} not saved, {phase}: {'; '.join(failures[:8])} ({len(failures)}"
                              f" of {save.world_size} ranks failed). Earlier checkpoints are untouched") from cause
    return [value for value, _ in outcomes]


def _prepare(save: Save, plan: SavePlan) -> tuple[Path, list[dict]]:
    """Check what can be checked before a byte is written; make the temporary folder."""
    bad_names = [name for name in save.documents if not FILE_NAME.fullmatch(name) or name == MANIFEST_NAME]
    if bad_names or save.keep_last < 1 or save.keep_every < 0:
        raise ValueError(f"documents {bad_names}, keep_last={save.keep_last} or keep_every={save.keep_every} not valid")
    tensors = describe_tensors(plan.owners)
    decode_tensors(tensors, save.world_size)
    folder = save.final.parent
    folder.mkdir(parents=True, exist_ok=True)
    if not list_checkpoints(save.root):  # whoever made the folders may not have waited for the disk
        fsync_folders_above(folder)
    clean_leftovers(folder)
    needed = FREE_SPACE_FACTOR * (sum(spec.num_bytes for spec in plan.owners) + sum(map(len, save.documents.values())))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.3f} GB needed, {free / 1e9:.3f} GB free in {folder}: free some"
                                    f" space, or keep fewer checkpoints")
    tmp = folder / f"{save.final.name}.tmp-{secrets.token_hex(4)}"
    tmp.mkdir()
    return tmp, tensors


def _write_pieces(save: Save, plan: SavePlan, staged: Iterable[torch.Tensor], tmp: Path) -> FileRecord | None:
    if not plan.owned:
        return None
    header = encode_header([(spec.key, spec.dtype, spec.numel) for spec, _ in plan.owned],
                           {"step": str(save.step), "rank": str(save.rank)})
    return write_file(tmp / rank_file_name(save.rank), chain([header], map(_raw_bytes, staged)))


def _raw_bytes(tensor: torch.Tensor) -> Any:
    import torch

    return tensor.view(torch.uint8).numpy()


def _commit(save: Save, tmp: Path, files: dict[str, FileRecord], tensors: list[dict]) -> None:
    documents = {name: write_file(tmp / name, [data]) for name, data in save.documents.items()}
    manifest = encode_manifest(save.step, save.world_size, {**files, **documents}, tensors)
    write_file(tmp / MANIFEST_NAME, [manifest])
    fsync_folder(tmp)
    replace_folder(tmp, save.final)
    fsync_folder(save.final.parent)


def _apply_retention(save: Save) -> None:
    """The checkpoint is safe by now: a deletion that fails costs space and is said, not raised."""
    try:
        clean_leftovers(save.final.parent)
        prune(save.final.parent, save.step, save.keep_last, save.keep_every)
    except OSError as error:
        logging.getLogger(__name__).warning("old checkpoints in %s not deleted: %s", save.final.parent, error)
