import pytest
import torch

from tests.faults.specimen import make_specimen

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def specimen(tmp_path_factory):
    """A dataset and a run with two good checkpoints. A test that damages it restores it."""
    return make_specimen(tmp_path_factory.mktemp("specimen"))


