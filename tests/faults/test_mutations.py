"""Damaged files are found, named, and fallen back from. A thousand of each: `python -m tests.faults.report`."""

import pytest

from dlm_scale.checkpoint.reader import open_checkpoint
from tests.faults import mutations


@pytest.mark.parametrize("campaign", [mutations.checkpoint_mutations, mutations.dataset_mutations])
def test_random_damage_is_detected(campaign, specimen):
    found = campaign(specimen, 150, seed=1)
    assert found.failures == () and found.total == 150
    open_checkpoint(specimen.checkpoint(2))  # and all of it was undone


def test_the_campaign_sees_damage_that_is_not_detected(specimen, monkeypatch):
    monkeypatch.setattr("dlm_scale.checkpoint.manifest.check_record", lambda *args, **options: None)
    assert len(mutations.checkpoint_mutations(specimen, 50, seed=1).failures) > 5
