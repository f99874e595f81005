"""Who a launcher says that a process is."""

import pytest

from afd_scale.config import ConfigError
from afd_scale.parallel.launchers import Launched, launched_as

SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_NODEID": "1"}  # fmt: skip


def test_a_plain_process_is_alone() -> None:
    launched = launched_as({})
    assert launched == Launched(0, 1, 0, 1, "127.0.0.1", launched.port)
    assert 1024 < int(launched.port) < 65536


def test_a_batch_script_is_no_step_of_srun() -> None:
    assert launched_as({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).size == 1


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"},  # deepspeed's launcher
        SRUN,
        {
            f"OMPI_COMM_WORLD_{k}": v
            for k, v in {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items()
        },
    ],
    ids=["torchrun", "deepspeed", "srun", "mpirun"],
)
def test_launchers(environment: dict[str, str]) -> None:
    launched = launched_as({**environment, "MASTER_ADDR": "node-0", "MASTER_PORT": "1234"})
    assert launched == Launched(3, 4, 1, 2, "node-0", "1234")
    assert launched.environment["RANK"] == "3"
    assert launched.environment["WORLD_SIZE"] == "4"


def test_machines_must_be_told_where_to_meet() -> None:
    with pytest.raises(ConfigError, match=r"MASTER_ADDR \(not set\) must name the first of the machines"):
        launched_as(SRUN)
    assert launched_as({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}).address == "127.0.0.1"


@pytest.mark.parametrize(("node", "tasks"), [("0", 2), ("2", 2), ("3", 1), ("4", 3)])
def test_srun_says_how_many_tasks_each_node_has(node: str, tasks: int) -> None:
    uneven = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x3),1,3", "SLURM_NODEID": node, "MASTER_ADDR": "node-0"}
    assert launched_as(uneven).local_size == tasks


def test_a_rank_takes_its_gpu_among_those_it_sees() -> None:
    from afd_scale.parallel.ranks import _gpu_of

    fourth = Launched(3, 4, 3, 4, "127.0.0.1", "1234")
    assert _gpu_of(fourth, visible=4) == 3
    assert _gpu_of(fourth, visible=1) == 0  # srun --gpus-per-task=1
    with pytest.raises(ConfigError, match=r"ranks of a machine \(4\) must have a GPU each: 2 are visible"):
        _gpu_of(fourth, visible=2)
