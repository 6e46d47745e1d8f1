"""One attempt at a run: its folder, its console, its status; the loop runs inside."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dlm_scale.checkpoint.reader import open_checkpoint, weights_hash
from dlm_scale.checkpoint.writer import CheckpointError
from dlm_scale.config import config_from_text, dump_config
from dlm_scale.config_compare import config_difference
from dlm_scale.engine.async_saving import Saver
from dlm_scale.engine.build import Trainer
from dlm_scale.engine.health import Health, TrainingFailed
from dlm_scale.engine.lock import RunLock
from dlm_scale.engine.loop import Outcome, train_loop
from dlm_scale.engine.memory import is_out_of_memory, memory_advice
from dlm_scale.engine.run_folder import (
    Metrics,
    open_log,
    provenance,
    read_metrics,
    read_status,
    write_atomically,
    write_status,
)
from dlm_scale.engine.runtime import Runtime
from dlm_scale.engine.saving import all_gather_object, describe_save, tokenizer_documents
from dlm_scale.engine.signals import Control, StopRequest
from dlm_scale.engine.state import TrainState
from dlm_scale.engine.tracking import open_tracker
from dlm_scale.engine.watchdog import Watchdog
from dlm_scale.errors import UsageError
from dlm_scale.plots import draw_curves

LAST_SAVE_SECONDS = 30.0  # that a save in flight is given when the run has failed


class RunFailed(RuntimeError):
    """The run ended before its end; that has been said, and stands in status.json. `code` is the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Session:
    """Owns train.out on rank 0; on the other ranks it only has a log file. Raises UsageError on every rank where
    another job has the folder. Collective."""

    def __init__(self, config: Any, runtime: Runtime, data: Any):
        self.config, self.runtime, self.vocabulary, self.signals = config, runtime, data.vocabulary, StopRequest()
        self.out, world = Path(config.train.out), runtime.env.world_size
        # Agreement and saving have groups of their own: neither waits for the device, nor meets the other's messages.
        self.control_group, self.saving_group = (dist.new_group(backend="gloo") if world > 1 else None for _ in "ab")
        self.lock = self._take_lock()
        self.log = open_log(self.out, runtime.env.rank)
        self.watch = Watchdog(self.out, runtime.env.rank, world, config.train.hang_timeout_seconds, self._hung,
                              **_device_clock(runtime.device))
        self.documents = tokenizer_documents(data) | {"config.yaml": dump_config(config).encode()}
        self.fingerprint = data.fingerprint
        self.console = Console(config.train.num_steps)
        self.metrics = self.saver = self.track = None
        if runtime.is_first:
            write_atomically(self.out / "config.yaml", self.documents["config.yaml"])
            self.track = open_tracker(config.train.wandb, self.out, config.model_dump())

    def _take_lock(self) -> RunLock | None:
        lock, refusal = None, None
        if self.runtime.is_first:
            try:
                lock = RunLock(self.out)
                self.attempt = _previous_attempts(self.out) + 1
                write_status(self.out, {"status": "running", "attempt": self.attempt})
            except UsageError as error:
                refusal = str(error)
        refusals = self._gather(refusal)
        if refusals[0]:
            raise UsageError(refusals[0])
        return lock

    def _gather(self, value: Any, group: Any = None) -> list[Any]:
        """`value` of all ranks, over the control group unless another is given."""
        return [value] if self.control_group is None else all_gather_object(value, group or self.control_group)

    def run(self, trainer: Trainer, data: Any, validation: Any, state: TrainState, checkpoint: Any) -> None:
        """Run the loop; write status.json, curves and the last line that says where everything lies."""
        self.documents["provenance.json"] = (json.dumps(provenance(), indent=1) + "\n").encode()
        own = checkpoint if checkpoint and checkpoint.path.parent == self.out / "checkpoints" else None
        self.log.info(self._first_line(trainer, state, checkpoint))
        if self.runtime.is_first:
            self.metrics = Metrics(self.out / "metrics.jsonl", state.step)
            if checkpoint and not own:
                self._record_branch(state, checkpoint)
        self._status("running", state, own.path if own else None)
        self.saver = self._open_saver(trainer, (state, own.path) if own else None)
        health = Health(trainer, self.out, self._gather)
        control = Control(self.signals, self.out, self.control_group, self.runtime.is_first)
        outcome = train_loop(trainer, data, validation, state, record=self._record, control=control, saver=self.saver,
                             watch=self.watch, health=health)
        if self.runtime.is_first:
            self._finish(outcome, health)
        self.signals.ignore()
        self.watch.close()
        if self.lock:
            self.lock.release()

    def _open_saver(self, trainer: Trainer, durable: tuple[TrainState, Path] | None) -> Saver:
        def gather(value: Any) -> list[Any]:
            self.watch.meet()
            return self._gather(value, self.saving_group)

        def make_save(state: TrainState):
            return describe_save(trainer, state, self.out, self.documents, self.fingerprint, gather)

        before = self.metrics.sync if self.metrics else lambda: None
        return Saver(trainer, make_save, durable, before, self._saved)

    def _first_line(self, trainer: Trainer, state: TrainState, checkpoint: Any) -> str:
        mesh, train = self.runtime.mesh, self.config.train
        parameters = sum(spec.numel for spec in trainer.table.values())
        origin = f"resuming from {checkpoint.path}" if checkpoint else "from scratch"
        return (f"{parameters:,} parameters, {mesh.world_size} ranks (data {mesh.data_size} x tensor "
                f"{mesh.tensor_size}) on {self.runtime.device.type}, ZeRO {trainer.stage}, {train.precision}; batch "
                f"{train.global_batch_size} = {train.micro_batch_size} micro x {mesh.data_size} ranks x "
                f"{trainer.accumulation} accumulation; step {state.step} of {train.num_steps}, {origin}")

    def _record_branch(self, state: TrainState, checkpoint: Any) -> None:
        old = config_from_text(checkpoint.document("config.yaml").decode(), f"{checkpoint.path}/config.yaml")
        changes = config_difference(old, self.config)
        document = {"from": str(checkpoint.path), **state.as_dict(), "changes": changes}
        write_atomically(self.out / "branch.json", (json.dumps(document, indent=1) + "\n").encode())
        self.log.info("branching from %s: %s", checkpoint.path,
                      "; ".join(f"{key}: {a} -> {b}" for key, (a, b) in changes.items()))

    def _record(self, record: dict[str, Any]) -> None:
        if self.runtime.is_first:
            self.metrics.write(record)
            self.track(record)
            self.log.info(self.console.line(record))

    def _status(self, status: str, state: TrainState, checkpoint: Path | None, **more: Any) -> None:
        if self.runtime.is_first:
            named = str(checkpoint.relative_to(self.out)) if checkpoint else None
            write_status(self.out, {"status": status, **state.as_dict(), "checkpoint": named,
                                    "attempt": self.attempt, **more})

    def _saved(self, state: TrainState, checkpoint: Path) -> None:
        """A checkpoint is durable; the run may have failed meanwhile, and has not if it goes on."""
        if self.runtime.is_first:
            named = str(checkpoint.relative_to(self.out))
            now = {"status": "running", "attempt": self.attempt} | read_status(self.out)
            write_status(self.out, now | state.as_dict() | {"checkpoint": named})

    def _finish(self, outcome: Outcome, health: Health) -> None:
        status = "finished" if outcome.reason == "finished" else "stopped"
        digest = weights_hash(open_checkpoint(outcome.checkpoint, verify=False))
        curves = self.out / "plots" / "curves.png"
        try:
            draw_curves(read_metrics(self.out / "metrics.jsonl"), curves)
        except OSError as error:
            self.log.error("curves not drawn: %s", error)
        counts = {key: n for key, n in (health.counts | {"failed_saves": self.saver.failures}).items() if n}
        self._status(status, outcome.state, outcome.checkpoint, reason=outcome.reason, weights_hash=digest, **counts)
        self.log.info(f"{status} ({outcome.reason}) at step {outcome.state.step}; checkpoint {outcome.checkpoint}; "
                      f"curves {curves}")

    def fail(self, error: Exception) -> RunFailed:
        """Say why the run failed and write it to status.json; returns what to raise."""
        text = self._explain(error)
        is_known = isinstance(error, (UsageError, TrainingFailed, CheckpointError)) or is_out_of_memory(error)
        is_first_to_say = self._write_failure(text)
        self.log.critical("FAILED: %s%s", text, "" if is_known else "\n" + "".join(traceback.format_exception(error)))
        if is_first_to_say and not self.runtime.is_first:
            print(f"dlm: rank {self.runtime.env.rank}: {text}", file=sys.stderr)
        if self.saver:
            self.saver.abandon(LAST_SAVE_SECONDS)
        self.watch.close()
        return RunFailed(text, 2 if isinstance(error, UsageError) else 1)

    def _explain(self, error: Exception) -> str:
        text = f"in {self.watch.where()}: {type(error).__name__}: {error}"
        if is_out_of_memory(error):
            return f"{memory_advice(self.config, self.vocabulary, self.runtime.mesh.data_size)} ({text[:300]})"
        if self.signals.received:
            return f"{text}; {self.signals.received} had come, which launchers send to the others when a rank dies"
        return text

    def _write_failure(self, text: str) -> bool:
        """The first rank that fails knows the cause: the others, which only miss it, leave its words."""
        status = read_status(self.out)
        if status.get("status") == "failed":
            return False
        write_status(self.out, {**status, "status": "failed", "error": text, "rank": self.runtime.env.rank})
        return True

    def _hung(self, message: str) -> None:
        self._write_failure(message)


def _device_clock(device: torch.device) -> dict[str, Any]:
    """How a Watchdog measures phases: by events on a GPU's stream, which the host runs ahead of."""
    if device.type != "cuda":
        return {}

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        stop.synchronize()
        return start.elapsed_time(stop) / 1000

    return {"mark": mark, "between": between}


def _previous_attempts(out: Path) -> int:
    attempts = read_status(out).get("attempt")
    return attempts if isinstance(attempts, int) else 0


class Console:
    """One readable line a record."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps

    def line(self, record: dict[str, Any]) -> str:
        place = f"step {record['step']:>6}/{self.num_steps}"
        if "loss" in record and record["grad_norm"] is None:
            return f"{place} | update skipped: loss or gradient not finite"
        if "loss" in record:
            remaining = (self.num_steps - record["step"]) * self._seconds_a_step(record)
            mfu = f" | mfu {record['mfu']:.1%}" if record["mfu"] else ""
            nelbo = "" if record["nelbo"] is None else f" | nelbo {record['nelbo']:.4f}"
            return (f"{place} | loss {record['loss']:.4f}{nelbo} | grad norm {record['grad_norm']:.3f} | lr "
                    f"{record['learning_rate']:.2e} | {record['tokens_per_second']:,.0f} tokens/s{mfu} | "
                    f"{_duration(remaining)} left")
        if record.get("val_loss") is not None:
            named = (f"{key.removeprefix('val_').replace('_', ' ')} {value:.4f}" for key, value in record.items()
                     if key.startswith("val_") and value is not None)
            return f"{place} | validation {' | '.join(named)}"
        if record["val_nelbo"] is None:
            return f"{place} | no validation set"
        return f"{place} | validation nelbo {record['val_nelbo']:.4f} +- {record['val_nelbo_se']:.4f} nats/token"

    @staticmethod
    def _seconds_a_step(record: dict[str, Any]) -> float:
        return record["tokens"] / record["step"] / max(1e-9, record["tokens_per_second"])


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
