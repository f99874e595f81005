"""What ranks tell each other before they join: where a name or a network is wrong, joining would never end."""

import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from afd_scale.parallel.launchers import Launched

T = TypeVar("T")

_OURS = "afd_scale.health"  # keys of the store, which torch and launchers write to as well


@contextmanager
def exchanged(launched: Launched, mine: T, seconds: float) -> Iterator[list[T]]:
    """Each rank's picklable value, on all ranks; needs no more than MASTER_ADDR and its port.

    Ranks that join do so within: the server that the first one started is the one that they come to.

    Raises:
        RuntimeError: the place is not reached in time, or ranks have not come.
    """
    # torch's own rendezvous would wait for all of them and not say who is absent.
    is_hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun
    store = dist.TCPStore(  # type: ignore[attr-defined]  # it is defined where torch is built for several processes
        launched.address, int(launched.port), is_master=launched.rank == 0 and not is_hosted,
        timeout=timedelta(seconds=seconds), wait_for_workers=False, multi_tenant=True,
    )  # fmt: skip
    _write(store, f"of {launched.rank}", mine)
    ranks = range(launched.size)
    if launched.rank == 0:
        _write(store, "all", _all_of(store, "of", ranks))
    values: list[T] = _read(store, "all")
    _write(store, f"seen {launched.rank}", None)
    if launched.rank == 0:
        _all_of(store, "seen", ranks)  # this process may end, and its server with it
    yield values


def _all_of(store: Any, key: str, ranks: range) -> list[Any]:
    """What each rank wrote."""
    try:
        return [_read(store, f"{key} {rank}") for rank in ranks]
    except RuntimeError as error:
        missing = [str(rank) for rank in ranks if not store.check([f"{_OURS} {key} {rank}"])]
        raise RuntimeError(f"ranks {', '.join(missing)} of {len(ranks)} have not come") from error


def _write(store: Any, key: str, value: object) -> None:
    store.set(f"{_OURS} {key}", pickle.dumps(value))


def _read(store: Any, key: str) -> Any:
    return pickle.loads(store.get(f"{_OURS} {key}"))


@contextmanager
def within(seconds: float, give_up: Callable[[], None]) -> Iterator[None]:
    """End the process with code 1 where something takes longer, for collectives cannot be left; say so before."""

    def end() -> None:
        give_up()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
