"""Being told to stop: SIGTERM (schedulers, launchers) and SIGUSR1 ask a run to save after the step it is in."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """The run ends early, has saved what there was to save, and goes on when it is started again."""


@dataclass
class StopRequest:
    """Whether this process was told to stop; the ranks agree on it between two steps."""

    made: bool = False


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Note the signals instead of dying of them; the handlers before come back at the end."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.made = True

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
