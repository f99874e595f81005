"""How ranks find one another, and what is said of those that do not come."""

import logging
import threading
from dataclasses import replace

import pytest
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from afd_scale.config import LostInputError
from afd_scale.parallel import meeting
from afd_scale.parallel.launchers import Launched, launched_as
from afd_scale.parallel.meeting import interface_towards, meet, named, network_of


@pytest.fixture
def two() -> Launched:
    return Launched(0, 2, 0, 2, "127.0.0.1", launched_as({}).port)


def test_ranks_meet_at_the_first_one(two: Launched) -> None:
    second = threading.Thread(target=meet, args=(replace(two, rank=1, local_rank=1), 20.0))
    second.start()
    store = meet(two, 20.0)
    second.join()
    store.set("said", "once")
    assert store.get("said") == b"once"


def test_a_rank_that_does_not_come_is_named(two: Launched, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(LostInputError, match=r"2 ranks meet within 0.2 s: rank 1 did"):
        meet(two, 0.2)
    with pytest.raises(LostInputError, match="ranks 1, 2 did not come"):
        meet(replace(two, size=3, local_size=3, port=launched_as({}).port), 0.2)


def test_who_came_to_an_earlier_start_has_not_come_to_this_one(two: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    agents = TCPStore(two.address, int(two.port), None, True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    PrefixStore("afd_scale/0", agents).set("here/1", "")
    meet(two, 20.0)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(LostInputError, match="rank 1 did not come"):
        meet(two, 0.2)


def test_main_rank_says_whom_it_waits_for(
    two: Launched, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "_TOLD_EVERY_SECONDS", 0.2)
    with caplog.at_level(logging.INFO), pytest.raises(LostInputError):
        meet(two, 0.5)
    assert "waiting for rank 1 of 2" in caplog.text


def test_an_address_without_an_answer_is_named(two: Launched) -> None:
    with pytest.raises(LostInputError, match=rf"127\.0\.0\.1:{two.port}\) must answer"):
        meet(replace(two, rank=1, local_rank=1), 0.5)


def test_several_machines_cannot_meet_at_an_address_of_each_alone(two: Launched) -> None:
    with pytest.raises(LostInputError, match=r"MASTER_ADDR \(localhost\) must be an address of the first machine"):
        meet(replace(two, rank=1, address="localhost", local_size=1), 0.5)


def test_network_is_the_one_that_leads_to_the_first_rank(two: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(meeting, "interface_towards", lambda address: f"to {address}")
    nobody = HashStore()
    assert network_of(two, nobody) == {}  # one machine needs none
    afar = replace(two, rank=1, local_size=1, address="10.0.0.1")
    assert network_of(afar, nobody) == {"GLOO_SOCKET_IFNAME": "to 10.0.0.1"}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")  # the user knows
    assert network_of(afar, nobody) == {}


def test_network_of_a_first_machine_whose_name_is_loopback_is_the_one_to_the_others(
    two: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(meeting, "interface_towards", lambda address: f"to {address}")
    store = HashStore()
    store.set("here/0", "127.0.0.1")
    store.set("here/1", "10.0.0.2")
    assert network_of(replace(two, local_size=1), store) == {"GLOO_SOCKET_IFNAME": "to 10.0.0.2"}


def test_interface_is_the_one_that_packets_leave_by() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no such host.") is None


def test_many_ranks_are_named_in_a_line() -> None:
    assert named([3]) == "rank 3"
    assert named(list(range(10))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
