"""How the ranks of a run find one another: at the first one's address, over a network that leads there, in time."""

import logging
import os
import socket
import time
from datetime import timedelta

import psutil
from torch.distributed import DistStoreError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from afd_scale.config import LostInputError, one_line
from afd_scale.parallel.launchers import Launched

log = logging.getLogger(__name__)

MEETING_SECONDS = 600.0  # from the first rank's start to the last one's: containers and imports take minutes
_TOLD_EVERY_SECONDS = 15.0


def meet(launched: Launched, seconds: float = MEETING_SECONDS) -> Store:
    """Wait until every rank of a run is at the first one's address; say who is not.

    Returns:
        Where they have met, for the process group.
    Raises:
        LostInputError: the address is none that other machines reach, it does not answer, or a rank does not come.
    """
    # torchrun's store outlives a start: at `--max-restarts` the next one must not find what this one said.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"afd_scale/{start}", _open_store(launched, seconds))
    store.set(_here(launched.rank), own_address_towards(launched.address) or "")
    deadline, missing = time.monotonic() + seconds, list(range(launched.size))
    while missing:
        try:
            store.wait([_here(rank) for rank in missing], timedelta(seconds=min(_TOLD_EVERY_SECONDS, seconds)))
            missing = []
        except DistStoreError:
            # One rank asks for each, or a thousand would ask a thousand times, and the store do nothing else.
            if launched.rank == 0 or time.monotonic() > deadline:
                missing = [rank for rank in missing if not store.check([_here(rank)])]
        except RuntimeError as error:  # the first rank is gone, and the store with it
            raise LostInputError(
                f"{_place(launched)} must stay until all ranks have come: {one_line(error)}"
            ) from error
        if missing and time.monotonic() > deadline:
            raise LostInputError(f"{_place(launched)} must be where {launched.size} ranks meet within {seconds:g} s: "
                                 f"{named(missing)} did not come; their own output says why")  # fmt: skip
        if missing and launched.rank == 0:
            log.info("%s: waiting for %s of %d", _place(launched), named(missing), launched.size)
    return store


def own_address_towards(address: str) -> str | None:
    """Of this machine's addresses the one that packets to another leave from; None where the system does not say."""
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # of a datagram socket: nothing is sent
            own: str = probe.getsockname()[0]
    except OSError:
        return None
    return own


def interface_towards(address: str) -> str | None:
    """The network interface by which packets to an address leave; None where the system does not say."""
    own = own_address_towards(address)
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == own for each in addresses):
            return name
    return None


def network_of(launched: Launched, store: Store) -> dict[str, str]:
    """Variables by which gloo takes the network that leads to the first rank, and on its machine to the others.

    Left alone, it takes the one that the machine's own name stands for: 127.0.0.1 or 127.0.1.1 on many, where no
    other machine reaches it.

    Args:
        store: where the ranks have met.
    """
    if launched.local_size == launched.size or "GLOO_SOCKET_IFNAME" in os.environ:
        return {}
    address = launched.address
    if _is_loopback(address):  # the first machine by its own name
        came_from = [where.decode() for where in store.multi_get([_here(rank) for rank in range(launched.size)])]
        address = next((where for where in came_from if where and not where.startswith("127.")), address)
    interface = interface_towards(address)
    return {} if interface is None else {"GLOO_SOCKET_IFNAME": interface}


def named(ranks: list[int]) -> str:
    """`rank 3`, or `ranks 3, 5` with at most eight of them."""
    few = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {few}"


def _open_store(launched: Launched, seconds: float) -> Store:
    leads_another_machine = launched.rank != 0 and launched.local_rank == 0
    if leads_another_machine and _is_loopback(launched.address):
        raise LostInputError(f"MASTER_ADDR ({launched.address}) must be an address of the first machine: on rank "
                             f"{launched.rank}'s it means that one itself")  # fmt: skip
    # torchrun's agent keeps a store already; every other launcher leaves it to the first rank.
    ours = launched.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return TCPStore(
            launched.address, int(launched.port), None, ours, timedelta(seconds=seconds), wait_for_workers=False,
            multi_tenant=True,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise LostInputError(f"{_place(launched)} must {'be free' if ours else 'answer'}: {one_line(error)}") from error


def _here(rank: int) -> str:
    """The store's key of a rank that has come; the value is the address that it came from."""
    return f"here/{rank}"


def _place(launched: Launched) -> str:
    return f"MASTER_ADDR:MASTER_PORT ({launched.address}:{launched.port})"


def _is_loopback(address: str) -> bool:
    try:
        return socket.gethostbyname(address).startswith("127.")
    except OSError:
        return False  # the store says what is wrong with it
