"""Hostile headers, indexes, manifests and documents: how many were met, and how many did any harm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.faults.figures import Figure


def headers(folder: Path, count: int, seed: int = 0, seconds: float = 1200) -> Figure:
    """`count` generated cases in a process of its own; its death is a failure too, with the case that it was at."""
    command = [sys.executable, "-m", "tests.faults.fuzz", str(folder), str(count), str(seed)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=seconds)
    if done.returncode:
        return Figure(count, (f"{(folder / 'case').read_text()}: exit code {done.returncode}: {done.stderr[-500:]}",))
    found = json.loads(done.stdout)
    return Figure(found["total"], tuple(found["failures"]), tuple((k, str(v)) for k, v in found["counts"].items()))
