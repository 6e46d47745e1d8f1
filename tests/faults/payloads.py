"""Malicious files: how many kinds were met, and how many of them were executed, read what they must not, or crashed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.faults.figures import Figure


def payloads(folder: Path, stride: int = 1, seconds: float = 600) -> Figure:
    """Every `stride`-th attack of tests.faults.attacks, in a process of its own.

    Raises RuntimeError where the audit itself is blind to a naive reader, or refuses what is harmless.
    """
    command = [sys.executable, "-m", "tests.faults.audited", str(folder), str(stride)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub"),
                                "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    found = json.loads(done.stdout.splitlines()[-1])
    if found["controls"]:
        raise RuntimeError(f"the audit is not sound: {found['controls']}")
    return Figure(found["total"], tuple(found["failures"]), (("kinds", str(found["kinds"])),))
