"""A save that dies, fails or loses its data at any file operation leaves something whole to resume from.

The whole campaign is a row of `python -m tests.faults.report`.
"""

import pytest

from tests.faults.file_operations import FAULTS, campaign
from tests.faults.saver import Case
from tests.faults.shim import NoCompiler, compiled


@pytest.fixture(scope="module", autouse=True)
def shim():
    try:
        compiled()
    except NoCompiler as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", [Case(1), Case(2, replaces=True, asynchronous=True, stride=3)], ids=str)
def test_every_fault_at_every_operation(case, tmp_path):
    found = campaign(case, tmp_path)
    assert [line for figure in found.values() for line in figure.failures] == []
    assert set(found) == set(FAULTS)
    assert min(figure.total for figure in found.values()) * case.stride > 30 and found["POWER"].total > 150


@pytest.mark.parametrize(("sabotage", "fault"), [("no rename", "KILL"), ("no rename", "EIO"), ("no fsync", "POWER"),
                                                 ("no fsync of folders", "POWER")])
def test_the_campaign_sees_a_broken_writer(sabotage, fault, tmp_path):
    found = campaign(Case(1, replaces=True, stride=3, sabotage=sabotage), tmp_path, [fault])[fault]
    assert len(found.failures) > 1
