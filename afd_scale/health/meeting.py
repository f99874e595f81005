"""What ranks tell each other before they join: where a name or a network is wrong, joining would never end."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pydantic import TypeAdapter

from afd_scale.parallel.launchers import Launched
from afd_scale.parallel.meeting import meet

T = TypeVar("T")


@contextmanager
def exchanged(launched: Launched, mine: T, schema: TypeAdapter[T], seconds: float) -> Iterator[list[T]]:
    """Each rank's value, on all ranks; needs no more than MASTER_ADDR and its port.

    Ranks that join do so within: the server that the first one started is the one that they come to.

    Args:
        schema: of a value. It goes as JSON, for the port is open to whoever reaches it.
    Raises:
        LostInputError: the place is not reached in time, or ranks have not come.
        RuntimeError: one has gone since.
    """
    store = meet(launched, seconds)
    store.set(f"found by {launched.rank}", schema.dump_json(mine).decode())
    ranks = range(launched.size)
    values = [schema.validate_json(store.get(f"found by {rank}")) for rank in ranks]
    store.set(f"seen by {launched.rank}", "")
    if launched.rank == 0:
        store.wait([f"seen by {rank}" for rank in ranks])  # this process may end, and its server with it
    yield values


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
