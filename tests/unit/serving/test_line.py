"""Turns for one worker: their order and places, and that whoever goes frees it."""

import threading
import time

import pytest

from afd_scale.serving.line import FullError, LeftError, Line, Turn
from tests.live_server import until


@pytest.fixture
def line():
    line = Line(longest=2)
    yield line
    line.close(5)


class Work:
    """Work that goes on until it is told to end, or its turn is left."""

    def __init__(self, log=None):
        self.begun, self.end, self.places, self.log = threading.Event(), threading.Event(), [], log
        self.left = False
        self.turn = Turn(self.run, self.places.append)

    def run(self, turn):
        if self.log is not None:
            self.log.append(self)
        self.begun.set()
        try:
            turn.wait_for(self.end.is_set, 10)
        except LeftError:
            self.left = True
            raise

    def finish(self):
        self.end.set()
        self.turn.wake()


def test_turns_are_made_one_after_the_other_and_told_their_places(line):
    log = []
    works = [Work(log) for _ in range(3)]
    line.join(works[0].turn)
    assert works[0].begun.wait(5)
    for work in works[1:]:
        line.join(work.turn)
    assert (line.waiting, line.is_free) == (2, False)
    with pytest.raises(FullError, match="2 wait already"):
        line.join(Work().turn)
    for number, work in enumerate(works):
        assert work.begun.wait(5)
        assert not any(later.begun.is_set() for later in works[number + 1 :])
        work.finish()
    until(lambda: line.is_free)
    assert log == works
    assert [work.places[1:] if work is works[0] else work.places for work in works] == [[0], [1, 0], [2, 1, 0]]


def test_one_who_goes_frees_the_worker_and_moves_the_others(line):
    works = [Work() for _ in range(3)]
    for work in works:
        line.join(work.turn)
        assert works[0].begun.wait(5)
    assert line.leave(works[1].turn), "it never begins"
    until(lambda: works[2].places[-1] == 1)
    began = time.monotonic()
    assert not line.leave(works[0].turn)
    assert works[2].begun.wait(5)
    assert time.monotonic() - began < 5
    assert works[0].left
    assert not works[1].begun.is_set()
    works[2].finish()
    until(lambda: line.is_free)
    assert not line.leave(works[2].turn), "one that is over is no error"


def test_work_that_fails_is_logged_and_the_next_goes_on(line, caplog):
    def fail(turn):
        raise RuntimeError("out of\nmemory")

    line.join(Turn(fail))
    work = Work()
    line.join(work.turn)
    assert work.begun.wait(5)
    work.finish()
    assert caplog.messages == ["what was asked for could not be made: RuntimeError: out of memory"]


def test_a_closed_line_ends_all(line):
    works = [Work(), Work()]
    for work in works:
        line.join(work.turn)
    assert works[0].begun.wait(5)
    line.close(5)
    assert works[0].left
    assert not works[1].begun.is_set()
    with pytest.raises(FullError, match="stopping"):
        line.join(Work().turn)


def test_waiting_ends_in_time(line):
    held = []

    def wait(turn):
        held.append(turn.wait_for(lambda: False, 0.05))

    line.join(Turn(wait))
    until(lambda: held == [False])
