"""How far something is, on stderr: a live line where that is a terminal, else a line now and then."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 15.0


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


@contextmanager
def progress(
    what: str, *, begun: int = 0, shown: bool = True, say: Callable[[str], None] = _to_stderr
) -> Iterator[Callable[..., None]]:
    """Show how far something is.

    Args:
        begun: what was done before.
        say: takes a line, where there is no terminal.
    Yields:
        Takes what is done, what there is in all, and what else is to be said, which gets a line at once.
    """
    if not shown:
        yield lambda done, total, more="": None
    elif sys.stderr.isatty():
        columns = (BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[more]}"))
        bar = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True))
        with _below_the_log(bar):
            task = bar.add_task(what, total=None, completed=begun, more="")
            yield lambda done, total, more="": bar.update(task, completed=done, total=total, more=more)
    else:
        yield _lines(what, begun, say)


@contextmanager
def _below_the_log(bar: Progress) -> Iterator[None]:
    """Keep a live line standing below what is logged: rich takes over sys.stderr, but handlers hold the old one."""
    stderr = sys.stderr
    to_streams = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.StreamHandler)]
    handlers = [handler for handler in to_streams if handler.stream is stderr]
    with bar:
        for handler in handlers:
            handler.setStream(sys.stderr)
        try:
            yield
        finally:
            for handler in handlers:
                handler.setStream(stderr)


def _lines(what: str, begun: int, say: Callable[[str], None]) -> Callable[..., None]:
    """Progress in a log."""
    began = last = time.monotonic()

    def show(done: int, total: int, more: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if more or now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            seconds = (now - began) / max(done - begun, 1) * (total - done)
            left = f"{timedelta(seconds=round(seconds))} left"
            say("  ".join(filter(None, (f"{what}: {done} of {total}", more, left))))

    return show
