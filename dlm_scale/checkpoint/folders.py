"""The checkpoints of a run folder: which there are, which is the newest good one, which may go. Needs no torch.

    RUN/checkpoints/step_00001000                the checkpoint; it appears by one rename, complete
                    step_00001000.tmp-0123abcd   being written, or left by an attempt that died
                    step_00001000.old-0123abcd   an earlier one of the same step, while it is being replaced
                    .trash-0123abcd              being deleted
"""
from __future__ import annotations

import os
import re
import secrets
import shutil
from itertools import chain
from pathlib import Path
from typing import Any, Callable, Iterable

from dlm_scale.checkpoint.manifest import MANIFEST_NAME, Manifest, check_file, read_manifest
from dlm_scale.errors import UsageError

TRASH = ".trash-"
Inspect = Callable[[Path], tuple[Manifest | None, list[str]]]
VISIBLE = re.compile(r"step_(\d{8,15})(\.old-[0-9a-f]{8})?")


def checkpoints_folder(run: Path) -> Path:
    return Path(run) / "checkpoints"


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest step first, good or bad; none when the run has not saved yet."""
    folder = checkpoints_folder(run)
    names = os.listdir(folder) if folder.is_dir() else []
    found = [(int(match[1]), match[2] is None, name) for name in names if (match := VISIBLE.fullmatch(name))]
    return [folder / name for _, _, name in sorted(found)]


def inspect_checkpoint(folder: Path, *, with_tensors: bool = True, share: tuple[int, int] = (0, 1)) \
        -> tuple[Manifest | None, list[str]]:
    """The manifest of a checkpoint folder, and a line for everything that is wrong with it; no line: it is good.

    Of share (k, n) the contents of every n-th file from the k-th on are hashed; without `with_tensors` those of the
    small documents alone. Sizes are checked of all.
    """
    try:
        manifest = read_manifest(folder)
    except UsageError as error:
        return None, [str(error)]
    problems = []
    for number, name in enumerate(sorted(manifest.files)):
        try:
            is_hashed = number % share[1] == share[0] and (with_tensors or name not in manifest.keys_by_file)
            check_file(folder, manifest, name, with_hash=is_hashed)
        except UsageError as error:
            problems.append(str(error))
    if len(problems) > 1:  # rarely all at once by themselves
        problems.append(f"or {MANIFEST_NAME} is another checkpoint's")
    return manifest, problems


def inspect_together(rank: int, world_size: int, gather: Callable[[Any], list]) -> Inspect:
    """As `inspect_checkpoint`, but each rank hashes a share of the files, and all get all lines. Collective.

    `gather(value)` gives the values of all ranks in rank order.
    """
    def inspect(folder: Path) -> tuple[Manifest | None, list[str]]:
        manifest, problems = inspect_checkpoint(folder, share=(rank, world_size))
        found = gather((folder.name, problems))
        if {name for name, _ in found} != {folder.name}:
            raise UsageError(f"the ranks see different checkpoints in {folder.parent} ({found[0][0]}, {folder.name}): the"
                             " file system lags behind, or another job writes there; start again")
        return manifest, list(dict.fromkeys(chain.from_iterable(lines for _, lines in found)))

    return inspect


def find_checkpoint(path: Path, inspect: Inspect = inspect_checkpoint) -> tuple[Path, list[str]]:
    """The checkpoint to use for `path`, a run folder or one checkpoint folder, every file of it hashed by `inspect`.

    Returns its folder, and for a run folder a message for each newer checkpoint that was skipped and why.
    Raises UsageError when there is no good one.
    """
    path = Path(path)
    candidates = resolve_checkpoints(path)
    messages = []
    for candidate in reversed(candidates):
        _, problems = inspect(candidate)
        if not problems:
            return candidate, messages
        messages.append(f"checkpoint {candidate} is damaged: {'; '.join(problems)}")
    raise UsageError(f"no good checkpoint in {path}. " + ". ".join(messages)
                     + ". Restore the files from a copy, or name another checkpoint")


def resolve_checkpoints(path: Path) -> list[Path]:
    """The checkpoint folders that `path` names, oldest first. Raises UsageError when there is none."""
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder: give a run folder or a checkpoint folder in it")
    if checkpoints_folder(path).is_dir():
        found = list_checkpoints(path)
        if not found:
            raise UsageError(f"{path} has no checkpoint yet: let the run reach train.save_every, or name another run")
        return found
    if not (path / MANIFEST_NAME).exists():
        raise UsageError(f"{path} has no {MANIFEST_NAME} and no checkpoints folder: give a run or checkpoint folder")
    return [path]


def replace_folder(tmp: Path, final: Path) -> None:
    """Make the complete folder `tmp` visible as `final` durably. At every moment one of old and new is visible."""
    if final.exists():
        os.rename(final, final.with_name(f"{final.name}.old-{secrets.token_hex(4)}"))
    os.rename(tmp, final)


def clean_leftovers(folder: Path) -> None:
    """Remove what saves that died or failed have left, and put back a checkpoint that was being replaced."""
    names = set(os.listdir(folder))
    for name in sorted(names):
        final, is_old, _ = name.partition(".old-")
        if is_old and final not in names:
            os.rename(folder / name, folder / final)
            names.add(final)
        elif is_old:
            _delete(folder / name)
        elif ".tmp-" in name or name.startswith(TRASH):
            shutil.rmtree(folder / name, ignore_errors=True)


def prune(folder: Path, step: int, keep_last: int, keep_every: int) -> None:
    """Delete checkpoints of earlier steps: all but the last `keep_last` and each `keep_every`-th step (0: none).

    `step` is that just written. Later steps, left by a run that was wound back, are not touched.
    """
    steps = {int(match[1]) for name in os.listdir(folder) if (match := VISIBLE.fullmatch(name)) and not match[2]}
    for old in sorted(steps - retained_steps(steps, step, keep_last, keep_every)):
        _delete(folder / checkpoint_name(old))


def _delete(path: Path) -> None:
    """Delete a visible folder; renamed first, so that it is never visible in part."""
    trash = path.with_name(f"{TRASH}{secrets.token_hex(4)}")
    os.rename(path, trash)
    shutil.rmtree(trash)


def retained_steps(steps: Iterable[int], step: int, keep_last: int, keep_every: int) -> set[int]:
    """Which of `steps` to keep when `step` has just been written."""
    past = sorted(old for old in steps if old <= step)
    every = {old for old in past if keep_every and old % keep_every == 0}
    return {step} | every | set(past[-keep_last:]) | {old for old in steps if old > step}
