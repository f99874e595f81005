"""Files that are there whole or not at all, and what goes wrong with them in one line."""

import errno
import fcntl
import logging
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from filelock import FileLock, Timeout
from pydantic import AfterValidator, TypeAdapter, ValidationError

from afd_scale.config import ConfigError
from afd_scale.config.errors import shown
from afd_scale.config.plain import MOST_JSON_BYTES, UnreadableError, parse_json
from afd_scale.config.section import first_problem

LONGEST_NAME = 255 - len("..01234567.partial")  # bytes of one that `replacing` can write; file systems take 255

log = logging.getLogger(__name__)

_HELD = (errno.EAGAIN, errno.EACCES)
_FULL_OR_FAILING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_SLUG_LETTERS, _SLUG_BYTES = 60, 180

Value = TypeVar("Value")


def _beside(name: str) -> str:
    """A name leads to no other folder, and file systems take it."""
    if name in ("", ".", "..") or "/" in name or len(name.encode()) > 255:
        raise ValueError(f"a file's name ({shown(name)}) must be one of the same folder")
    return name


FileName = Annotated[str, AfterValidator(_beside)]  # of a file that another one lists


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


def read_json(path: Path, field: str, rule: str, schema: TypeAdapter[Value], remedy: str = "") -> Value:
    """What a JSON file holds, whatever has happened to it since it was written.

    Args:
        field: names it in errors: `field (path) must rule: reason`, and the remedy.
        schema: of its value.
    Raises:
        ConfigError: it cannot be read, is no JSON of at most 256 MiB, or is not of the schema.
    """
    try:
        with path.open("rb") as file:
            return checked_json(file.read(MOST_JSON_BYTES + 1), schema)
    except UnreadableError as error:
        raise ConfigError(f"{field} ({path}) must {rule}: {error}{remedy}") from error
    except (OSError, ValueError) as error:  # a name with a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{field} ({path}) must be readable: {reason}{remedy}") from error


def read_json_lines(path: Path, field: str, rule: str, schema: TypeAdapter[Value], remedy: str = "") -> list[Value]:
    """What the lines of a JSONL file hold; arguments and errors as of `read_json`, which name the line."""
    with system_errors(f"{field} ({path}) must be readable", remedy):
        lines = path.read_bytes().splitlines()
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(checked_json(line, schema))
        except UnreadableError as error:
            raise ConfigError(f"{field} ({path}:{number}) must {rule}: {error}{remedy}") from error
    return values


def checked_json(content: str | bytes, schema: TypeAdapter[Value]) -> Value:
    """The value of a JSON text.

    Raises:
        UnreadableError: a ValueError of one line: it is no JSON, or not of the schema.
    """
    return checked(parse_json(content), schema)


def checked(value: Any, schema: TypeAdapter[Value]) -> Value:
    """A value that was read, as its schema has it; errors as of `checked_json`."""
    try:
        return schema.validate_python(value)
    except ValidationError as error:
        raise UnreadableError(first_problem(error, keys="")) from error


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


def try_lock(path: Path) -> int | None:
    """Lock a file for as long as this process has it open, and lives.

    Returns:
        The open file, locked, or not where the file system has no locks; None where another one has locked it.
    """
    # Not by filelock: without locks it makes a file by which a killed job would keep the lock for ever.
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            os.close(file)
            return None
        log.debug("%s: no locks here: %s", path, error.strerror)
    return file
