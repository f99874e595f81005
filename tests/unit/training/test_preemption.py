"""Being told to stop where there is nothing to save."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from afd_scale.parallel.heartbeats import LostRanksError
from afd_scale.parallel.ranks import Ranks
from afd_scale.training.preemption import SIGNALS, GivenUpError, Preempted, StopRequest, ending_at_once, noting
from afd_scale.training.steps import StepWatch

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def store() -> Store:
    return PrefixStore("afd_scale", TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=10), wait_for_workers=False))


def told(ranks: Ranks) -> None:
    with ending_at_once("the run was told to stop", ranks):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("it goes on")


def test_a_run_that_is_told_ends_and_is_told_again_in_vain() -> None:
    with pytest.raises(Preempted, match="the run was told to stop; start it again"):
        told(ALONE)
    os.kill(os.getpid(), signal.SIGTERM)  # a launcher passes on what a scheduler has said already


def test_one_of_two_ranks_that_is_told_has_lost_the_other(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")
    with pytest.raises(LostRanksError, match="not all others"):
        told(replace(ALONE, size=2, store=store))


def test_two_ranks_that_are_told_end_the_run(store: Store) -> None:
    store.set("told to stop/1", "")
    with pytest.raises(Preempted):
        told(replace(ALONE, size=2, store=store))


def test_what_nobody_looked_at_is_heard_again_behind_the_steps() -> None:
    def run() -> None:
        with ending_at_once("the run was told to stop", ALONE):
            with noting(StopRequest(ALONE)):
                os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("it goes on")

    with pytest.raises(Preempted):
        run()


def test_a_step_that_is_given_up_leaves_the_memory_of_the_one_before() -> None:
    """Also where it has changed no network yet, as with judges that do not learn."""
    memory = {"mean": torch.tensor(1.0)}
    watch = StepWatch(StopRequest(ALONE), {}, "student", memory)
    with watch.step(kept=True):
        memory["mean"] = torch.tensor(2.0)
    watch.given_up()  # no step is: it ended
    assert memory == {"mean": 2}

    def give_up() -> None:
        with watch.step(kept=True):
            memory["mean"] = torch.tensor(3.0)
            raise GivenUpError

    with pytest.raises(GivenUpError):
        give_up()
    watch.given_up()
    assert memory == {"mean": 2}


def test_handlers_come_back_where_nobody_is_told() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ending_at_once("", ALONE):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
