"""Where a dataset's files are, on a shared file system or in a machine's copy of a remote one."""

import hashlib
import os
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from afd_scale.config import ConfigError, RunConfig, one_line
from afd_scale.data.schema import FACTS_FILE, INDEX_FILE, PROMPTS_FILE
from afd_scale.files import replacing, system_errors
from afd_scale.torchvision_ops import define_torchvision_ops

DOWNLOAD_TIMEOUT_SECONDS = 600.0
_SHARD_LOCKS = 32  # of a cache


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

    @property
    def remote(self) -> str | None:
        """What `streaming` calls a remote dataset."""
        return self.shards.removeprefix("file://") if self.is_remote else None


def is_remote(shards: str) -> bool:
    return "://" in shards


def locations(config: RunConfig) -> list[Location]:
    """Every dataset that a run reads, each once."""
    found = {location.shards: location for location in (evaluation_prompts(config), extra_prompts(config)) if location}
    return list((found | {config.data.shards: teacher_data(config)}).values())


def teacher_data(config: RunConfig) -> Location:
    """The dataset of a run's teacher."""
    return _location(config.data.shards, config, "data.shards")


def extra_prompts(config: RunConfig) -> Location | None:
    """The dataset of prompts that a run's student rolls out beside the teacher's."""
    return None if config.data.prompts is None else _location(config.data.prompts, config, "data.prompts")


def evaluation_prompts(config: RunConfig) -> Location:
    """The dataset whose prompts a run is evaluated on."""
    prompts = config.evaluation.prompts
    return teacher_data(config) if prompts is None else _location(prompts, config, "evaluation.prompts")


def _location(shards: str, config: RunConfig, field: str) -> Location:
    cache = config.out / "shard_cache"
    if is_remote(shards):
        cache /= socket.gethostname()  # copies are a machine's own, and `out` is seen by all
    return Location(shards, config.data.cache or cache, field)


def fetch_facts(location: Location, *, again: bool = True) -> None:
    """Download what lies beside a remote dataset's shards; nothing for a local one.

    Args:
        again: even if it is here, for it may be of an older dataset.
    Raises:
        ConfigError: it cannot be downloaded.
    """
    if not location.is_remote:
        return
    with cache_lock(location):
        for name in (INDEX_FILE, PROMPTS_FILE, FACTS_FILE):
            path = location.folder / name
            if again or not path.exists():
                with replacing(path) as partial:  # another job of this machine may be reading the present one
                    download(location, name, partial)


def download(location: Location, name: str, path: Path) -> None:
    """Copy a file of a remote dataset; ConfigError where it cannot be had."""
    define_torchvision_ops()
    from streaming.base.storage import CloudDownloader

    assert location.remote is not None
    source = f"{location.remote.rstrip('/')}/{name}"
    try:
        CloudDownloader.get(source).download(source, str(path), DOWNLOAD_TIMEOUT_SECONDS)
    except Exception as error:  # every storage has its own
        reason = one_line(f"{type(error).__name__}: {error}")
        raise ConfigError(f"{location.field} ({location.remote}) must be a readable MDS dataset with {name}: {reason}"
                          ) from error  # fmt: skip


@contextmanager
def cache_lock(location: Location, file: str | None = None) -> Iterator[None]:
    """Let one process of a machine at a time write to a remote dataset's cache.

    Args:
        file: what is written; None is what lies beside the shards.
    Raises:
        ConfigError: the cache cannot be written to.
    """
    number = "" if file is None else f".{zlib.crc32(file.encode()) % _SHARD_LOCKS}"
    with system_errors(f"data.cache ({location.cache}) must be a folder that can be written to"):
        location.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(location.folder / f".lock{number}"):
            yield
