"""Where a dataset's files are, and how `streaming` opens them on this rank."""

import hashlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from filelock import FileLock

from afd_scale.config import ConfigError, RunConfig
from afd_scale.data.schema import FACTS_FILE, HASH, INDEX_FILE, PROMPTS_FILE
from afd_scale.data.torchvision_ops import define_torchvision_ops

if TYPE_CHECKING:
    from streaming import Stream, StreamingDataset
    from streaming.base.format.base.reader import Reader

_SHUFFLE_BLOCK = 1 << 18  # fixed: the order depends on it
_DOWNLOAD_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Location:
    """A dataset, and where this machine has or keeps its files.

    Attributes:
        shards: a folder, or the URL of a remote one.
        cache: folder of the copies of remote ones.
        field: the user's setting that names the dataset, for errors.
    """

    shards: str
    cache: Path
    field: str

    @property
    def is_remote(self) -> bool:
        return is_remote(self.shards)

    @property
    def digest(self) -> str:
        """Names the dataset in the cache."""
        where = self.shards if self.is_remote else os.path.abspath(self.shards)
        return hashlib.blake2b(where.encode(), digest_size=8).hexdigest()

    @property
    def folder(self) -> Path:
        """The files on this machine."""
        return self.cache / self.digest if self.is_remote else Path(self.shards)

    def opening(self) -> dict[str, Any]:
        """What `streaming` is told."""
        remote = self.shards.removeprefix("file://") if self.is_remote else None
        return {
            "remote": remote,
            "local": str(self.folder),
            "download_retry": 2,
            "download_timeout": _DOWNLOAD_TIMEOUT_SECONDS,
            "validate_hash": HASH if remote else None,
            "keep_zip": remote is None,
        }


def is_remote(shards: str) -> bool:
    return "://" in shards


def teacher_data(config: RunConfig) -> Location:
    """The dataset of a run's teacher."""
    return Location(config.data.shards, _cache(config), "data.shards")


def extra_prompts(config: RunConfig) -> Location | None:
    """The dataset of prompts that a run's student rolls out beside the teacher's."""
    return None if config.data.prompts is None else Location(config.data.prompts, _cache(config), "data.prompts")


def evaluation_prompts(config: RunConfig) -> Location:
    """The dataset whose prompts a run is evaluated on."""
    prompts = config.evaluation.prompts
    return teacher_data(config) if prompts is None else Location(prompts, _cache(config), "evaluation.prompts")


def _cache(config: RunConfig) -> Path:
    return config.data.cache or config.out / "shard_cache"


def open_stream(location: Location, config: RunConfig, batch: int) -> "StreamingDataset":
    """Open a dataset to iterate over this rank's samples; a collective.

    Args:
        config: names the order.
        batch: samples of a step on this rank.
    Returns:
        Yields dicts of the schema's columns and `sample`, the position in the dataset.
    Raises:
        ConfigError: the machines do not fit the canonical nodes, or run different numbers of ranks.
    """
    define_torchvision_ops()
    from streaming import StreamingDataset

    class NumberedDataset(StreamingDataset):
        """Adds to each sample its position in the dataset."""

        def __getitem__(self, at: Any) -> Any:
            return {**super().__getitem__(at), "sample": int(at)}

    rank, ranks, local_ranks = _ranks()
    nodes, canonical = ranks // local_ranks, config.data.canonical_nodes
    if nodes % canonical and canonical % nodes:
        raise ConfigError(f"data.canonical_nodes ({canonical}) must divide the number of machines ({nodes}) or be a "
                          "multiple of it: each machine reads whole parts of the data; 1 suits any number")  # fmt: skip
    # Our positions count samples, each once for all ranks of a sequence, so its warning about them is beside the point.
    logging.getLogger("streaming.base.dataset").addFilter(_is_not_about_replication)
    if location.is_remote:
        _release_cache(location.folder)
    with _world_in_environment(rank, ranks, local_ranks):
        return NumberedDataset(
            **location.opening(),
            # A local dataset is looked through at once, so the threads that do it end; a remote one in time.
            predownload=8 * batch if location.is_remote else sys.maxsize,
            num_canonical_nodes=canonical,
            batch_size=batch,
            shuffle=True,
            shuffle_seed=config.seed,
            shuffle_block_size=_SHUFFLE_BLOCK,
            replication=config.parallel.sequence if config.parallel.sequence > 1 else None,
        )


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


@contextmanager
def _world_in_environment(rank: int, ranks: int, local_ranks: int) -> Iterator[None]:
    """Tell `streaming` who we are while it opens a dataset.

    It reads RANK, WORLD_SIZE and LOCAL_WORLD_SIZE and nothing else. The deepspeed launcher and srun do not set the
    last, and every rank would then take itself for the first of its machine. Goes when streaming (0.13) takes ranks as
    arguments.
    """
    world = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(local_ranks)}
    before = {name: os.environ.get(name) for name in world}
    os.environ.update(world)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _release_cache(cache: Path) -> None:
    """Release the cache from a killed run, as the end of that run would have.

    A killed run leaves its claim on the cache folder in shared memory, and streaming (0.13) then refuses the folder to
    the run that resumes. Its own clean-up also unlinks what other jobs on the machine are using.
    """
    for claim in sorted(Path("/dev/shm").glob("[0-9]*_locals")):
        try:
            with claim.open("r+b") as memory:
                # A claim is its length (int32), the folder, and a number, both as text.
                if memory.read()[4:].split(b"\0")[0] == os.path.abspath(cache).encode():
                    memory.seek(0)
                    memory.write(np.int32(0).tobytes())
        except OSError:  # another user's, or gone meanwhile
            continue


def open_shards(location: Location) -> tuple["Stream", list["Reader"]]:
    """Open the dataset to look samples up; it shares no state with other processes.

    Returns:
        What prepares a shard (downloads and unpacks it), and the shards in order.
    """
    define_torchvision_ops()
    from streaming import Stream
    from streaming.base.world import World

    stream = Stream(**location.opening())
    return stream, stream.get_shards(World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0), False)


def fetch_facts(location: Location, *, again: bool = True) -> None:
    """Download what lies beside a remote dataset's shards; nothing for a local one.

    Args:
        again: even if it is here, for it may be of an older dataset.
    Raises:
        ConfigError: it cannot be downloaded.
    """
    if not location.is_remote:
        return
    define_torchvision_ops()
    from streaming.base.storage import CloudDownloader

    remote, folder = location.opening()["remote"], location.folder
    try:
        with download_lock(location):
            downloader = CloudDownloader.get(remote)
            for name in (INDEX_FILE, PROMPTS_FILE, FACTS_FILE):
                if again:
                    (folder / name).unlink(missing_ok=True)
                downloader.download(f"{remote.rstrip('/')}/{name}", str(folder / name), _DOWNLOAD_TIMEOUT_SECONDS)
    except Exception as error:  # every storage has its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{location.field} ({remote}) must be a readable MDS dataset with {FACTS_FILE}: {reason}"
                          ) from error  # fmt: skip


@contextmanager
def download_lock(location: Location) -> Iterator[None]:
    """Let one process at a time write to a remote dataset's cache."""
    if not location.is_remote:
        yield
        return
    location.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(location.folder / ".lock"):
        yield
