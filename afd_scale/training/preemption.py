"""Being told to stop: SIGTERM (schedulers, launchers) and SIGUSR1. Nothing that was finished is lost by it.

Before the first step, and after the last, there is nothing to save: the run ends at once. In between, the ranks ask one
another whether one was told, at every micro-batch: launchers kill half a minute later, and a step may take minutes. The
step they are in is then given up, the one before it saved, and the next start does it again, exactly.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from afd_scale.parallel.ranks import Ranks

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
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
    """Act on the signals instead of dying of them; the handlers before come back at the end."""

    def heard(number: int, frame: FrameType | None) -> None:
        act()

    before = {number: signal.signal(number, heard) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def noting(request: StopRequest) -> Iterator[None]:
    """While it lasts, being told to stop is noted."""

    def note() -> None:
        request.made = True

    with stopped_by(note):
        yield


@contextmanager
def ending_at_once(what: str) -> Iterator[None]:
    """While it lasts, being told to stop raises Preempted: there is nothing to save."""

    def end() -> None:
        raise Preempted(f"{what}; start it again to go on")

    with stopped_by(end):
        yield


def seconds_before_kill() -> float:
    """How long launchers wait after SIGTERM: torchrun as it is told, DeepSpeed's launcher as torchrun's default."""
    return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
