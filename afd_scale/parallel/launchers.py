"""Who a launcher says that this process is: python, torchrun, deepspeed, srun and mpirun each say it their own way."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from afd_scale.config import ConfigError


@dataclass(frozen=True)
class Launched:
    """Who a launcher says that this process is."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: str

    @property
    def environment(self) -> dict[str, str]:
        """What torch.distributed reads."""
        return {
            "RANK": str(self.rank), "WORLD_SIZE": str(self.size), "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address, "MASTER_PORT": self.port,
        }  # fmt: skip


def launched_as(environment: Mapping[str, str]) -> Launched:
    """Read the variables of torchrun or deepspeed, of srun, of Open MPI's mpirun; none of them is a run of one rank.

    Raises:
        ConfigError: srun or mpirun spans machines and nobody said where the first one is.
    """
    if "RANK" in environment:
        local_size_name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environment else "LOCAL_SIZE"  # deepspeed's
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", local_size_name)
    elif "SLURM_STEP_NUM_TASKS" in environment:  # set by srun, and not in the batch script around it
        here = _tasks_of_node(environment["SLURM_STEP_TASKS_PER_NODE"], int(environment["SLURM_NODEID"]))
        environment = {**environment, "LOCAL_SIZE": str(here)}
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "LOCAL_SIZE")
    else:
        prefix = "OMPI_COMM_WORLD_"
        names = (prefix + "RANK", prefix + "SIZE", prefix + "LOCAL_RANK", prefix + "LOCAL_SIZE")
    rank, size, local_rank = (int(environment.get(name, default)) for name, default in zip(names, "010", strict=False))
    local_size = int(environment.get(names[3], size))
    if "MASTER_ADDR" not in environment and local_size != size:
        raise ConfigError(f"MASTER_ADDR (not set) must name the first of the machines that share {size} ranks: "
                          "all ranks meet there")  # fmt: skip
    port = environment.get("MASTER_PORT") or (_free_port() if size == 1 else "29500")
    return Launched(rank, size, local_rank, local_size, environment.get("MASTER_ADDR", "127.0.0.1"), port)


def _tasks_of_node(counts: str, node: int) -> int:
    """Of `2(x3),1` for example: nodes 0 to 2 have two tasks each, node 3 has one."""
    tasks: list[int] = []
    for part in counts.split(","):
        count, _, nodes = part.rstrip(")").partition("(x")
        tasks += [int(count)] * int(nodes or 1)
    return tasks[node]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
