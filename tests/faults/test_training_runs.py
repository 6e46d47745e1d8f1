"""Runs that are killed, signalled or starved of disk: a few of each. More, and hangs: `python -m tests.faults.report`."""

import importlib.util

import pytest

from tests.conftest import ROOT
from tests.faults.rows import training_rows
from tests.faults.shim import NoCompiler, compiled


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """One process for all rows: they share the run that nothing disturbs."""
    counts = {"kills": 2, "signals": 2}
    try:
        compiled()
        counts |= {"full_disk": 1, "soak": 40}
    except NoCompiler:
        pass
    return training_rows(tmp_path_factory.mktemp("training"), seed=5, **counts)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("row", "least"), [("kills", 2), ("signals", 2), ("full_disk", 1), ("soak", 1)])
def test_a_disturbed_run_ends_as_the_undisturbed_one(row, least, found):
    if row not in found:
        pytest.skip("faults in file operations need Linux and a C compiler (cc) on PATH")
    assert found[row].failures == ()
    assert found[row].total >= least


def test_the_layouts_of_two_ranks_and_back(tmp_path):
    from tests.faults.worlds import world_changes

    done = world_changes(tmp_path, [(1, 2)])
    assert done.failures == () and done.total == 4


def test_chaos_damages_and_says_what_it_takes(tmp_path):
    spec = importlib.util.spec_from_file_location("chaos_of_test", ROOT / "tools" / "chaos.py")
    chaos = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = chaos
    spec.loader.exec_module(chaos)
    import random

    for seed in range(20):
        (tmp_path / "file").write_bytes(bytes(100))
        chaos.damage(tmp_path / "file", random.Random(seed))
        assert (tmp_path / "file").read_bytes() != bytes(100)
