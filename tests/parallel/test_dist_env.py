"""Every launcher's environment gives the same answer; half of one is refused."""

from __future__ import annotations

import pytest

from dlm_scale.errors import UsageError
from dlm_scale.parallel.dist_env import DistEnv, dist_env
from dlm_scale.parallel.mesh import check_layout

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1",
            "MASTER_PORT": "29500"}
DEEPSPEED = {key: value for key, value in TORCHRUN.items() if key != "LOCAL_WORLD_SIZE"} | {"LOCAL_SIZE": "2"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "41234",
        "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}


@pytest.mark.parametrize("environ", [TORCHRUN, DEEPSPEED])
def test_launchers_that_set_rank(environ):
    assert dist_env(environ) == DistEnv(3, 4, 1, 2, "n1", 29500, "torch")


def test_an_srun_step():
    assert dist_env(SRUN) == DistEnv(3, 4, 1, 2, "n1", 20000 + 41234 % 20000, "slurm")
    assert dist_env(SRUN | TORCHRUN).launcher == "torch"  # torchrun under srun


def test_the_batch_script_of_a_slurm_job_is_one_process():
    assert dist_env({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}).world_size == 1
    assert dist_env({}) == DistEnv(0, 1, 0, 1, "127.0.0.1", 0, "single")


@pytest.mark.parametrize("change", [{"WORLD_SIZE": None}, {"LOCAL_RANK": "x"}, {"RANK": "4"}, {"MASTER_PORT": ""}])
def test_an_incomplete_environment_is_refused(change):
    environ = {k: v for k, v in (TORCHRUN | change).items() if v is not None}
    with pytest.raises(UsageError, match="rank|" + next(iter(change))):
        dist_env(environ)


def test_a_tensor_size_that_does_not_divide_names_the_valid_ones():
    check_layout(8, 4)
    with pytest.raises(UsageError, match=r"tensor_parallel_size=3 .* 8 processes .*\[1, 2, 4, 8\]"):
        check_layout(8, 3)
