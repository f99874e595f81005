"""Files that are there whole or not at all, and what goes wrong with them in one line."""

import errno
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from afd_scale.config import ConfigError

LONGEST_NAME = 255 - len("..01234567.partial")  # bytes of one that `replacing` can write; file systems take 255

_FULL_OR_FAILING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_SLUG_LETTERS, _SLUG_BYTES = 60, 180


@contextmanager
def system_errors(rule: str, remedy: str = "", only: tuple[int, ...] | None = None) -> Iterator[None]:
    """Turn what the system refuses into ConfigError: the rule, the system's reason, the remedy.

    Args:
        only: error numbers that are the user's to mend; None is all.
    """
    try:
        yield
    except OSError as error:
        if only is not None and error.errno not in only:
            raise
        raise ConfigError(f"{rule}: {error.strerror}{remedy}") from error


def full_disk_explained(out: Path, field: str) -> AbstractContextManager[None]:
    """Turn what a full or failing disk raises into ConfigError."""
    remedy = "; what is finished stays, the same command goes on from there"
    return system_errors(f"{field} ({out}) must have room", remedy, _FULL_OR_FAILING)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A neighbour of `path` to write, which takes its name when the block ends well and all of it is on the disk."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")  # another process may write the same
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """Write a file whole."""
    with replacing(path) as partial:
        partial.write_text(content)


def slug(text: str) -> str:
    """The letters and digits of a text, for a file's name: 60 at most, in 180 bytes at most."""
    short = re.sub(r"\W+", "-", text.lower())[:_SLUG_LETTERS]
    return short.encode()[:_SLUG_BYTES].decode(errors="ignore").strip("-")


def sync(path: Path) -> None:
    """Bring a file to the disk, or a folder's names: a record of it must not outlive it when the machine goes down."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def only_one(lock: Path, rule: str) -> Iterator[None]:
    """Let one process at a time in; ConfigError, the rule, for another."""
    try:
        held = FileLock(lock).acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{rule}: another one is at it") from None
    with held:
        yield
