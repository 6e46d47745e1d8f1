"""One attempt at a run: its folder, its console, its status; the loop runs inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dlm_scale.checkpoint.reader import open_checkpoint, weights_hash
from dlm_scale.config import dump_config
from dlm_scale.engine.build import Trainer
from dlm_scale.engine.loop import Outcome, train_loop
from dlm_scale.engine.run_folder import (
    Metrics,
    open_log,
    provenance,
    read_metrics,
    write_atomically,
    write_status,
)
from dlm_scale.engine.runtime import Runtime
from dlm_scale.engine.saving import tokenizer_documents
from dlm_scale.engine.signals import StopRequest
from dlm_scale.engine.state import TrainState
from dlm_scale.engine.tracking import open_tracker
from dlm_scale.plots import draw_curves


class Session:
    """Owns train.out on rank 0; on the other ranks it only has a log file."""

    def __init__(self, config: Any, runtime: Runtime, data: Any):
        self.config, self.runtime = config, runtime
        self.out = Path(config.train.out)
        self.stop = StopRequest()
        self.log = open_log(self.out, runtime.env.rank)
        self.documents = tokenizer_documents(data) | {"config.yaml": dump_config(config).encode()}
        self.fingerprint = data.fingerprint
        self.console = Console(config.train.num_steps)
        self.track = None
        if runtime.is_first:
            write_atomically(self.out / "config.yaml", self.documents["config.yaml"])
            self.track = open_tracker(config.train.wandb, self.out, config.model_dump())

    def run(self, trainer: Trainer, data: Any, validation: Any, state: TrainState, checkpoint: Any) -> None:
        """Run the loop; write status.json, curves and the last line that says where everything lies."""
        versions = provenance()
        self.documents["provenance.json"] = (json.dumps(versions, indent=1) + "\n").encode()
        self.attempt = _previous_attempts(self.out) + 1
        self.log.info(self._first_line(trainer, state, checkpoint))
        self.metrics = Metrics(self.out / "metrics.jsonl", state.step) if self.runtime.is_first else None
        self._status("running", state, checkpoint.path if checkpoint else None)
        outcome = train_loop(trainer, data, validation, state, self.out, self.documents, self._record,
                             self.stop, self.fingerprint, checkpoint.path if checkpoint else None)
        if self.runtime.is_first:
            self._finish(outcome)

    def _first_line(self, trainer: Trainer, state: TrainState, checkpoint: Any) -> str:
        mesh, train = self.runtime.mesh, self.config.train
        parameters = sum(spec.numel for spec in trainer.table.values())
        origin = f"resuming from {checkpoint.path}" if checkpoint else "from scratch"
        return (f"{parameters:,} parameters, {mesh.world_size} ranks (data {mesh.data_size} x tensor "
                f"{mesh.tensor_size}) on {self.runtime.device.type}, ZeRO {trainer.stage}, {train.precision}; batch "
                f"{train.global_batch_size} = {train.micro_batch_size} micro x {mesh.data_size} ranks x "
                f"{trainer.accumulation} accumulation; step {state.step} of {train.num_steps}, {origin}")

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

    def _finish(self, outcome: Outcome) -> None:
        status = "finished" if outcome.reason == "finished" else "stopped"
        digest = weights_hash(open_checkpoint(outcome.checkpoint, verify=False))
        self.metrics.close()
        draw_curves(read_metrics(self.out / "metrics.jsonl"), self.out / "plots" / "curves.png")
        self._status(status, outcome.state, outcome.checkpoint, reason=outcome.reason, weights_hash=digest)
        self.log.info(f"{status} ({outcome.reason}) at step {outcome.state.step}; checkpoint {outcome.checkpoint}; "
                      f"curves {self.out / 'plots' / 'curves.png'}")


def _previous_attempts(out: Path) -> int:
    try:
        return int(json.loads((out / "status.json").read_text())["attempt"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


class Console:
    """One readable line a record."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps

    def line(self, record: dict[str, Any]) -> str:
        place = f"step {record['step']:>6}/{self.num_steps}"
        if "loss" in record:
            remaining = (self.num_steps - record["step"]) * self._seconds_a_step(record)
            mfu = f" | mfu {record['mfu']:.1%}" if record["mfu"] else ""
            return (f"{place} | loss {record['loss']:.4f} | nelbo {record['nelbo']:.4f} | grad norm "
                    f"{record['grad_norm']:.3f} | lr {record['learning_rate']:.2e} | "
                    f"{record['tokens_per_second']:,.0f} tokens/s{mfu} | {_duration(remaining)} left")
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
