"""Nothing in a file is ever executed, and no file brings a traceback. All kinds: `python -m tests.faults.report`."""

import pytest

from tests.faults.attacks import all_attacks
from tests.faults.audited import ENTRIES
from tests.faults.payloads import payloads


def test_a_part_of_the_attacks(tmp_path):
    found = payloads(tmp_path, stride=7)
    assert found.failures == () and found.total > 30


def test_every_attack_has_its_own_name_and_an_entry_point():
    attacks = all_attacks()
    assert len({attack.name for attack in attacks}) == len(attacks) > 200
    assert {attack.on for attack in attacks} == set(ENTRIES)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_attacks(tmp_path):
    assert payloads(tmp_path).failures == ()
