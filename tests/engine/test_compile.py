"""torch.compile, block by block, changes no number."""

from __future__ import annotations

import pytest

from dlm_scale.errors import UsageError
from tests.engine.cases import case_config, differences, run_engine, run_twin
from tests.forked import run_ranks


def _compiled():
    from dlm_scale.engine.runtime import start_runtime

    runtime = start_runtime("cpu", 1)
    with pytest.raises(UsageError, match="train.compile.*ZeRO-3"):
        run_engine(runtime, case_config(train__compile=True, zero__stage=3), 1)
    return run_engine(runtime, case_config(train__compile=True, zero__stage=1), 3)


@pytest.mark.slow
def test_compiled_blocks_change_nothing():
    """Needs a C++ compiler on CPU."""
    found = differences(run_ranks(1, _compiled)[0], run_twin(case_config(), 3))
    assert found["loss"] < 1e-5 and found["weights"] < 1e-5, found
