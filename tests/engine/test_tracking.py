"""Weights & Biases: asked for and absent is an error; a tracker that breaks never stops training."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from dlm_scale.engine.tracking import open_tracker
from dlm_scale.errors import UsageError


def test_off_needs_no_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    open_tracker("off", tmp_path, {})({"step": 1})


def test_asked_for_and_absent_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"train.wandb=offline.*pip install"):
        open_tracker("offline", tmp_path, {})


def test_numbers_are_logged_and_failures_survived(monkeypatch, tmp_path):
    logged, started = [], {}

    def log(record, step):
        if step == 2:
            raise OSError("network down")
        logged.append((step, record))

    fake = SimpleNamespace(init=lambda **options: started.update(options) or SimpleNamespace(log=log))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    track = open_tracker("offline", tmp_path, {"a": 1})
    for step in (1, 2, 3):
        track({"step": step, "loss": 0.5, "batch_hash": "x"})
    assert started["mode"] == "offline" and started["dir"] == str(tmp_path)
    assert logged == [(1, {"step": 1, "loss": 0.5}), (3, {"step": 3, "loss": 0.5})]
