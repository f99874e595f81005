"""Which checkpoint a run goes on from: the newest that is whole. Damaged ones are named, and set aside."""

import logging
from pathlib import Path
from typing import Any, Required

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict

from afd_scale.checkpoint.checksums import DamagedError, check_below, check_part
from afd_scale.checkpoint.run_state import FORMAT, STATE, Agreeing
from afd_scale.checkpoint.weights import complete_checkpoints
from afd_scale.config import ConfigError
from afd_scale.files import read_json, system_errors

log = logging.getLogger(__name__)

_READ = (3, FORMAT)  # 3 has no checksums, and the student's whole weights beside the shards
_REMEDY = "choose another `out` or `name`, or train.resume=false"


@with_config(ConfigDict(extra="allow"))
class _State(TypedDict, total=False):
    format: Required[int]
    step: Required[int]
    ranks: int
    exported: str | None
    data: dict[str, Any]
    method: dict[str, float]


_STATE = TypeAdapter(_State)


def newest_whole_checkpoint(folder: Path, ranks: Agreeing) -> dict[str, Any] | None:
    """The state of the newest checkpoint that is whole, with its folder under `folder`; on all ranks together.

    Every file is read once, by one of the ranks. A damaged checkpoint becomes `step_XXXXXXXX.damaged`.

    Args:
        folder: `<run>/checkpoints`.
    Returns:
        None where there never was one.
    Raises:
        ConfigError: all are damaged, or one is of another format.
    """
    while True:
        found: dict[str, Any] | None = ranks.run_on_main(_newest_readable, folder)
        if found is None:
            return None
        try:
            ranks.run_on_all(check_part, found["folder"], found["ranks"], ranks.rank, ranks.size)
        except DamagedError as error:
            ranks.run_on_main(set_aside, found["folder"], str(error))
        else:
            return found


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        DamagedError: it cannot be read.
        ConfigError: it is of another format.
    """
    check_below(checkpoint, 1, STATE)
    try:
        state = read_json(checkpoint / STATE, "state", "be that of a checkpoint", _STATE)
    except ConfigError as error:
        raise DamagedError(f"{STATE} is absent or damaged") from error
    if state["format"] not in _READ:
        raise ConfigError(f"checkpoint ({checkpoint}) must be of format {FORMAT}: another version of afd_scale wrote "
                          f"it; {_REMEDY}")  # fmt: skip
    # Earlier ones lack some.
    return {"method": {}, "exported": None, "ranks": 1, **state, "folder": checkpoint}


def check_format(folder: Path) -> None:
    """Refuse checkpoints of another format before anything else is compared; ConfigError. Damage is found later."""
    for checkpoint in reversed(complete_checkpoints(folder)):
        try:
            read_state(checkpoint)
        except DamagedError:
            continue
        return


def set_aside(checkpoint: Path, reason: str) -> None:
    """Take a damaged checkpoint out of those that count, and say so; nothing is deleted."""
    number, aside = 1, checkpoint.with_name(f"{checkpoint.name}.damaged")
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged-{number}")
    with system_errors(f"checkpoint ({checkpoint}) is damaged ({reason}) and must be set aside"):
        checkpoint.rename(aside)
    log.warning("checkpoint %s is damaged and set aside as %s: %s", checkpoint, aside.name, reason)


def damaged_checkpoints(folder: Path) -> list[Path]:
    """Those that were set aside, by step."""
    return sorted(folder.glob("step_" + "[0-9]" * 8 + ".damaged*"))


def _newest_readable(folder: Path) -> dict[str, Any] | None:
    """The newest whose state can be read."""
    while checkpoints := complete_checkpoints(folder):
        try:
            return read_state(checkpoints[-1])
        except DamagedError as error:
            set_aside(checkpoints[-1], str(error))
    if damaged := damaged_checkpoints(folder):
        raise ConfigError(f"checkpoints ({folder}) must hold one that is whole: all are damaged, {damaged[-1].name} "
                          f"the newest; bring a copy back, {_REMEDY} to begin anew")  # fmt: skip
    return None
