"""The processes of a run: who am I, on which device, and the few collectives the code outside engines needs."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from afd_scale.config import ConfigError
from afd_scale.parallel.launchers import Launched


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

    def any(self, condition: bool) -> bool:
        """Whether it holds on some rank; the same answer on all."""
        flag = torch.tensor(float(condition), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

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
def start_ranks(
    launched: Launched, timeout_minutes: int, agreed: tuple[type[Exception], ...] = (ConfigError,)
) -> Iterator[Ranks]:
    """Join the process group that a launcher describes, and leave it at the end.

    The device and the backend follow from what is there: nccl with a GPU, gloo without.

    Args:
        agreed: exceptions that all ranks raise together; after any other the rest may never come to the good-bye.
    """
    import deepspeed

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
    except Exception as error:
        if isinstance(error, agreed):
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
