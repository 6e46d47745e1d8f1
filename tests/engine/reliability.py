"""Training processes that may be killed, stopped or broken: forked ranks with their exit codes."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (once, before any fork; so is the next)

import dlm_scale.engine.session  # noqa: F401
from dlm_scale import cli
from tests.forked import free_port

CANARY = "canary-7d1f4c0e"  # stands in the environment of every rank; nothing of a run folder may hold it
SECONDS = 60.0


class Ranks:
    """`dlm train` in forked ranks; `change(rank)` runs in each of them first. Kills what is left at the end."""

    def __init__(self, world_size: int, argv: list[str], change: Callable[[int], None] = lambda rank: None):
        context, port = multiprocessing.get_context("fork"), free_port()
        self.processes = [context.Process(target=_train, args=(rank, world_size, port, argv, change), daemon=True)
                          for rank in range(world_size)]

    def __enter__(self) -> Ranks:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_exception) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def kill(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def exit_codes(self, *ranks: int) -> list[int]:
        """Of all ranks, or of these; a rank that does not end in time is an error."""
        chosen = [self.processes[rank] for rank in ranks] or self.processes
        deadline = time.monotonic() + SECONDS
        for process in chosen:
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode is not None, f"{process} does not end"
        return [process.exitcode for process in chosen]


def _train(rank: int, world_size: int, port: int, argv: list[str], change: Callable[[int], None]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1",
                      LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      WANDB_API_KEY=CANARY, HF_TOKEN=CANARY)
    change(rank)
    code = 1
    try:
        code = cli.main(["train", *argv])
    finally:
        os._exit(code)


def arguments(config_file: Path, out: Path, *overrides: str) -> list[str]:
    return [str(config_file), f"train.out={out}", "train.device=cpu", *overrides]


def train(config_file: Path, out: Path, *overrides: str, ranks: int = 1, change=lambda rank: None) -> list[int]:
    """The exit codes of a run that is left alone."""
    with Ranks(ranks, arguments(config_file, out, *overrides), change) as running:
        return running.exit_codes()


def status(out: Path) -> dict[str, Any]:
    return json.loads((out / "status.json").read_text())


def wait_for(is_true: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_true():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.005)


def wait_for_step(out: Path, step: int) -> None:
    """Until metrics.jsonl has the line of `step`."""
    path = out / "metrics.jsonl"
    wait_for(lambda: path.exists() and f'{{"step": {step}, "tokens"' in path.read_text(), f"step {step} of {out}")


def on_step(step: int, act: Callable[[], Any]) -> None:
    """In this process, call `act` when the forward pass of the step after `step` finished ones begins."""
    from dlm_scale.engine import loop

    train_step = loop.train_step

    def changed(trainer, batch, state, *hooks):
        if state.step == step:
            act()
        return train_step(trainer, batch, state, *hooks)

    loop.train_step = changed


def break_losses(steps: range | set[int], value: float = float("nan")) -> None:
    """In this process, multiply the losses of these steps (1-based) by `value`."""
    from dlm_scale.engine import loop, step

    objective, train_step, place = step.loss_of, loop.train_step, {}

    def remembering(trainer, batch, state, *hooks):
        place["step"] = state.step + 1
        return train_step(trainer, batch, state, *hooks)

    def broken(*args):
        loss_sum, stats = objective(*args)
        return loss_sum * (value if place["step"] in steps else 1.0), stats

    loop.train_step, step.loss_of = remembering, broken


def assert_no_secret(out: Path) -> None:
    for path in out.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path
