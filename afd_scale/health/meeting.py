"""What ranks tell each other before they join: where a name or a network is wrong, joining would never end."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from pydantic import TypeAdapter

from afd_scale.parallel.launchers import Launched

T = TypeVar("T")

_OURS = "afd_scale.health"  # keys of the store, which torch and launchers write to as well


@contextmanager
def exchanged(launched: Launched, mine: T, schema: TypeAdapter[T], seconds: float) -> Iterator[list[T]]:
    """Each rank's value, on all ranks; needs no more than MASTER_ADDR and its port.

    Ranks that join do so within: the server that the first one started is the one that they come to.

    Args:
        schema: of a value. It goes as JSON, for the port is open to whoever reaches it.
    Raises:
        RuntimeError: the place is not reached in time, or ranks have not come.
    """
    # torch's own rendezvous would wait for all of them and not say who is absent.
    is_hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun
    store = dist.TCPStore(  # type: ignore[attr-defined]  # it is defined where torch is built for several processes
        launched.address, int(launched.port), is_master=launched.rank == 0 and not is_hosted,
        timeout=timedelta(seconds=seconds), wait_for_workers=False, multi_tenant=True,
    )  # fmt: skip
    store.set(f"{_OURS} of {launched.rank}", schema.dump_json(mine).decode())
    ranks = range(launched.size)
    values = [schema.validate_json(said) for said in _all_of(store, "of", ranks)]
    store.set(f"{_OURS} seen {launched.rank}", "")
    if launched.rank == 0:
        _all_of(store, "seen", ranks)  # this process may end, and its server with it
    yield values


def _all_of(store: Any, key: str, ranks: range) -> list[bytes]:
    """What each rank wrote."""
    try:
        return [store.get(f"{_OURS} {key} {rank}") for rank in ranks]
    except RuntimeError as error:
        missing = [str(rank) for rank in ranks if not store.check([f"{_OURS} {key} {rank}"])]
        raise RuntimeError(f"ranks {', '.join(missing)} of {len(ranks)} have not come") from error


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
