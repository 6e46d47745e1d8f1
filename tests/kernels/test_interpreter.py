"""Runs check_*.py of this folder in a process of its own: TRITON_INTERPRET must be set before triton is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton")
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("check_*.py")))
def test_kernels_in_the_interpreter(file, repository_root):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(FOLDER / file)]
    ran = subprocess.run(command, cwd=repository_root, env=os.environ | {"TRITON_INTERPRET": "1"}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-8000:]
