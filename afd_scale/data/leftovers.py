"""What jobs leave in a machine's shared memory and temporary folder, and whether anybody still uses it.

MosaicML Streaming (0.13) numbers the datasets that are open on a machine. To a number belong blocks of shared memory,
`/dev/shm/000000_*`, and two lock files in the temporary folder. A job that is killed leaves both. The next one that
comes to the number takes the blocks for its own: an empty one cannot be mapped, one of another size does not fit, and
a position to resume from was another job's.

A block is dead when no process of the machine has it open: every process of a job keeps its blocks open to its end. The
kernel knows that, by a lease for writing, which it grants only where nobody else has the file open. That holds for
processes of other containers too, which /proc does not show.
"""

import fcntl
import os
import re
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SHARED_MEMORY = Path("/dev/shm")
REMEDY = "`tools/doctor.py --clean` removes it where no job uses it; else end that job, or let its owner remove it"

# Of Streaming's blocks, with the bytes of those whose size does not depend on the dataset.
_BLOCKS: dict[str, int | None] = {
    "locals": None, "barrier": 12, "next_epoch": 8, "cache_usage": 8, "shard_states": None, "shard_access_times": None,
    "resume": os.sysconf("SC_PAGESIZE"), "epoch_shape": 40, "epoch_data": None,
}  # fmt: skip
_LOCKS = ("barrier_filelock", "cache_filelock")

Use = Literal["used", "dead", "another user's", "unknown"]


@dataclass(frozen=True)
class Leftover:
    """A block or a lock file of Streaming's, and who uses it.

    Attributes:
        use: `unknown` where the system does not say whether it is open.
    """

    path: Path
    use: Use
    bytes: int


def blocks(folder: Path = SHARED_MEMORY) -> list[Leftover]:
    """Streaming's blocks in shared memory."""
    return [found for path in _numbered(folder, _BLOCKS) if (found := _look_at(path)) is not None]


def lock_files(used: list[Leftover], folder: Path | None = None) -> list[Leftover]:
    """Streaming's lock files in the temporary folder; dead are those of a number whose blocks nobody uses.

    Args:
        used: the blocks of shared memory, whose jobs open their locks only now and then.
    """
    numbers = {_number(block.path) for block in used if block.use != "dead"}
    found = []
    for path in _numbered(folder or Path(tempfile.gettempdir()), _LOCKS):
        with suppress(FileNotFoundError):
            mine = os.geteuid() in (0, path.stat().st_uid)
            use: Use = "used" if _number(path) in numbers else "dead"
            found.append(Leftover(path, use if mine else "another user's", 0))
    return found


def remove_dead(folder: Path = SHARED_MEMORY) -> list[Path]:
    """Remove the blocks that nobody has open; returns them."""
    removed = []
    for path in _numbered(folder, _BLOCKS):
        with suppress(OSError), _to_oneself(path) as use:
            if use == "dead":
                path.unlink()  # nobody can open it meanwhile
                removed.append(path)
    return removed


def remove_dead_locks(folder: Path | None = None, memory: Path = SHARED_MEMORY) -> list[Path]:
    """Remove the lock files of numbers whose blocks nobody uses; returns them."""
    removed = []
    for lock in lock_files(blocks(memory), folder):
        if lock.use != "dead":
            continue
        with suppress(OSError), lock.path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # who waits for it then finds that it is gone
            lock.path.unlink()
            removed.append(lock.path)
    return removed


def unusable(folder: Path = SHARED_MEMORY) -> str | None:
    """A block that no dataset can be opened beside, and why; None where there is none."""
    for path in _numbered(folder, _BLOCKS):
        with suppress(OSError):
            if reason := _fault(path):
                return f"{path} ({path.stat().st_size} bytes) {reason}"
    return None


def _fault(path: Path) -> str | None:
    """Why Streaming could not use a block."""
    content, kind = path.read_bytes(), path.name.partition("_")[2]
    expected = _BLOCKS[kind]
    if not content:
        return "must hold something: a job was killed before it wrote it"
    if expected is not None and len(content) != expected:
        return f"must have {expected} bytes: it is of another program, or of a job that was killed"
    if kind == "locals":
        try:  # its length (int32), folders and a number, as text
            int(content[4 : int.from_bytes(content[:4], "little", signed=True)].decode().split("\0")[-1] or 0)
        except ValueError:
            return "must name the folders of a job: it was not written to its end"
    return None


def _numbered(folder: Path, kinds: dict[str, int | None] | tuple[str, ...]) -> list[Path]:
    named = re.compile(rf"\d{{6,}}_({'|'.join(kinds)})")
    with suppress(FileNotFoundError):
        return sorted(path for path in folder.iterdir() if named.fullmatch(path.name) and not path.is_symlink())
    return []


def _number(path: Path) -> str:
    return path.name.partition("_")[0]


def _look_at(path: Path) -> Leftover | None:
    """One that is there; None if it is gone meanwhile."""
    try:
        size = path.stat().st_size
        with _to_oneself(path) as use:
            return Leftover(path, use, size)
    except FileNotFoundError:
        return None


@contextmanager
def _to_oneself(path: Path) -> Iterator[Use]:
    """Who uses a block; if nobody does, nobody else can open it while this lasts."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
    except PermissionError:
        yield "another user's"
        return
    except BlockingIOError:  # another process holds it to itself just now
        yield "used"
        return
    try:
        yield _lease(file)
    finally:
        os.close(file)  # ends the lease


def _lease(file: int) -> Use:
    try:
        # The holder is told when another process wants the file; by default with a signal that would end it.
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except BlockingIOError:
        return "used"
    except PermissionError:
        return "another user's"
    except OSError:  # a system without leases
        return "unknown"
    return "dead"
