"""How MosaicML Streaming (0.13) opens a dataset, and what of it we change.

Imported when a dataset is opened, for `streaming` takes seconds to import.
"""

import logging
import os
import re
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import wraps
from multiprocessing import resource_tracker
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch.distributed as dist
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from afd_scale.config import ConfigError, LostInputError, RunConfig, one_line
from afd_scale.data.environment import in_environment
from afd_scale.data.leftovers import REMEDY, SHARED_MEMORY, remove_dead, unusable
from afd_scale.data.schema import HASH
from afd_scale.data.storage import DOWNLOAD_TIMEOUT_SECONDS, Location, cache_lock
from afd_scale.torchvision_ops import define_torchvision_ops

define_torchvision_ops()

from streaming import Stream, StreamingDataset  # noqa: E402
from streaming.base.format.base.reader import Reader  # noqa: E402
from streaming.base.shared.memory import SharedMemory  # noqa: E402
from streaming.base.world import World  # noqa: E402

log = logging.getLogger(__name__)

_OPENING_SECONDS = 60.0  # for another job's dataset to open
_SHUFFLE_BLOCK = 1 << 18  # fixed: the order depends on it


def _mend_resource_tracking() -> None:
    """Let one thread attach to shared memory while others do too, or start processes.

    While streaming (0.13) attaches or cleans up, it puts functions of its own into the process's resource tracker, and
    afterwards what it found there: two threads find each other's, which then stay. And its own fail for semaphores, so
    no pool of processes could be made from then on. Goes when streaming (0.13) attaches with `track=False`.
    """
    one_at_a_time = RLock()
    os.register_at_fork(before=one_at_a_time.acquire, after_in_parent=one_at_a_time.release,
                        after_in_child=one_at_a_time.release)  # fmt: skip

    def alone(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def locked(*arguments: Any, **options: Any) -> Any:
            with one_at_a_time:
                return method(*arguments, **options)

        return locked

    def unless_memory(done: Callable[[str, str], Any]) -> Callable[..., Any]:
        return lambda _, name, kind: None if kind == "shared_memory" else done(name, kind)

    tracker = resource_tracker._resource_tracker
    SharedMemory.__init__ = alone(SharedMemory.__init__)
    SharedMemory.cleanup = alone(SharedMemory.cleanup)
    SharedMemory.fix_register = unless_memory(tracker.register)
    SharedMemory.fix_unregister = unless_memory(tracker.unregister)


_mend_resource_tracking()


class SharedStream(Stream):
    """Shards of a dataset; the processes of a machine, of other jobs too, share the copies of remote ones.

    Streaming's own locks are of one job, and it leaves a download that fails its checksum where it is next taken for
    good. It also claims the folder of a remote dataset for one job, in shared memory, where a killed one leaves its
    claim for good. So the dataset gets a stream that is not remote, and another one behind it brings the shards.
    """

    def __init__(self, location: Location):
        super().__init__(local=str(location.folder), keep_zip=not location.is_remote)
        self._location = location
        self._source = Stream(
            remote=location.remote, local=str(location.folder), download_retry=2,
            download_timeout=DOWNLOAD_TIMEOUT_SECONDS, validate_hash=HASH if location.is_remote else None,
            keep_zip=not location.is_remote,
        )  # fmt: skip

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """Readers of the shards that the index names."""
        shards: list[Reader] = self._source.get_shards(world, allow_unsafe_types)
        return shards

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """See which of them are here."""
        self._source.set_up_local(shards, cache_usage_per_shard)

    def prepare_shard(self, shard: Reader) -> int:
        """Download, check and unpack a shard that is not here.

        Raises:
            LostInputError: it cannot be read, or is not what was written.
        """
        location, files = self._location, [part.basename for part in shard.file_pairs[0] if part is not None]
        with cache_lock(location, files[0]) if location.is_remote else nullcontext():
            try:
                bytes_more: int = self._source.prepare_shard(shard)
                return bytes_more
            except Exception as error:  # every storage has its own
                for name in files if location.is_remote else ():
                    (location.folder / name).unlink(missing_ok=True)
                reason = one_line(f"{type(error).__name__}: {error}")
                raise LostInputError(f"{location.field} ({location.shards}) must have its shard {files[0]} as it was "
                                     f"written: {reason}") from error  # fmt: skip


class NumberedDataset(StreamingDataset):
    """Adds to each sample its position in the dataset, and says why an epoch ended early.

    Attributes:
        failure: of a thread that prepares shards; after it no more samples come.
    """

    failure: BaseException | None = None

    def __getitem__(self, at: Any) -> Any:
        return {**super().__getitem__(at), "sample": int(at)}

    def on_exception(self, future: Future[None]) -> None:
        """Keep what a thread met; streaming would raise it where nobody hears, and wait for the thread for ever."""
        failure = future.exception()
        if failure is not None:
            self.failure = failure
            self._event.set()  # ends the other threads and the epoch
            self._iterator.on_exit()

    def close(self) -> None:
        """End the threads of the present epoch."""
        if hasattr(self, "_iterator"):
            self._iterator.exit()


def open_stream(location: Location, config: RunConfig, batch: int) -> NumberedDataset:
    """Open a dataset to iterate over this rank's samples; a collective.

    Args:
        config: names the order.
        batch: samples of a step on this rank.
    Returns:
        Yields dicts of the schema's columns and `sample`, the position in the dataset.
    Raises:
        ConfigError: the machines do not fit the canonical nodes, or run different numbers of ranks.
    """
    rank, ranks, local_ranks = _ranks()
    nodes, canonical = ranks // local_ranks, config.data.canonical_nodes
    if nodes % canonical and canonical % nodes:
        raise ConfigError(f"data.canonical_nodes ({canonical}) must divide the number of machines ({nodes}) or be a "
                          "multiple of it: each machine reads whole parts of the data; 1 suits any number")  # fmt: skip
    # Our positions count samples, each once for all ranks of a sequence, so its warning about them is beside the point.
    logging.getLogger("streaming.base.dataset").addFilter(_is_not_about_replication)
    # It reads these and nothing else. The deepspeed launcher and srun do not set the last, and every rank would then
    # take itself for the first of its machine. Goes when streaming (0.13) takes ranks as arguments.
    world = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(local_ranks)}
    leads = rank % local_ranks == 0
    with in_environment(world), _first_come(leads), _leftovers_named():
        if leads and (removed := remove_dead()):
            log.debug("removed what killed jobs left in shared memory: %s", ", ".join(map(str, removed)))
        if dist.is_initialized():
            dist.barrier()  # all ranks of a machine must find the same numbers free
        return NumberedDataset(
            streams=[SharedStream(location)],
            # A local dataset is looked through at once, so the threads that do it end; a remote one in time.
            predownload=8 * batch if location.is_remote else sys.maxsize,
            num_canonical_nodes=canonical,
            batch_size=batch,
            shuffle=True,
            shuffle_seed=config.seed,
            shuffle_block_size=_SHUFFLE_BLOCK,
            replication=config.parallel.sequence if config.parallel.sequence > 1 else None,
        )


@contextmanager
def _first_come(leads: bool) -> Iterator[None]:
    """Open one job's dataset at a time on a machine.

    Streaming (0.13) looks for a free number in shared memory and takes it later: of two jobs that start together the
    second fails.

    Args:
        leads: the first rank of its machine, which is the one that takes it.
    """
    lock = FileLock(Path(tempfile.gettempdir()) / f"afd_scale-{os.getuid()}.lock", timeout=_OPENING_SECONDS)
    try:
        if leads:
            lock.acquire()
    except (Timeout, OSError) as error:  # two jobs on the same machines may wait for each other
        log.debug("the dataset is opened beside another job's: %s", error)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _leftovers_named() -> Iterator[None]:
    """Where a dataset cannot be opened for what another job left in shared memory, say what it is.

    Raises:
        ConfigError: a block that is no good, and still in use, or of another user.
    """
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        block = unusable()
        if block is None and isinstance(error, PermissionError) and re.match(r"/\d{6,}_", str(error.filename)):
            block = f"{SHARED_MEMORY}{error.filename} must be gone: it is another user's"
        if block is None:
            raise
        raise ConfigError(f"{block}; {REMEDY} ({one_line(error)})") from error


def _is_not_about_replication(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("The `replication` arg")


def _ranks() -> tuple[int, int, int]:
    """Rank, ranks, and ranks on this machine."""
    if not dist.is_initialized():
        return 0, 1, 1
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    counts = {host: hosts.count(host) for host in hosts}
    if len(set(counts.values())) > 1:
        raise ConfigError(f"hosts ({counts}) must run the same number of ranks each: samples are dealt to hosts first")
    return dist.get_rank(), dist.get_world_size(), counts[socket.gethostname()]


def open_shards(location: Location) -> tuple[SharedStream, list[Reader]]:
    """Open the dataset to look samples up; it shares no state with other processes.

    Returns:
        What prepares a shard (downloads and unpacks it), and the shards in order.
    """
    stream = SharedStream(location)
    return stream, stream.get_shards(World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0), False)
