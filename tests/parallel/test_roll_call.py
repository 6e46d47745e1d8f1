"""The ranks that survive say which one is gone; errors of other kinds pass as they are."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dlm_scale.parallel.dist_env import DistEnv
from dlm_scale.parallel.roll_call import naming_lost_ranks
from tests.forked import run_ranks


def _one_leaves(leaver: int) -> str:
    from dlm_scale.engine.runtime import start_runtime

    env = start_runtime("cpu", 1).env
    dist.all_reduce(torch.ones(1))
    if env.rank == leaver:  # the process ends, and with it its connections
        return "left"
    try:
        with naming_lost_ranks(env, 1.0):
            dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_the_survivors_name_the_rank_that_left():
    texts = run_ranks(3, _one_leaves, 1)
    assert texts[1] == "left"
    assert all(f"rank {rank} of 3 stops: no answer from ranks [1]" in texts[rank] for rank in (0, 2))


def test_the_first_rank_takes_the_store_with_it():
    texts = run_ranks(2, _one_leaves, 0)
    assert "rank 1 of 2 stops: no answer from ranks [0]" in texts[1]


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("closed by peer"), KeyError("x")])
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as raised, naming_lost_ranks(DistEnv(0, 2, 0, 2, "", 0, "torch")):
        raise error
    assert raised.value is error
