"""Gaussian diffusion in the engine: one result at every layout, exact resume, the bound in training and evaluation."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dlm_scale import cli
from dlm_scale.config import config_from_dict
from dlm_scale.config_checks import config_warnings
from dlm_scale.errors import UsageError
from tests.engine.cases import Case, case_config, differences, import_distributed, run_engine
from tests.engine.test_training import lines, run, status
from tests.forked import run_ranks

GAUSSIAN = {"objective__kind": "gaussian", "model__time_conditioning": "adaln", "gaussian__embedding_dim": 6,
            "gaussian__num_steps": 20}
VARIANTS = {  # every prediction, loss, kind of token vectors; with and without self-conditioning
    "ce": {"gaussian__self_conditioning": True},
    "vlb": {"gaussian__loss": "vlb", "gaussian__embeddings": "free", "model__logit_softcap": 2.0},
    "v": {"gaussian__prediction": "v", "gaussian__self_conditioning": True},
    "eps": {"gaussian__prediction": "eps", "gaussian__loss": "mse", "gaussian__embeddings": "fixed"},
}
LAYOUTS = {  # ranks: (case, variant) that run in one process group
    "whole": [(Case(0, 1, 1), name) for name in VARIANTS],
    "tensor": [(Case(1, 2, 1, 2, True), "ce"), (Case(3, 2, 1, 1, False), "ce"), (Case(2, 2, 1, 1, True), "vlb"),
               (Case(0, 2, 1, 1, False), "v"), (Case(3, 2, 1, 2, True), "eps")],
    "data": [(Case(3, 1, 2, 2), "ce"), (Case(1, 1, 2, 1), "v"), (Case(3, 1, 2, 1), "eps")],
}


def run_layout(name):
    from dlm_scale.engine.runtime import start_runtime

    runtime, results = start_runtime("cpu", LAYOUTS[name][0][0].tensor), []
    for case, variant in LAYOUTS[name]:
        results.append(run_engine(runtime, case.config(**GAUSSIAN, **VARIANTS[variant]), 4))
    return results if runtime.is_first else []


def test_layout_stage_and_batch_split_change_nothing():
    import_distributed()
    whole = dict(zip(VARIANTS, run_ranks(1, run_layout, "whole")[0]))
    assert all(line["loss"] > 0 and line["grad_norm"] > 0.2 for one in whole.values() for line in one["lines"])
    for name in ("tensor", "data"):
        for (case, variant), result in zip(LAYOUTS[name], run_ranks(2, run_layout, name)[0]):
            found = differences(result, whole[variant])
            scale = max(1.0, *(abs(line["loss"]) for line in whole[variant]["lines"]))
            assert found["hashes"] == 0, (case, variant)
            assert max(found["loss"] / scale, found["grad_norm"], found["weights"]) < 1e-5, (case, variant, found)
