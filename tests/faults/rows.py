"""The rows on training runs, each in a process of its own: tests.faults.training under the shim."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.faults.figures import Figure
from tests.faults.shim import NoCompiler, preloaded


def training_rows(folder: Path, seconds: float = 3600, width: int = 32, seed: int = 0, **counts: int) -> dict[str, Figure]:
    """`counts`: row -> number of cases. Raises NoCompiler for those that need the shim where there is none."""
    try:
        environment = preloaded()
    except NoCompiler:
        if {"full_disk", "soak"} & counts.keys():
            raise
        environment = dict(os.environ)
    command = [sys.executable, "-m", "tests.faults.training", str(folder), *(f"{k}:{n}" for k, n in counts.items()),
               f"--width={width}", f"--seed={seed}"]
    done = subprocess.run(command, env=environment | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, text=True,
                          capture_output=True, timeout=seconds)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: Figure(total if name in ("soak", "stall") else max(total, counts[name]), tuple(failures),
                         tuple((k, str(v)) for k, v in notes.items()))
            for name, (total, failures, notes) in found.items()}
