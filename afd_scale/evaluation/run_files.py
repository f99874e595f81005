"""What a run has left in its folder, read back however it was damaged since."""

import logging
import math
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Required, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from afd_scale.config import ConfigError, read_yaml
from afd_scale.config.plain import UnreadableError
from afd_scale.config.section import first_problem
from afd_scale.files import checked_json, read_json, system_errors

log = logging.getLogger(__name__)

CONFIG, SUMMARY, METRICS, DIAGNOSED = "config.yaml", "summary.json", "metrics.jsonl", "diagnostics.json"

_LARGEST = 1e100
_AS_WRITTEN = ConfigDict(extra="allow")  # by another version, too
_Count = Annotated[int, Field(ge=0)]


def _drawable(number: float) -> float:
    """What a curve and a table have room for; what is not finite is left out of them."""
    if math.isfinite(number) and abs(number) > _LARGEST:
        raise ValueError(f"a number ({number}) must be at most {_LARGEST:g}")
    return number


_Number = Annotated[int, AfterValidator(_drawable)] | Annotated[float, AfterValidator(_drawable)] | None


@with_config(_AS_WRITTEN)
class _Named(TypedDict):
    name: str


@with_config(_AS_WRITTEN)
class _Length(TypedDict):
    steps: _Count


@with_config(_AS_WRITTEN)
class _Shards(TypedDict):
    shards: str


@with_config(_AS_WRITTEN)
class _Start(TypedDict):
    weights: str | None


@with_config(_AS_WRITTEN)
class _Measured(TypedDict, total=False):
    metrics: str


@with_config(_AS_WRITTEN)
class RunSections(TypedDict, total=False):
    """What is looked at of a `config.yaml`, whose other fields may be those of another version."""

    name: Required[str]
    method: Required[_Named]
    train: Required[_Length]
    evaluation: _Measured


@with_config(_AS_WRITTEN)
class CardSections(RunSections):
    """What a model card looks at."""

    student: _Start
    data: _Shards


SECTIONS, CARD_SECTIONS = TypeAdapter(RunSections), TypeAdapter(CardSections)
Sections = TypeVar("Sections", RunSections, CardSections)


_ByMetric = dict[str, _Number]
_Span = Annotated[str, Field(pattern=r"^[0-9]{1,4}-[0-9]{1,4}x$")]


@with_config(_AS_WRITTEN)
class Summary(TypedDict, total=False):
    """`summary.json`: metrics by policy and name, beyond the data's length by span, too; seconds by what took them."""

    steps: Required[_Count]
    method: str
    suite: str
    metrics: Required[dict[str, _ByMetric]]
    metrics_by_length: dict[str, dict[_Span, _ByMetric]]
    seconds: dict[str, Annotated[float, Field(ge=0, le=1e12)]]


@with_config(_AS_WRITTEN)
class Diagnosed(TypedDict):
    """`diagnostics.json`: what diagnostics look at."""

    dataset: str
    held_out: bool
    prompts: _Count
    rollouts: _Count


def _with_step(record: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(record.get("step"), int):
        raise ValueError(f"step ({record.get('step')}) must be given, a whole number")
    return record


Record = Annotated[dict[str, _Number], AfterValidator(_with_step)]

_SUMMARY, _DIAGNOSED = TypeAdapter(Summary), TypeAdapter(Diagnosed)
_RECORD: TypeAdapter[dict[str, Any]] = TypeAdapter(Record, config=ConfigDict(strict=True))


def read_sections(folder: Path, schema: TypeAdapter[Sections]) -> Sections:
    """The config that a run was made with, as far as `schema` looks at it.

    Raises:
        ConfigError: there is no `config.yaml`, or none of a run.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(f"run folder ({folder}) must hold {CONFIG}: every run writes it when it starts")
    try:
        return schema.validate_python(read_yaml(path, "run"))
    except ValidationError as error:
        raise ConfigError(f"run ({path}) must be the config of a run: {first_problem(error, '')}") from error


def read_summary(folder: Path) -> Summary | None:
    """None where the run has not come to its end, and, with a warning, where it is damaged: the run writes it anew."""
    path = folder / SUMMARY
    if not path.is_file():
        return None
    try:
        return read_json(path, "run", "be the summary of a run", _SUMMARY)
    except ConfigError as error:
        log.warning("%s: it is left out", error)
        return None


def read_diagnosed(folder: Path) -> Diagnosed | None:
    """None where nothing was diagnosed; ConfigError where it is damaged."""
    path = folder / DIAGNOSED
    return read_json(path, "run", "be what is diagnosed of a run", _DIAGNOSED) if path.is_file() else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; damaged lines are left out, with a warning, and without one a last line that a
    dying run cut short.

    Raises:
        ConfigError: it cannot be read.
    """
    with system_errors(f"metrics ({path}) must be readable"):
        lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    records = []
    for line in lines:
        with suppress(UnreadableError):
            records.append(checked_json(line, _RECORD))
    if damaged := len(lines) - len(records):
        log.warning("%s: %d of %d lines are damaged, and left out", path, damaged, len(lines))
    return records
