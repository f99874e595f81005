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


def exchange(launched: Launched, mine: T, seconds: float) -> list[T]:
    """Each rank's picklable value, on all ranks; needs no more than MASTER_ADDR and its port.

    Raises:
        RuntimeError: the place is not reached in time, or ranks have not come.
    """
    os.environ.update(launched.environment)
    timeout = timedelta(seconds=seconds)
    found, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore("afd_scale.health", found)
    store.set_timeout(timeout)
    _write(store, f"of {launched.rank}", mine)
    ranks = range(launched.size)
    if launched.rank == 0:
        values: list[T] = _all_of(store, "of", ranks)
        _write(store, "all", values)
        _write(store, "seen 0", None)
        _all_of(store, "seen", ranks)  # the store may be this process's
        return values
    everything: list[T] = _read(store, "all")
    _write(store, f"seen {launched.rank}", None)
    return everything


def _all_of(store: Any, key: str, ranks: range) -> list[Any]:
    """What each rank wrote."""
    try:
        return [_read(store, f"{key} {rank}") for rank in ranks]
    except RuntimeError as error:
        missing = [str(rank) for rank in ranks if not store.check([f"{key} {rank}"])]
        raise RuntimeError(f"ranks {', '.join(missing)} of {len(ranks)} have not come") from error


def _write(store: Any, key: str, value: object) -> None:
    store.set(key, pickle.dumps(value))


def _read(store: Any, key: str) -> Any:
    return pickle.loads(store.get(key))


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
