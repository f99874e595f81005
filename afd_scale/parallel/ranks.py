"""The processes of a run: who am I, on which device, and the few collectives the code outside engines needs."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from afd_scale.config import ConfigError
from afd_scale.parallel.launchers import Launched
from afd_scale.parallel.meeting import meet, network_of

# NCCL's last collectives, written where one times out: which rank waits in which.
_FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run: data x sequence, the ranks that share a video standing together.

    Attributes:
        rank, size: among all processes.
        local_rank, local_size: among the processes on this machine.
        device: where this rank computes.
        sequence: ranks that share one video's tokens.
        sequence_group: those of this rank's video; None where each has its own.
        control_group: all of them, over gloo: what they agree on there waits for no device; None is the default group.
        store: where they have met; None for one process by itself.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    sequence: int = 1
    sequence_group: dist.ProcessGroup | None = None
    control_group: dist.ProcessGroup | None = None
    store: Store | None = None

    @property
    def data_rank(self) -> int:
        """Which share of a batch this rank has."""
        return self.rank // self.sequence

    @property
    def data_size(self) -> int:
        """Shares of a batch."""
        return self.size // self.sequence

    @property
    def leads_sequence(self) -> bool:
        """The first of the ranks that share a video."""
        return self.rank % self.sequence == 0

    @property
    def of_machine(self) -> range:
        """The ranks of this machine, as launchers number them."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_size)

    @property
    def is_main(self) -> bool:
        """The rank that writes files and talks to the user."""
        return self.rank == 0

    def sharing_videos(self, sequence: int, timeout_minutes: int) -> "Ranks":
        """The same processes with so many of them, a divisor of all, to a video; on all ranks together."""
        if sequence == 1:
            return replace(self, sequence=1, sequence_group=None)
        group, _ = dist.new_subgroups(sequence, timeout=timedelta(minutes=timeout_minutes))
        return replace(self, sequence=sequence, sequence_group=group)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of a tensor over the shares of a batch, float32, on all ranks; ranks of a sequence hold the same."""
        x = x.detach().float().to(self.device).clone()
        dist.all_reduce(x)
        return x / self.size

    def any(self, condition: bool) -> bool:
        """Whether it holds on some rank; the same answer on all."""
        return bool(self.largest([condition])[0])

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of each over the ranks, in one collective; the same answer on all."""
        return self.ask_largest(values)()

    def ask_largest(self, values: Sequence[float]) -> Callable[[], list[float]]:
        """`largest`, answered later: what is returned waits until all ranks have asked.

        It goes through host memory and waits for no device, and an answer that is wanted later takes no time.
        """
        found = torch.tensor([float(value) for value in values])
        if self.size == 1:
            return found.tolist
        work = dist.all_reduce(found, dist.ReduceOp.MAX, group=self.control_group, async_op=True)

        def answer() -> list[float]:
            work.wait()
            return found.tolist()

        return answer

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """The main rank's picklable value, on all ranks."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_to_main(self, x: Tensor, rows: Sequence[int] | None = None) -> Tensor | None:
        """Rows of all shares in their order in the main rank's CPU memory; None elsewhere.

        They are sent one by one, so that the main rank's device has room for one beside its own; and as a batch of
        one, for which nccl takes the communicator that is there and makes none for the pair.

        Args:
            x: this share's rows; ranks that do not lead a sequence have none.
            rows: how many of each share's count, the first ones; None where every share has as many, and all do.
        """
        counts = [len(x)] * self.data_size if rows is None else rows
        x = x.detach()[: counts[self.data_rank]].to(self.device).contiguous()
        if self.is_main:
            shares = [x.cpu()]
            for share, count in list(enumerate(counts))[1:]:
                if count:
                    received = x.new_empty(count, *x.shape[1:])
                    _wait(dist.P2POp(dist.irecv, received, share * self.sequence))
                    shares.append(received.cpu())
            return torch.cat(shares)
        if self.leads_sequence and len(x):
            _wait(dist.P2POp(dist.isend, x, 0))
        return None

    def run_on_all(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function on every rank; where one fails, all raise the exception of the first that did.

        One process by itself needs no group for it.
        """
        if self.size == 1:
            return work(*arguments)
        result: Any = None
        error: Exception | None = None
        try:
            result = work(*arguments)
        except Exception as problem:  # whatever it is, the others must not wait for ever
            error = problem
        errors: list[Exception | None] = [None] * self.size
        dist.all_gather_object(errors, error)
        for rank, first in enumerate(errors):
            if first is not None:
                raise (error or first) if rank == self.rank else first  # the own one has its traceback
        return result

    def run_on_each_machine(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Run a function on the first rank of each machine; all ranks raise the first exception."""
        self.run_on_all(lambda: work(*arguments) if self.local_rank == 0 else None)

    def run_on_main(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function on the main rank only; all ranks get its result, or raise its exception."""
        if self.size == 1:
            return work(*arguments)
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


def _gpu_of(launched: Launched, visible: int) -> int:
    """The GPU of a rank among those that it sees: one of all, or its own, as with `srun --gpus-per-task=1`.

    Raises:
        ConfigError: there are fewer than ranks on this machine.
    """
    if visible not in (1, launched.local_size) and launched.local_rank >= visible:
        raise ConfigError(f"ranks of a machine ({launched.local_size}) must have a GPU each: {visible} are visible")
    return 0 if visible == 1 else launched.local_rank


def alone() -> Ranks:
    """One process without a group, on the device that is there; most collectives are not for it."""
    return Ranks(0, 1, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _wait(operation: dist.P2POp) -> None:
    for work in dist.batch_isend_irecv([operation]):
        work.wait()


@contextmanager
def start_ranks(
    launched: Launched, timeout_minutes: int, agreed: tuple[type[Exception], ...] = (ConfigError,)
) -> Iterator[Ranks]:
    """Join the process group that a launcher describes, and leave it at the end.

    The device and the backend follow from what is there: nccl with a GPU, gloo without.

    Args:
        agreed: exceptions that all ranks raise together; after any other the rest may never come to the good-bye.
    Raises:
        LostInputError: see `meet`.
        ConfigError: this rank has no GPU of its own.
    """
    import deepspeed

    os.environ.update(launched.environment)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        device = torch.device("cuda", _gpu_of(launched, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # by which DeepSpeed sets the device
        for name, value in _FLIGHT_RECORDER.items():
            os.environ.setdefault(name, value)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            # Ranks of one machine share its cores; without this each takes all of them.
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launched.local_size))
        # DeepSpeed 0.19 would compile its shared-memory operator for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    timeout = timedelta(minutes=timeout_minutes)
    store = meet(launched)
    os.environ.update(network_of(launched, store))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=launched.rank,
        world_size=launched.size,
        timeout=timeout,
    )
    deepspeed.init_distributed(
        auto_mpi_discovery=False, timeout=timeout, verbose=False
    )  # takes the group that is there
    try:
        yield Ranks(
            launched.rank, launched.size, launched.local_rank, launched.local_size, device,
            control_group=dist.new_group(backend="gloo", timeout=timeout), store=store,
        )  # fmt: skip
    except Exception as error:
        if isinstance(error, agreed):
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
