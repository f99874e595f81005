"""Who waits for the one worker: a model makes one video at a time, and whoever asks has a turn.

    join -> place 1, 2, ... -> place 0, the work runs on the worker's thread -> over

A turn that nobody waits for any more is left: before it begins it is dropped, after that its work looks now and then
and ends by `LeftError`.
"""

import logging
from collections import deque
from collections.abc import Callable
from threading import Condition, Thread

from afd_scale.config import one_line

log = logging.getLogger(__name__)


class FullError(Exception):
    """Too many wait already; one line."""


class LeftError(Exception):
    """Nobody waits for this work any more."""


class Turn:
    """One piece of work for somebody.

    Args:
        work: is done on the worker's thread, and given this turn; it tells who asked how it went.
        moved: is told the turn's place when that changes, 0 when it begins; on any thread, and must not wait.
    """

    def __init__(self, work: Callable[["Turn"], None], moved: Callable[[int], None] = lambda place: None):
        self.work, self.moved = work, moved
        self._changed, self._left = Condition(), False

    @property
    def left(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._left

    def leave(self) -> None:
        self._left = True
        self.wake()

    def check(self) -> None:
        """Raises LeftError where nobody waits for the work any more."""
        if self._left:
            raise LeftError

    def wake(self) -> None:
        """What `wait_for` waits for may have come."""
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait on the worker's thread; whether the condition holds in time.

        Raises:
            LeftError: nobody waits for the work any more.
        """
        with self._changed:
            holds = self._changed.wait_for(lambda: self._left or condition(), seconds)
        self.check()
        return holds


class Line:
    """Turns one after the other, first come, first served, on a thread of its own until it is closed.

    Args:
        longest: turns that may wait while another one is at work.
    """

    def __init__(self, longest: int):
        self.longest = longest
        self._waiting: deque[Turn] = deque()
        self._at_work: Turn | None = None
        self._closed, self._changed = False, Condition()
        self._thread = Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()

    @property
    def is_free(self) -> bool:
        """Whether nothing is at work, and nothing waits."""
        with self._changed:
            return self._at_work is None and not self._waiting

    @property
    def waiting(self) -> int:
        """Turns that wait."""
        return len(self._waiting)

    def join(self, turn: Turn) -> None:
        """Add a turn.

        Raises:
            FullError: too many wait.
        """
        with self._changed:
            if self._closed:
                raise FullError("the server is stopping")
            if len(self._waiting) >= self.longest:
                raise FullError(f"{len(self._waiting)} wait already, as many as may: try again later")
            self._waiting.append(turn)
            turn.moved(len(self._waiting) - (self._at_work is None))
            self._changed.notify_all()

    def leave(self, turn: Turn) -> bool:
        """Take a turn out, or end its work at its next look; one that is over already is no error.

        Returns:
            Whether its work has not begun, and never will.
        """
        turn.leave()
        with self._changed:
            if turn not in self._waiting:
                return False
            self._waiting.remove(turn)
            self._tell_places()
            return True

    def close(self, seconds: float = 30.0) -> None:
        """End what is at work, drop what waits, and wait for the thread."""
        with self._changed:
            self._closed = True
            turns = [*self._waiting, *([self._at_work] if self._at_work else [])]
            self._waiting.clear()
            self._changed.notify_all()
        for turn in turns:
            turn.leave()
        self._thread.join(seconds)

    def _run(self) -> None:
        while (turn := self._next()) is not None:
            try:
                turn.work(turn)
            except LeftError:
                pass
            except Exception as error:  # whatever one piece of work meets, the next one has its turn
                log.error("what was asked for could not be made: %s: %s", type(error).__name__, one_line(error))

    def _next(self) -> Turn | None:
        """Wait for the next turn; None when the line is closed."""
        with self._changed:
            self._at_work = None
            self._changed.wait_for(lambda: self._closed or bool(self._waiting))
            if self._closed:
                return None
            turn = self._at_work = self._waiting.popleft()
            turn.moved(0)
            self._tell_places()
            return turn

    def _tell_places(self) -> None:
        for place, turn in enumerate(self._waiting, 1):
            turn.moved(place)
