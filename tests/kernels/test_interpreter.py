"""Runs check_*.py of this folder in processes of their own: TRITON_INTERPRET must be set before triton is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = sorted(Path(__file__).parent.glob("check_*.py"))


@pytest.fixture(scope="module")
def ran(repository_root):
    """{file: (exit code, output)}, all at once."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    running = {}
    for path in CHECKS:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
        running[path.name] = subprocess.Popen(command, cwd=repository_root, env=environment, text=True,
                                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    try:
        return {name: (child.communicate()[0], child.returncode) for name, child in running.items()}
    finally:
        for child in running.values():
            child.kill()


@pytest.mark.timeout(600)  # on a machine that others use too
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton")
@pytest.mark.parametrize("name", [path.name for path in CHECKS])
def test_kernels_in_the_interpreter(name, ran):
    output, code = ran[name]
    assert code == 0, output[-8000:]
