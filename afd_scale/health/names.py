"""Whether the machines of a run find each other by their names and networks."""

import errno
import fnmatch
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from afd_scale.config import ConfigError
from afd_scale.health.findings import Finding

TOPIC, HOSTS = "names", "hosts"
CONNECT_SECONDS = 3.0
_VIRTUAL = ("lo", "docker*", "veth*", "br-*", "virbr*", "cni*", "flannel*", "cali*", "tun*")  # of containers, mostly

Resolve = Callable[[str], list[str]]


@dataclass(frozen=True)
class Host:
    """A line of a hostfile."""

    name: str
    slots: int


def resolve(name: str) -> list[str]:
    """The IPv4 addresses of a name, in the order in which they are tried; none where it has none."""
    try:
        found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def interfaces() -> dict[str, str]:
    """Networks of this machine that are up and lead to others: name to IPv4 address."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = {}
    for name, addresses in psutil.net_if_addrs().items():
        own = [each.address for each in addresses if each.family == socket.AF_INET]
        if own and name in up and not any(fnmatch.fnmatch(name, pattern) for pattern in _VIRTUAL):
            found[name] = own[0]
    return found


def address_towards(address: str) -> str | None:
    """This machine's own address on the way to another; sends nothing."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def check_own_name(
    name: str,
    addresses: Sequence[str],
    networks: Mapping[str, str],
    environment: Mapping[str, str],
    several: bool,
    towards: str | None = None,
) -> Finding:
    """Whether other machines would reach this one at what its own name stands for.

    Args:
        name, addresses: of this host, as it resolves them itself.
        networks: of `interfaces`.
        environment: a chosen GLOO_SOCKET_IFNAME makes the name unimportant.
        several: gloo joins ranks of several machines; NCCL looks for networks and asks no name.
        towards: this machine's address on the way to the first one.
    """  # fmt: skip
    what, words = "own name", f"{name} is {', '.join(addresses) or 'unknown'}"
    if addresses and not addresses[0].startswith("127."):
        return Finding(TOPIC, what, words)
    if "GLOO_SOCKET_IFNAME" in environment:
        return Finding(TOPIC, what, f"{words}; GLOO_SOCKET_IFNAME={environment['GLOO_SOCKET_IFNAME']}")
    remedy = _choose_interface(networks, towards)
    if several:
        return Finding(TOPIC, what, words, "wrong", "ranks of other machines would look for this one on themselves, "
                       f"and wait: {remedy}; or take the line out of /etc/hosts")  # fmt: skip
    return Finding(TOPIC, what, words, "warning", f"no harm to one machine, nor to NCCL; where gloo joins several "
                   f"machines {remedy}")  # fmt: skip


def check_chosen_interfaces(environment: Mapping[str, str], known: Sequence[str]) -> list[Finding]:
    """Whether the interfaces that variables name are there.

    Args:
        known: all interfaces of this machine, loopback too.
    """
    findings = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = environment.get(variable)
        if not value or value.startswith("^"):  # NCCL: all but these
            continue
        parts = value.removeprefix("=").split(",")
        exact = variable.startswith("GLOO") or value.startswith("=")
        there = [name for name in known if any(name == part or (not exact and name.startswith(part)) for part in parts)]
        if there:
            findings.append(Finding(TOPIC, variable, value))
        else:
            findings.append(
                Finding(TOPIC, variable, f"{value}: there is no such interface", "wrong",
                        f"name one of this machine: {', '.join(known)}")
            )  # fmt: skip
    return findings


def read_hostfile(path: Path) -> list[Host]:
    """Hosts and their slots, as DeepSpeed reads them.

    Raises:
        ConfigError: it cannot be read, a line is no `NAME slots=N`, or a host is there twice.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"hostfile ({path}) must be a readable text: {error}") from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = words[-1].removeprefix("slots=")
        if len(words) != 2 or slots == words[-1] or not slots.isdigit() or int(slots) < 1:
            raise ConfigError(f"hostfile ({path}), line {number} must be `NAME slots=N`: it is {line.strip()!r}")
        if words[0] in hosts:
            raise ConfigError(f"hostfile ({path}), line {number} must name a host once: {words[0]} is there twice")
        hosts[words[0]] = Host(words[0], int(slots))
    if not hosts:
        raise ConfigError(f"hostfile ({path}) must name a host: it is empty")
    return list(hosts.values())


def check_hosts(hosts: Sequence[Host], ssh_port: int = 22, resolve: Resolve = resolve) -> list[Finding]:
    """Whether each host of a hostfile has a name and answers at its ssh port."""
    findings = []
    for host in hosts:
        addresses = resolve(host.name)
        words = f"{host.slots} slots, {', '.join(addresses) or 'no address'}"
        if not addresses:
            remedy = f"add it to /etc/hosts or DNS of this machine: `getent hosts {host.name}` must print it"
            findings.append(Finding(HOSTS, host.name, words, "wrong", remedy))
        elif addresses[0].startswith("127.") and len(hosts) > 1:
            remedy = "the others would look for it on themselves: let it stand for an address of the network"
            findings.append(Finding(HOSTS, host.name, words, "wrong", remedy))
        else:
            findings.append(_reached(HOSTS, host.name, words, addresses[0], ssh_port, "an ssh server"))
    return findings


def check_main_address(address: str, port: int, is_first: bool, several: bool, resolve: Resolve = resolve) -> Finding:
    """Whether ranks of this machine find the place where all meet.

    Args:
        is_first: the machine that MASTER_ADDR names.
        several: a run spans machines.
    """
    what, addresses = "MASTER_ADDR", resolve(address)
    words = f"{address}:{port}, {', '.join(addresses) or 'no address'}"
    if not addresses:
        return Finding(TOPIC, what, words, "wrong", f"`getent hosts {address}` must print it on every machine")
    if several and addresses[0].startswith("127."):
        return Finding(TOPIC, what, words, "wrong", "name the first machine by an address that the others reach")
    if is_first:
        return Finding(TOPIC, what, words)
    return _reached(TOPIC, what, words, addresses[0], port, None)


def _reached(topic: str, what: str, words: str, address: str, port: int, server: str | None) -> Finding:
    """Whether a machine answers at a port.

    Args:
        server: must listen there; None where somebody may do so later.
    """
    try:
        socket.create_connection((address, port), CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        if server is None:
            return Finding(topic, what, f"{words}; reachable")
        return Finding(topic, what, f"{words}; nobody listens at port {port}", "wrong", f"start {server} there")
    except OSError as error:
        reason = errno.errorcode.get(error.errno, "") if error.errno else "it does not answer"
        return Finding(topic, what, f"{words}; port {port}: {error.strerror or reason}", "wrong",
                       f"see routes and firewalls: `nc -vz {address} {port}` must connect")  # fmt: skip
    return Finding(topic, what, f"{words}; reachable")


def _choose_interface(networks: Mapping[str, str], towards: str | None) -> str:
    names = [name for name, address in networks.items() if address == towards] or list(networks)
    if not names:
        return "it needs a network: no interface but loopback is up"
    chosen = f"GLOO_SOCKET_IFNAME={names[0]} NCCL_SOCKET_IFNAME={names[0]}"
    others = f" (or {', '.join(names[1:])})" if names[1:] else ""
    return f"set {chosen}{others} for every rank"
