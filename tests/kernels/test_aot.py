"""Every shipped kernel configuration compiles for every chip without a GPU, and uses it as it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
from dlm_scale.kernels import aot  # noqa: E402

ARCHS = (80, 90, 100)


@pytest.fixture(scope="module")
def compiled(repository_root, tmp_path_factory):
    """{arch: its lines}, two chips at a time, compiled afresh."""

    def run(arch: int) -> list[dict]:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp(f"sm_{arch}"))
        command = [sys.executable, "-m", "dlm_scale.kernels.aot", "--json", "--arch", str(arch)]
        ran = subprocess.run(command, cwd=repository_root, env=environment, text=True, capture_output=True)
        assert ran.returncode in (0, 1), ran.stderr[-4000:]
        return [json.loads(line) for line in ran.stdout.splitlines()]

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ARCHS, pool.map(run, ARCHS)))


@pytest.mark.parametrize("arch", ARCHS)
def test_no_configuration_has_a_problem(arch, compiled):
    lines = compiled[arch]
    assert [line["case"] for line in lines] == [case.name for case in aot.cases()] and len(lines) >= 20
    assert [line for line in lines if line["problems"]] == []
    matmuls = [line for line in lines if aot.MATMUL_INSTRUCTION[arch] in line["instructions"]]
    assert [line["case"] for line in matmuls] == [case.name for case in aot.cases() if case.has_matmul]
    assert all(line["registers"] > 0 for line in lines) and all(line["shared_bytes"] > 0 for line in matmuls)


def test_a_tile_too_large_for_the_registers_is_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = next(case for case in aot.cases() if case.has_matmul)
    large = case._replace(constants=case.constants | {"BLOCK_N": 256, "BLOCK_V": 256})
    used = aot.compile_case(large, 80)
    assert used.spill_bytes > 0 and aot.problems(large, used) == [f"spills {used.spill_bytes} bytes"]


def test_each_problem_is_named():
    case = next(case for case in aot.cases() if case.has_matmul)
    used = aot.Resources(case.name, 90, 255, 16, 300_000, ("mma.sync",))
    spills, shared, matmul = aot.problems(case, used)
    assert spills == "spills 16 bytes" and "300000 bytes of shared memory" in shared and matmul == "no wgmma"
    assert aot.problems(case, used._replace(spill_bytes=0, shared_bytes=0, instructions=("wgmma",))) == []
