"""The processes of a run: who am I, on which device, and the few collectives the code outside engines needs."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from afd_scale.config import ConfigError


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank, size: among all processes.
        device: where this rank computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """The rank that writes files and talks to the user."""
        return self.rank == 0

    def mean(self, x: Tensor) -> Tensor:
        """Mean of a tensor over the ranks, float32, on all of them."""
        x = x.detach().float().to(self.device).clone()
        dist.all_reduce(x)
        return x / self.size

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """The main rank's picklable value, on all ranks."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, x: Tensor) -> Tensor:
        """Rows of all ranks in rank order, (size x B, ...), on all ranks; every rank holds as many."""
        rows = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    def run_on_main(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function on the main rank only; all ranks get its result, or raise its exception."""
        result: Any = None
        if self.is_main:
            try:
                result = work(*arguments)
            except Exception as error:  # whatever it is, the others must not wait for ever
                result = error
        result = self.broadcast(result)
        if isinstance(result, Exception):
            raise result
        return result


@contextmanager
def start_ranks(timeout_minutes: int) -> Iterator[Ranks]:
    """Join the process group that python, torchrun, deepspeed or srun describes in the environment, and leave it.

    The device and the backend follow from what is there: nccl with a GPU, gloo without.
    """
    import deepspeed

    launched = launched_as(os.environ)
    os.environ.update(launched.environment)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", launched.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        if "OMP_NUM_THREADS" not in os.environ:
            # Ranks of one machine share its cores; without this each takes all of them.
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launched.local_size))
        # DeepSpeed would compile its shared-memory operator for a minute (FACTS: deepspeed 0.19).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.init_distributed(
        "nccl" if on_gpu else "gloo",
        auto_mpi_discovery=False,
        timeout=timedelta(minutes=timeout_minutes),
        verbose=False,
    )
    try:
        yield Ranks(launched.rank, launched.size, device)
    except ConfigError:  # raised by all ranks; after any other exception the rest may never come to the good-bye
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


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
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    else:
        prefix = "OMPI_COMM_WORLD_"
        names = (prefix + "RANK", prefix + "SIZE", prefix + "LOCAL_RANK", prefix + "LOCAL_SIZE")
    rank, size, local_rank = (int(environment.get(name, default)) for name, default in zip(names, "010", strict=False))
    local_size = int(environment.get(names[3], size))
    on_one_machine = local_size == size or environment.get("SLURM_STEP_NUM_NODES") == "1"
    if "MASTER_ADDR" not in environment and not on_one_machine:
        raise ConfigError(f"MASTER_ADDR (not set) must name the first of the machines that share {size} ranks: "
                          "all ranks meet there")  # fmt: skip
    port = environment.get("MASTER_PORT") or (_free_port() if size == 1 else "29500")
    return Launched(rank, size, local_rank, local_size, environment.get("MASTER_ADDR", "127.0.0.1"), port)


def _free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
