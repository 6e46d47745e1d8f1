"""Weights & Biases beside metrics.jsonl, when asked for. A tracker that fails never stops training."""

from __future__ import annotations

import logging
from typing import Any

from dlm_scale.errors import UsageError


def open_tracker(mode: str, out: Any, config: dict[str, Any]):
    """A `log(record)` function; `mode` is off, offline or online. Raises UsageError where wandb is not installed."""
    if mode == "off":
        return lambda record: None
    try:
        import wandb
    except ImportError:
        raise UsageError(f"train.wandb={mode}: the package wandb is not installed; "
                         "pip install 'dlm_scale[log]', or use train.wandb=off") from None
    try:
        run = wandb.init(mode=mode, dir=str(out), config=config, project="dlm_scale", name=out.name)
    except Exception as error:
        logging.getLogger("dlm_scale").warning("wandb did not start, training goes on without it: %s", error)
        return lambda record: None
    return lambda record: _log_quietly(run, record)


def _log_quietly(run: Any, record: dict[str, Any]) -> None:
    try:
        run.log({k: v for k, v in record.items() if isinstance(v, (int, float))}, step=record["step"])
    except Exception as error:  # the tracker's network or disk is not ours to depend on
        logging.getLogger("dlm_scale").warning("wandb did not take step %s: %s", record["step"], error)
