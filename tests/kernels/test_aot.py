"""Every shipped kernel configuration compiles for every chip without a GPU, and uses it as it should."""

from __future__ import annotations

import json
import os

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
from dlm_scale.kernels import aot  # noqa: E402
from tests.forked import run_ranks  # noqa: E402


def _compiled(arch: int, cache: str) -> list[tuple[str, aot.Resources, list[str]]]:
    """Every second case; afresh, for the cache is empty."""
    os.environ["TRITON_CACHE_DIR"] = cache
    cases = list(aot.cases())[int(os.environ["RANK"]) :: int(os.environ["WORLD_SIZE"])]
    resources = [aot.compile_case(case, arch) for case in cases]
    return [(case.name, used, aot.problems(case, used)) for case, used in zip(cases, resources, strict=True)]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_no_configuration_has_a_problem(arch, tmp_path):
    found = sorted(sum(run_ranks(2, _compiled, arch, str(tmp_path)), []))
    assert [name for name, _, _ in found] == sorted(case.name for case in aot.cases()) and len(found) >= 20
    assert [(name, problems) for name, _, problems in found if problems] == []
    matmuls = [used for _, used, _ in found if aot.MATMUL_INSTRUCTION[arch] in used.instructions]
    assert [used.case for used in matmuls] == sorted(case.name for case in aot.cases() if case.has_matmul)
    assert all(used.registers > 0 for _, used, _ in found) and all(used.shared_bytes > 0 for used in matmuls)


def test_the_command_prints_each_configuration_and_fails_where_one_has_a_problem(monkeypatch, capsys):
    made = {80: aot.Resources("a", 80, 40, 0, 1024, ()), 90: aot.Resources("a", 90, 255, 8, 1024, ())}
    monkeypatch.setattr(aot, "cases", lambda: iter([aot.Case("a", None, "", {})]))
    monkeypatch.setattr(aot, "compile_case", lambda case, arch: made[arch])
    assert aot.main(["--arch", "80", "--json"]) == 0 and aot.main(["--arch", "80", "90", "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["arch"], line["problems"]) for line in lines] == [(80, []), (80, []), (90, ["spills 8 bytes"])]


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
