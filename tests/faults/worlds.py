"""A checkpoint of one layout read at another: the canonical one (one rank, ZeRO 0) to every other and back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from dlm_scale.checkpoint.reader import open_checkpoint, weights_hash
from tests.engine.cases import Case, data_of, import_distributed, logical_weights, start_noisy, train_lines
from tests.faults.figures import Figure, figure
from tests.forked import run_ranks

CANONICAL = Case(0, 1, 1)
BEFORE, TOLERANCE, SECONDS = 3, 1e-5, 600.0
LAYOUTS = tuple(itertools.product((1, 2), (1, 2, 4)))  # (tensor, data)
STAGES = (0, 1, 2, 3)


def _continued(cases: list[Case], starts: list[Path | None], folder: Path, steps: int) -> list[dict[str, Any]]:
    """In one process group: each case from its checkpoint (None: from noise); hashes and lines, and a checkpoint after
    all steps but the last."""
    from dlm_scale.engine.build import build_trainer
    from dlm_scale.engine.runtime import start_runtime
    from dlm_scale.engine.saving import restore, save

    runtime, found = start_runtime("cpu", cases[0].tensor), []
    for case, start in zip(cases, starts, strict=True):
        config = case.config(train__ema_decay=0.9)
        data = data_of(config)
        trainer = build_trainer(config, runtime, data.vocabulary)
        state = restore(trainer, open_checkpoint(start)) if start else start_noisy(trainer)
        before = _hash(trainer)
        lines, state = train_lines(trainer, data, state, steps - 1)
        saved = save(trainer, state, folder / str(case), {}, data.fingerprint)
        after = _hash(trainer)
        last, _ = train_lines(trainer, data, state, 1)
        found.append({"before": before, "after": after, "lines": lines + last, "checkpoint": saved})
    return found


def _hash(trainer: Any) -> str:
    return weights_hash(sorted((name, torch.from_numpy(values)) for name, values in logical_weights(trainer).items()))


def _group(cases: list[Case], starts: list[Path | None], folder: Path, steps: int) -> list[dict[str, Any]]:
    return run_ranks(cases[0].tensor * cases[0].data, _continued, cases, starts, folder, steps, seconds=SECONDS)[0]


def world_changes(folder: Path, layouts: Iterable[tuple[int, int]] = LAYOUTS) -> Figure:
    """Each layout at each ZeRO stage: continued from the canonical checkpoint, and the canonical one from it."""
    import_distributed()
    whole = _group([CANONICAL], [None], folder / "whole", BEFORE + 3)[0]
    first = _group([CANONICAL], [None], folder / "first", BEFORE + 1)[0]
    outcomes = []
    for tensor, data in layouts:
        cases = [Case(stage, tensor, data) for stage in STAGES]
        there = _group(cases, [first["checkpoint"]] * len(cases), folder / "there", 2)
        back = _group([CANONICAL] * len(cases), [found["checkpoint"] for found in there], folder / f"{tensor}-{data}", 2)
        outcomes += list(_compared(cases, there, back, first, whole["lines"]))
    return figure(outcomes)


def _compared(cases: list[Case], there: list[dict], back: list[dict], first: dict, whole: list) -> Iterator[str | None]:
    for case, gone, returned in zip(cases, there, back, strict=True):
        problems = [
            gone["before"] != first["after"] and "other weights after reading",
            returned["before"] != gone["after"] and "other weights after reading back",
            weights_hash(open_checkpoint(gone["checkpoint"])) != gone["after"] and "other weights in the file",
            _other(gone["lines"], whole[BEFORE:BEFORE + 2]),
            _other(returned["lines"], whole[BEFORE + 1:BEFORE + 3]),
        ]
        found = [problem for problem in problems if problem]
        yield f"{case}: {'; '.join(found)}" if found else None


def _other(lines: list[dict], wanted: list[dict]) -> str | None:
    for one, other in zip(lines, wanted, strict=True):
        if one["hash"] != other["hash"]:
            return "another batch"
        if abs(one["loss"] - other["loss"]) > TOLERANCE:
            return f"loss {one['loss']!r}, not {other['loss']!r}"
    return None
