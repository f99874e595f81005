"""Signs of life: each rank of a run says in a file what it is at, so that one that is dead or stuck can be named.

The files lie in the run's folder, which all machines share. Their times are compared with one another and with no
clock: those of two machines differ.
"""

import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import psutil
from pydantic import TypeAdapter
from torch.distributed import DistError

from afd_scale.config import one_line
from afd_scale.parallel.meeting import named

log = logging.getLogger(__name__)

FOLDER = "heartbeats"
BEAT_SECONDS = 5.0  # of the main rank, and of the others where there are at most 500
_SIGNS_PER_SECOND = 100.0  # that a shared file system is given to write
_SOONER = 0.2  # of the time between two signs: after it a new phase is told
SILENT_BEATS = 6  # without a sign: dead or stopped, or its machine is
_LOOK_SECONDS = 15.0  # at the others, of whom there may be a thousand
_LAST_WORDS_SECONDS = 10.0  # until the ranks that live have said how they ended
_PACKAGE = str(Path(__file__).parents[1])
_OF_GLOO = re.compile(r"gloo/|Timed out waiting|Application timeout", re.IGNORECASE)  # its file names


class LostRanksError(Exception):
    """Other ranks are gone; one line says which.

    Attributes:
        known: it does; otherwise what lies behind it may tell more.
    """

    def __init__(self, line: str, known: bool):
        super().__init__(line)
        self.known = known


@dataclass(frozen=True)
class Sign:
    """What a rank last said.

    Attributes:
        phase: of the run, and its step.
        place: in the code of this package.
        seconds: since it came to this phase.
        age: seconds since it started.
        end: why it ended; None while it runs.
        bereaved: it ended because others were lost.
        written: the file's time, seconds.
    """

    rank: int
    host: str
    pid: int
    phase: str
    place: str
    seconds: float
    age: float
    end: str | None = None
    bereaved: bool = False
    written: float = 0.0

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def at(self) -> str:
        return f"{self.phase} for {self.seconds:.0f} s, in {self.place}"


_SIGN = TypeAdapter(Sign)


class Heart:
    """Writes this rank's signs from a thread of its own, and on the main rank tells of others that fall silent.

    Attributes:
        phase: that this rank is at.
    """

    def __init__(
        self, folder: Path, rank: int, size: int, tell: Callable[[str], None] | None = None,
        machine: Sequence[int] | None = None,
    ):  # fmt: skip
        """Args:
            folder: of the run.
            tell: what the main rank does with a line about another; None looks at none.
            machine: ranks of this one's; None are all.
        """  # fmt: skip
        self.folder, self.rank, self.size, self._tell = folder / FOLDER, rank, size, tell
        # A thousand that read of a thousand would be a million files at once.
        self._looked_at = range(size) if rank == 0 or machine is None else machine
        others = max(BEAT_SECONDS, size / _SIGNS_PER_SECOND)
        self.beat_seconds, self._silent_seconds = BEAT_SECONDS if rank == 0 else others, SILENT_BEATS * others
        self.host = socket.gethostname()
        self.phase, self._since, self._began = "start", time.monotonic(), time.monotonic()
        self._main_thread = threading.main_thread().ident
        self._stop, self._changed, self._silent = threading.Event(), threading.Event(), set[int]()
        self._seen: dict[int, tuple[float, float]] = {}  # when each sign was written, and when that was first seen
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread.start()

    def at(self, phase: str) -> None:
        """From now on this rank is at something else."""
        self.phase, self._since = phase, time.monotonic()
        self._changed.set()

    def end(self, error: BaseException | None = None) -> None:
        """Beat no more; without an error all went well, and nothing is left to read."""
        self._stop.set()
        self._changed.set()
        self._thread.join()
        if error is None:
            self._path(self.rank).unlink(missing_ok=True)
            with suppress(OSError):  # others are in it still
                self.folder.rmdir()
        else:
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            place = _place_of(trace.tb_frame if trace is not None else None)
            with suppress(OSError):  # a full disk must not hide the error, which may be that
                self._write(place, f"{type(error).__name__}: {one_line(error)[:300]}", is_bereavement(error))

    def lost(self) -> tuple[str, bool]:
        """Which ranks made this one fail, after it has said its own end, and whether that is known.

        The first rank that is left on a machine tells of that machine, whose processes it sees; and the main rank of
        those that have no last word after a while, for it sees all signs.
        """
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while True:
            signs = self._read()
            here = {rank: sign for rank, sign in signs.items() if sign.host == self.host and rank != self.rank}
            faults = {rank: fault for rank, sign in here.items() if (fault := _fault(sign))}
            first = min((rank for rank in here if rank not in faults), default=self.rank)
            if first < self.rank:
                return f"others are lost; rank {first} says which", True
            late = time.monotonic() > deadline
            if faults:
                return "; ".join(f"{signs[rank]} {fault}" for rank, fault in sorted(faults.items())[:4]), True
            if late:
                return self._no_last_words(signs) or f"no rank is known to be lost; {self.places()}", False
            time.sleep(0.2)

    def _no_last_words(self, signs: dict[int, Sign]) -> str:
        """Of the main rank: those that have not said how they end; they may wait for the others still."""
        silent = [sign for sign in signs.values() if sign.end is None and sign.rank != 0] if self.rank == 0 else []
        return "; ".join(f"{sign} has no last word; its last sign was {sign.at}" for sign in silent[:4])

    def places(self) -> str:
        """Where the ranks are, those at one place together, the fewest first: one that is alone holds up the rest."""
        at: dict[str, list[int]] = {}
        for rank, sign in self._read().items():
            at.setdefault(f"{sign.phase}, in {sign.place}", []).append(rank)
        return "; ".join(f"{named(ranks)} at {place}" for place, ranks in sorted(at.items(), key=lambda x: len(x[1])))

    def _beat(self) -> None:
        looked = time.monotonic()
        sooner = _SOONER * self.beat_seconds
        while not self._stop.wait(sooner):
            self._changed.wait(self.beat_seconds - sooner)
            self._changed.clear()
            with suppress(OSError):  # a file system that fails for a while; the run has more to say of it
                self._write()
                if self._tell is not None and time.monotonic() - looked > _LOOK_SECONDS:
                    looked = time.monotonic()
                    self._look_around(self._tell)

    def _look_around(self, tell: Callable[[str], None]) -> None:
        signs = self._read()
        now = time.monotonic()
        for rank, sign in signs.items():  # by this clock: those of other machines differ
            if self._seen.get(rank, (0.0, 0.0))[0] != sign.written:
                self._seen[rank] = (sign.written, now)
        quiet = {rank: now - self._seen[rank][1] for rank, sign in signs.items() if sign.end is None}
        silent = {rank for rank, seconds in quiet.items() if seconds > self._silent_seconds}
        for rank in sorted(silent - self._silent):
            tell(f"{signs[rank]} has given no sign for {quiet[rank]:.0f} s; its last was {signs[rank].at}")
        for rank in sorted((self._silent & signs.keys()) - silent):
            tell(f"rank {rank} gives signs again")
        self._silent = silent

    def _write(self, place: str | None = None, end: str | None = None, bereaved: bool = False) -> None:
        now = time.monotonic()
        sign = Sign(self.rank, self.host, os.getpid(), self.phase, place or self._place(), now - self._since,
                    now - self._began, end, bereaved)  # fmt: skip
        path = self._path(self.rank)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(sign)))
        partial.replace(path)

    def _read(self) -> dict[int, Sign]:
        """By rank, as far as they can be read."""
        signs = {rank: read_sign(self._path(rank)) for rank in self._looked_at}
        return {rank: sign for rank, sign in signs.items() if sign is not None}

    def _path(self, rank: int) -> Path:
        return sign_path(self.folder.parent, rank)

    def _place(self) -> str:
        """Where the main thread is."""
        frame = sys._current_frames().get(self._main_thread or 0)
        return _place_of(frame)


def _place_of(frame: FrameType | None) -> str:
    """The innermost function of this package that a frame is in."""
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "other code"
    return f"{Path(frame.f_code.co_filename).relative_to(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"


def sign_path(folder: Path, rank: int) -> Path:
    """In a run's folder."""
    return folder / FOLDER / f"rank_{rank:05d}.json"


def read_sign(path: Path) -> Sign | None:
    """None where there is none that can be read."""
    try:
        return _SIGN.validate_python(json.loads(path.read_text()) | {"written": path.stat().st_mtime})
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _fault(sign: Sign) -> str | None:
    """What is wrong with a rank of this machine; None where it lives, or ended because of others."""
    if sign.end is not None:
        return None if sign.bereaved else f"failed at {sign.at}: {sign.end}"
    try:
        state = psutil.Process(sign.pid).status()
    except psutil.NoSuchProcess:
        state = psutil.STATUS_ZOMBIE
    if state == psutil.STATUS_ZOMBIE:
        return f"is gone; its last sign was {sign.at}"
    return f"is stopped; its last sign was {sign.at}" if state == psutil.STATUS_STOPPED else None


@contextmanager
def living(folder: Path, rank: int, size: int, machine: Sequence[int] | None = None) -> Iterator[Heart]:
    """Give signs of life; what others' deaths make of this rank becomes a line that names them.

    Args:
        folder: of the run.
        machine: ranks of this one's; None are all.
    Raises:
        LostRanksError: other ranks are gone, or did not come to a collective in time.
    """
    heart = Heart(folder, rank, size, log.warning if rank == 0 else None, machine)
    heart.start()
    try:
        yield heart
    except Exception as error:
        heart.end(error)
        if is_bereavement(error):
            raise LostRanksError(*heart.lost()) from error
        raise
    heart.end()


def is_bereavement(error: BaseException) -> bool:
    """Whether an exception says that other ranks are lost, or did not come to a collective in time."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and bool(_OF_GLOO.search(str(error))))
