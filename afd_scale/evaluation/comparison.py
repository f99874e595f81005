"""How the measures of two sets of clips differ: their distributions, by split and by time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afd_scale.evaluation.lengths import by_span
from afd_scale.evaluation.suites.suite import Metric
from afd_scale.evaluation.suites.video import ClipMeasures

ALL = "all"  # the clips of every split together
CHANCE_DRAWS = 200
CHANCE_QUANTILE = 0.95

Values = NDArray[np.float64]


@dataclass(frozen=True)
class MeasuredClip:
    """A clip's name, what it was asked for, the group of its prompt, and what was measured."""

    video: str
    prompt: str
    split: str | None
    measures: ClipMeasures


def wasserstein(first: Values, second: Values) -> float:
    """1-Wasserstein distance of two samples, (N,) and (M,): the area between their distribution functions."""
    both = np.sort(np.concatenate([first, second]))
    below, below_other = (np.searchsorted(np.sort(x), both[:-1], side="right") / len(x) for x in (first, second))
    return float((np.abs(below - below_other) * np.diff(both)).sum())


def chance_level(first: Values, second: Values) -> float | None:
    """The distance that 95 of 100 random divisions of all values into two such samples stay below.

    A distance below it may be due to which clips were drawn. None where a sample is empty.
    """
    if not (len(first) and len(second)):
        return None
    both, random = np.concatenate([first, second]), np.random.default_rng(0)
    draws = (random.permutation(both) for _ in range(CHANCE_DRAWS))
    distances = [wasserstein(draw[: len(first)], draw[len(first) :]) for draw in draws]
    return float(np.quantile(distances, CHANCE_QUANTILE))


def compare(
    source: Sequence[MeasuredClip], teacher: Sequence[MeasuredClip], metrics: Mapping[str, Metric]
) -> dict[str, dict[str, Any]]:
    """By split and metric, what `_difference` says, the `chance_level`, and the difference in each bin of time; where
    the source's clips are longer than the teacher's, by span, too, against the teacher's whole clips.

    The first split is all clips. Metrics that neither side has are left out.
    """
    named = {clip.split for clip in (*source, *teacher) if clip.split is not None}
    splits: dict[str, dict[str, Any]] = {}
    for split in (ALL, *sorted(named - {ALL})):
        sides = [[clip.measures for clip in side if split in (ALL, clip.split)] for side in (source, teacher)]
        splits[split] = {"clips": {"source": len(sides[0]), "teacher": len(sides[1])}, "metrics": {}}
        for name in metrics:
            columns = [[clip.values[name] for clip in side if name in clip.values] for side in sides]
            if any(columns):
                first, second = map(np.array, columns)
                splits[split]["metrics"][name] = _against_chance(first, second) | {
                    "by_time": _by_time(name, *sides),
                    "by_length": _by_length(name, sides[0], second),
                }
    return splits


def _by_length(name: str, source: Sequence[ClipMeasures], teacher: Values) -> dict[str, dict[str, float | None]]:
    """By span, means over its parts; each is compared by itself, for a clip's mean of several has a smaller spread."""
    parts = []
    for number in range(max((len(clip.by_length) for clip in source), default=0)):
        column = np.array([clip.by_length[number][name] for clip in source if name in clip.by_length[number]])
        parts.append(_against_chance(column, teacher))
    numbers = [{key: np.nan if value is None else value for key, value in found.items()} for found in parts]
    return {span: {key: found.get(key) for key in parts[0]} for span, found in by_span(numbers).items()}


def _against_chance(source: Values, teacher: Values) -> dict[str, float | None]:
    return _difference(source, teacher) | {"chance": chance_level(source, teacher)}


def _by_time(
    name: str, source: Sequence[ClipMeasures], teacher: Sequence[ClipMeasures]
) -> list[dict[str, float | None]]:
    """The difference in each bin; none of a metric that is of whole clips."""
    rows = [[clip.by_time[name] for clip in side if name in clip.by_time] for side in (source, teacher)]
    bins = max((len(row) for side in rows for row in side), default=0)
    columns = [np.array(side, np.float64).reshape(len(side), bins) for side in rows]
    finite = [[column[:, at][np.isfinite(column[:, at])] for column in columns] for at in range(bins)]
    return [_difference(first, second) for first, second in finite]


def _difference(source: Values, teacher: Values) -> dict[str, float | None]:
    """Means, spreads (standard deviations over clips) and distance; None where there is no such number.

    distance: Wasserstein, in units of the metric.
    distance_in_spreads: the same over the teacher's spread, so that metrics compare.
    """
    distance = wasserstein(source, teacher) if len(source) and len(teacher) else None
    spread = float(teacher.std()) if len(teacher) > 1 else 0.0
    return {
        "source": float(source.mean()) if len(source) else None,
        "source_spread": float(source.std()) if len(source) else None,
        "teacher": float(teacher.mean()) if len(teacher) else None,
        "teacher_spread": float(teacher.std()) if len(teacher) else None,
        "distance": distance,
        "distance_in_spreads": None if distance is None or spread == 0 else distance / spread,
    }
