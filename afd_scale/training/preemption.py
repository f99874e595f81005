"""Being told to stop: SIGTERM (schedulers, launchers) and SIGUSR1. Nothing that was finished is lost by it.

Before the first step, and after the last, there is nothing to save: the run ends at once. In between, the ranks ask one
another whether one was told, at every micro-batch: launchers kill half a minute later, and a step may take minutes. The
step they are in is then given up, the one before it saved, and the next start does it again, exactly.
"""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

from afd_scale.parallel.heartbeats import LostRanksError
from afd_scale.parallel.ranks import Ranks

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_TOLD = "told to stop/"  # and the rank: a key of the store
LONG_STEP_SECONDS = 5.0  # from here on a step may be given up


class Preempted(Exception):
    """The run ends early, has saved what there was to save, and goes on when it is started again."""


class GivenUpError(Exception):
    """The step in progress is given up: the run was told to stop."""


class StopRequest:
    """Whether some rank was told to stop. All ranks look alike: in the same order, as often.

    Attributes:
        made: this process was told.
        holds: the step is brought to its end.
        longest_seconds: between two looks.
    """

    def __init__(self, ranks: Ranks):
        self.ranks, self.made, self.longest_seconds = ranks, False, 0.0
        self.holds, self._long = False, True
        self._asked: Callable[[], list[float]] | None = None
        self._began = self._looked = time.monotonic()

    def begin(self) -> None:
        """From here on it is to be looked at."""
        self._looked = time.monotonic()

    def agreed(self) -> bool:
        """Whether a rank was told to stop by the end of a step."""
        self._time()
        told, seconds = self.ranks.largest([self.made, time.monotonic() - self._began])
        self._long = seconds > LONG_STEP_SECONDS
        return bool(told)

    def between(self) -> None:
        """Look between two micro-batches. What is asked at one look is answered at the next: it waits for nobody.

        Raises:
            GivenUpError: a rank had been told to stop by the last look, on all ranks together.
        """
        if self.holds:
            return
        self._time()
        answer, self._asked = self._asked, self.ranks.ask_largest([self.made])
        if answer is not None and answer()[0]:
            raise GivenUpError

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step. A short one is brought to its end: to keep what it changes would cost more than its repetition."""
        self._began, self.holds = time.monotonic(), not self._long
        try:
            yield
        finally:
            self.holds = False

    def hold(self) -> None:
        """From here on the step is brought to its end: what it changes is not to be had back."""
        self.holds = True

    def _time(self) -> None:
        now = time.monotonic()
        seconds, limit = now - self._looked, seconds_before_kill()
        if max(self.longest_seconds, limit) < seconds and self.ranks.is_main:
            log.warning("being told to stop was not looked at for %.0f s, and launchers kill after %.0f: work between "
                        "two looks is a micro-batch; lower train.micro_batch, or give torchrun a longer "
                        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", seconds, limit)  # fmt: skip
        self.longest_seconds, self._looked = max(self.longest_seconds, seconds), now


@contextmanager
def stopped_by(act: Callable[[], None]) -> Iterator[None]:
    """Act on the signals instead of dying of them.

    The handlers before come back at the end, unless it is that of the run: a scheduler and a launcher both tell it to
    stop, and the second must not kill it on its way out.
    """

    def heard(number: int, frame: FrameType | None) -> None:
        act()

    before = {number: signal.signal(number, heard) for number in SIGNALS}
    try:
        yield
    except Preempted:
        raise
    except BaseException:
        _restore(before)
        raise
    _restore(before)


@contextmanager
def noting(request: StopRequest) -> Iterator[None]:
    """While it lasts, being told to stop is noted; what nobody looked at any more is heard again at its end."""

    def note() -> None:
        request.made = True

    request.begin()
    with stopped_by(note):
        yield
    if request.made:
        signal.raise_signal(signal.SIGTERM)


@contextmanager
def ending_at_once(what: str, ranks: Ranks) -> Iterator[None]:
    """While it lasts, being told to stop ends the run: there is nothing to save.

    Raises:
        Preempted: all ranks were told.
        LostRanksError: only some were, for a launcher tells the rest when one has failed: to start the run again would
            not help.
    """
    told = False

    def end() -> None:
        nonlocal told
        if not told:
            told = True
            raise _ToldError

    with stopped_by(end), _announced(ranks):
        try:
            yield
        except _ToldError:
            if _all_told(ranks, seconds_before_kill() / 2):
                raise Preempted(f"{what}; start it again to go on") from None
            raise LostRanksError("its launcher told it to stop, and not all others: they failed", known=True) from None


@contextmanager
def _announced(ranks: Ranks) -> Iterator[None]:
    """While it lasts, the others can see that this rank was told to stop: from a thread, for a rank that waits in a
    collective runs no handler."""
    if ranks.store is None:
        yield
        return
    # Another connection: in the first one the rank may be waiting. torch's stubs do not have it (2.13).
    store = ranks.store.clone()  # type: ignore[attr-defined]
    reading, writing = socket.socketpair()

    def announce() -> None:
        while number := reading.recv(1):
            if number[0] in SIGNALS:
                store.set(_TOLD + str(ranks.rank), "")

    writing.setblocking(False)
    thread = threading.Thread(target=announce, name="told to stop", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writing.close()
        thread.join()
        reading.close()


def _all_told(ranks: Ranks, seconds: float) -> bool:
    if ranks.store is None:
        return True
    try:
        ranks.store.wait([_TOLD + str(rank) for rank in range(ranks.size)], timedelta(seconds=seconds))
    except RuntimeError:  # too late, or the store is gone with the first rank
        return False
    return True


class _ToldError(BaseException):
    """Raised in the middle of whatever runs, which must not take it for an error of its own."""


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def seconds_before_kill() -> float:
    """How long launchers wait after SIGTERM: torchrun as it is told, DeepSpeed's launcher as torchrun's default."""
    return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
