"""What came of each part of a rehearsal."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "failed", "not here", "left out", "not reached"]


@dataclass(frozen=True)
class Outcome:
    """A row of the table.

    Attributes:
        stage: its name.
        said: what was done, or what is wrong.
        status: `not here` is a file that was to be looked at, `left out` a stage with nothing to do, `not reached` one
            behind another that failed.
        seconds: that it took.
        log: file with all that it printed; None where it has none.
        tail: last lines of that, where it failed.
    """

    stage: str
    said: str
    status: Status = "ok"
    seconds: float = 0.0
    log: Path | None = None
    tail: tuple[str, ...] = ()


def all_well(outcomes: Sequence[Outcome]) -> bool:
    return all(outcome.status in ("ok", "not here", "left out") for outcome in outcomes)
