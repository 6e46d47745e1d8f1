"""torch.compile, block by block, changes no number."""

from __future__ import annotations

import pytest

from dlm_scale.errors import UsageError
from tests.engine.cases import MODELS, case_config, differences, run_engine, run_twin
from tests.forked import run_ranks


def _compiled(model: str):
    from dlm_scale.engine.runtime import start_runtime

    runtime = start_runtime("cpu", 1)
    with pytest.raises(UsageError, match="train.compile.*ZeRO-3"):
        run_engine(runtime, case_config(train__compile=True, zero__stage=3), 1)
    return run_engine(runtime, case_config(**MODELS[model], train__compile=True, zero__stage=1), 3)


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("model", ["base", "packed"])
def test_compiled_blocks_change_nothing(model):
    """Needs a C++ compiler on CPU. The number of packed documents changes from step to step."""
    found = differences(run_ranks(1, _compiled, model, seconds=600)[0], run_twin(case_config(**MODELS[model]), 3))
    assert found["loss"] < 1e-5 and found["weights"] < 1e-5, found
