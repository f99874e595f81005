"""Names and networks of machines that would wait for each other, and of those that would not."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from afd_scale.config import ConfigError
from afd_scale.health.names import (
    Host,
    check_chosen_interfaces,
    check_hosts,
    check_main_address,
    check_own_name,
    interfaces,
    read_hostfile,
    resolve,
)

NETWORKS = {"eth0": "10.0.0.1", "ib0": "10.1.0.1"}


@pytest.fixture
def listening() -> Iterator[int]:
    """A port of this machine at which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_name_that_leads_to_the_machine_itself() -> None:
    several = check_own_name("node-a", ["127.0.1.1"], NETWORKS, {}, several=True)
    assert (several.state, several.value) == ("wrong", "node-a is 127.0.1.1")
    assert "set GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0 (or ib0) for every rank" in several.remedy
    towards = check_own_name("node-a", ["127.0.1.1"], NETWORKS, {}, several=True, towards="10.1.0.1")
    assert "set GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0 for every rank" in towards.remedy
    assert check_own_name("node-a", ["127.0.1.1"], NETWORKS, {}, several=False).state == "warning"
    assert check_own_name("node-a", [], {}, {}, several=True).state == "wrong"


def test_a_name_that_others_reach_or_that_nobody_asks_for() -> None:
    assert check_own_name("node-a", ["10.0.0.1"], NETWORKS, {}, several=True).state == "ok"
    chosen = {"GLOO_SOCKET_IFNAME": "eth0"}
    assert check_own_name("node-a", ["127.0.1.1"], NETWORKS, chosen, several=True).state == "ok"


@pytest.mark.parametrize(
    ("variable", "value", "state"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", "ok"),
        ("GLOO_SOCKET_IFNAME", "eth", "wrong"),
        ("GLOO_SOCKET_IFNAME", "ens3", "wrong"),
        ("NCCL_SOCKET_IFNAME", "eth", "ok"),  # NCCL: a beginning
        ("NCCL_SOCKET_IFNAME", "=eth", "wrong"),
        ("NCCL_SOCKET_IFNAME", "ens3,ib", "ok"),
        ("NCCL_SOCKET_IFNAME", "ens", "wrong"),
    ],
)
def test_interfaces_that_were_chosen_are_there(variable: str, value: str, state: str) -> None:
    (found,) = check_chosen_interfaces({variable: value}, ["lo", "eth0", "ib0"])
    assert found.state == state


def test_interfaces_that_are_left_out_need_not_be_there() -> None:
    assert check_chosen_interfaces({"NCCL_SOCKET_IFNAME": "^docker0"}, ["lo"]) == []
    assert check_chosen_interfaces({}, ["lo"]) == []


def test_networks_of_this_machine_lead_elsewhere() -> None:
    assert not [address for address in interfaces().values() if address.startswith("127.")]


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# nodes\nnode-0 slots=8\n\nnode-1 slots=4  # half\n")
    assert read_hostfile(tmp_path / "hosts") == [Host("node-0", 8), Host("node-1", 4)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("node-0\n", "line 1 must be `NAME slots=N`: it is 'node-0'"),
        ("node-0 slots=8\nnode-1 8\n", "line 2 must be"),
        ("node-0 slots=0\n", "line 1 must be"),
        ("node-0 slots=8\nnode-0 slots=8\n", "line 2 must name a host once"),
        ("# none\n", "must name a host: it is empty"),
    ],
)
def test_a_hostfile_that_is_none(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_hostfile(tmp_path / "hosts")
    assert reason in str(caught.value)
    with pytest.raises(ConfigError, match=r"^hostfile \(.*absent\) must be a readable text"):
        read_hostfile(tmp_path / "absent")


def test_hosts_have_a_name_and_an_ssh_server(listening: int) -> None:
    here = {"node-0": ["127.0.0.1"]}
    (found,) = check_hosts([Host("node-0", 8)], listening, lambda name: here.get(name, []))
    assert (found.state, found.value) == ("ok", "8 slots, 127.0.0.1; reachable")
    (found,) = check_hosts([Host("node-0", 8)], closed_port(), lambda name: here.get(name, []))
    assert found.state == "wrong"
    assert found.remedy == "start an ssh server there"
    one, other = check_hosts([Host("node-0", 8), Host("node-1", 8)], listening, lambda name: here.get(name, []))
    assert one.state == other.state == "wrong"
    assert "on themselves" in one.remedy
    assert "`getent hosts node-1` must print it" in other.remedy


def test_where_ranks_meet(listening: int) -> None:
    def local(name: str) -> list[str]:
        return ["127.0.0.1"]

    assert check_main_address("node-0", listening, False, False, local).value.endswith("; reachable")
    # Nobody listens before the first rank is there.
    assert check_main_address("node-0", closed_port(), False, False, local).state == "ok"
    assert check_main_address("node-0", 1, False, True, local).state == "wrong"
    assert check_main_address("node-0", 1, False, False, lambda name: []).state == "wrong"
    assert check_main_address("node-0", 1, True, True, lambda name: ["10.9.9.9"]).state == "ok"


def test_names_are_resolved() -> None:
    assert resolve("localhost") == ["127.0.0.1"]
    assert resolve("no-such-host.invalid") == []
