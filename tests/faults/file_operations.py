"""SIGKILL, ENOSPC, EIO and power loss at every file operation of a save: figures by kind of fault."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from tests.faults.figures import Figure
from tests.faults.saver import Case
from tests.faults.shim import preloaded

FAULTS = ("KILL", "ENOSPC", "EIO", "POWER")
ALL_CASES = [Case(world, replaces, asynchronous) for asynchronous in (False, True) for world in (1, 2)
             for replaces in (False, True)]


def campaign(case: Case, folder: Path, faults: Iterable[str] = FAULTS, seconds: float = 600) -> dict[str, Figure]:
    """One case under all the faults, in a process of its own. Raises NoCompiler."""
    command = [sys.executable, "-m", "tests.faults.saver", json.dumps(asdict(case)), str(folder), ",".join(faults)]
    done = subprocess.run(command, env=preloaded(), capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return {fault: Figure(total, tuple(failures), (("seconds", f"{spent:.1f}"),))
            for fault, (total, failures, spent) in json.loads(done.stdout).items()}


def campaigns(cases: Iterable[Case], folder: Path) -> dict[tuple[str, bool], Figure]:
    """(fault, whether saved asynchronously) -> the sum over the cases."""
    found: dict[tuple[str, bool], Figure] = {}
    for number, case in enumerate(cases):
        (folder / str(number)).mkdir(parents=True)
        for fault, figure in campaign(case, folder / str(number)).items():
            key = fault, case.asynchronous
            found[key] = found.get(key, Figure(0)) + figure
    return found
