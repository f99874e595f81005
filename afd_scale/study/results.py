"""`results.json`: all figures of a study, a record a run; tables, plots and page follow from it."""

import math
from collections.abc import Iterable
from pathlib import Path

from pydantic import Field, NonNegativeFloat, NonNegativeInt, TypeAdapter

from afd_scale.config.section import Section
from afd_scale.files import read_json, write_text

RESULTS = "results.json"
STUDENT = "student"


class Record(Section):
    """What one run left."""

    name: str
    """Folder of the run, below that of the study."""
    method: str
    """Row of the tables."""
    base: str
    """What it started from."""
    rate: float | None
    """Learning rate that the study chose or tried; None is that of its config."""
    seed: NonNegativeInt
    """Of the run."""
    steps: NonNegativeInt
    """Updates."""
    metrics: dict[str, dict[str, float | None]]
    """Of summary.json, by policy and name."""
    teacher_clips: NonNegativeInt
    """Different videos of the teacher that it may have seen."""
    clips_read: NonNegativeInt
    """Videos of the teacher that its steps took, warm-up and repetitions included."""
    pflop: NonNegativeFloat
    """Of its training, by the planner's count."""
    seconds: NonNegativeFloat
    """Of its training steps, beside whatever else ran."""
    calls: NonNegativeInt
    """Of the student's network for one video."""
    command: str
    """That makes it again, from the root of the project."""
    date: str = ""
    """When it began."""
    commit: str = ""
    """Of the code that it began with."""

    def value(self, metric: str, policy: str = STUDENT) -> float | None:
        """None where it was not measured, or is not finite."""
        value = self.metrics.get(policy, {}).get(metric)
        return value if value is not None and math.isfinite(value) else None


class Results(Section):
    """The file."""

    title: str
    """Of the study."""
    runs: tuple[Record, ...]
    """Complete ones."""
    failed: dict[str, str] = Field(default_factory=dict)
    """Last line by name, of runs that ended otherwise."""


_RESULTS = TypeAdapter(Results)


def write_results(title: str, records: Iterable[Record], failed: dict[str, str], path: Path) -> None:
    results = Results(title=title, runs=tuple(records), failed=failed)
    write_text(path, results.model_dump_json(indent=1) + "\n")


def read_results(path: Path) -> Results:
    """
    Raises:
        ConfigError: it is none.
    """
    return read_json(path, "results", "be the results of a study", _RESULTS)
