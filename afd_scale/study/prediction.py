"""Whether a judge's quality predicts what becomes of the student: rank correlations, between runs and within them.

Between runs each run is one point: its judge's quality at some share of its steps, and its student at the end. Within a
run the checkpoints are the points, so both numbers move with time, and may do so for reasons of their own: the levels
are therefore beside the changes, a quality against what the student's metric does until the next checkpoint. The two
kinds are never pooled.

All numbers are turned so that more is better, a smaller error of calibration say: a positive correlation says that a
better judge comes with a better student.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from afd_scale.evaluation.agreement import goodness, ranks, spearman
from afd_scale.evaluation.suites import Metric
from afd_scale.study.judged_runs import JudgedRun

FloatArray = NDArray[np.float64]

RESAMPLES = 2000
LEAST = 4  # runs, or checkpoints of a run, that have a rank correlation
LEAST_CERTAIN = 6  # runs that have an interval: of fewer a perfect correlation is common, and resamples never leave it
CLEAR = 0.05
SMALLER_IS_BETTER = ("calibration_error", "brier")
NO_QUALITY = ("logit_gap",)  # its scale is the judge's own

Kind = Literal["between", "levels", "changes"]
Key = tuple[str, str, str, str]  # regime, judge, quality, metric
Series = Mapping[float, tuple[float, float]]  # by share of a run's steps
Pairs = list[tuple[float, float]]


@dataclass(frozen=True)
class Correlation:
    """Of a judge's quality with a metric of the student, in one regime.

    Attributes:
        kind: `between` runs; within runs, of `levels` or with `changes`.
        share: of a run's steps at which the quality is taken, for `between`.
        rho: Spearman's; within runs the mean over runs.
        low, high: 95 %, by bootstrap over runs; None of too few.
        p: how often chance alone is as far from zero: between runs their ends are dealt out anew, within runs each
            correlation of a run has a sign at random. None of too few.
        runs: that count.
    """

    kind: Kind
    regime: str
    judge: str
    quality: str
    metric: str
    share: float | None
    rho: float
    low: float | None
    high: float | None
    p: float | None
    runs: int

    @property
    def is_clear(self) -> bool:
        """Whether chance alone is this far from zero in less than one case of twenty."""
        return self.p is not None and self.p < CLEAR


def correlations(runs: Sequence[JudgedRun], metrics: Mapping[str, Metric]) -> list[Correlation]:
    """All that can be said of some runs.

    Args:
        metrics: how to read those of the student.
    """
    found = []
    for regime, judge, quality, metric in _combinations(runs, metrics):
        series = [series_of(run, regime, judge, quality, metric, metrics[metric]) for run in runs]
        key = (regime, judge, quality, metric)
        for share in sorted({share for one in series for share in one}):
            found.append(_between(key, share, _said([(one[share][0], one[1.0][1]) for one in series if share in one])))
        found.append(_within("levels", key, [_said(levels(one)) for one in series]))
        found.append(_within("changes", key, [_said(changes(one)) for one in series]))
    return [one for one in found if one is not None]


def spearman_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float] | None:
    """95 % of Spearman's correlation by bootstrap over pairs, percentiles; the same for the same numbers.

    Resamples in which a row is all equal say nothing. None where half of them are, and of fewer than 6 pairs.
    """
    if len(first) < LEAST_CERTAIN:
        return None
    a, b = _resampled_ranks(tuple(first)), _resampled_ranks(tuple(second))
    scale = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    there = scale > 0
    if there.sum() < RESAMPLES / 2:
        return None
    return _percentiles((a * b).sum(axis=1)[there] / scale[there])


def shuffled_p(first: Sequence[float], second: Sequence[float]) -> float | None:
    """How often pairs dealt out anew have a Spearman correlation as far from zero; None of fewer than 6."""
    if len(first) < LEAST_CERTAIN:
        return None
    a, b = (ranks(row) - (len(row) + 1) / 2 for row in (first, second))
    shuffles = np.random.default_rng(0).permuted(np.tile(b, (RESAMPLES, 1)), axis=1)
    return _as_far(shuffles @ a, float(a @ b))


def signs_p(values: Sequence[float]) -> float | None:
    """How often values with signs at random have a mean as far from zero; None of fewer than 6."""
    if len(values) < LEAST_CERTAIN:
        return None
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (RESAMPLES, len(values)))
    return _as_far(signs @ np.asarray(values, np.float64), float(np.sum(values)))


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % of a mean by bootstrap over values, percentiles; None of fewer than 6."""
    if len(values) < LEAST_CERTAIN:
        return None
    row = np.asarray(values, np.float64)
    chosen = np.random.default_rng(0).integers(0, len(row), (RESAMPLES, len(row)))
    return _percentiles(row[chosen].mean(axis=1))


def turned(quality: str, value: float) -> float:
    """A quality so that more is better."""
    return -value if quality in SMALLER_IS_BETTER else value


def series_of(run: JudgedRun, regime: str, judge: str, quality: str, metric: str, reading: Metric) -> Series:
    """A run's quality and metric over time, both turned so that more is better; NaN where one was not measured."""
    series, end = {}, max(run.checkpoints)
    for step, regimes in sorted(run.checkpoints.items()):
        measured: Mapping[str, Any] = regimes.get(regime, {"judges": {}, "student": {}, "teacher": {}})
        said = measured["judges"].get(judge, {}).get(quality, math.nan)
        value, wanted = (measured[whose].get(metric, math.nan) for whose in ("student", "teacher"))
        assert reading.better is not None, "the metrics of the worlds have a direction"
        series[round(step / end, 3)] = (turned(quality, said), float(goodness([value], reading.better, wanted)[0]))
    return series


def levels(series: Series) -> Pairs:
    """A quality, and the metric then."""
    return [series[share] for share in sorted(series)]


def changes(series: Series) -> Pairs:
    """A quality, and what the metric does until the next checkpoint."""
    places = sorted(series)
    return [(series[now][0], series[then][1] - series[now][1])
            for now, then in pairwise(places)]  # fmt: skip


def _said(pairs: Pairs) -> Pairs:
    """Those of two numbers."""
    return [pair for pair in pairs if not any(map(math.isnan, pair))]


def _combinations(runs: Sequence[JudgedRun], metrics: Mapping[str, Metric]) -> Iterator[Key]:
    """Regime, judge, quality, metric: those that some checkpoint has, in a fixed order."""
    seen: dict[Key, None] = {}
    for run in runs:
        for regimes in run.checkpoints.values():
            for regime, measured in regimes.items():
                for judge, qualities in measured["judges"].items():
                    for quality in qualities:
                        for metric in metrics:
                            if quality not in NO_QUALITY and metric in measured["student"]:
                                seen[regime, judge, quality, metric] = None
    yield from seen


def _between(key: Key, share: float, points: Pairs) -> Correlation | None:
    if len(points) < LEAST:
        return None
    first, second = zip(*points, strict=True)
    rho = spearman(first, second)
    if math.isnan(rho):
        return None
    low, high = spearman_interval(first, second) or (None, None)
    return Correlation("between", *key, share, rho, low, high, shuffled_p(first, second), len(points))


def _within(kind: Kind, key: Key, pairs: Sequence[Pairs]) -> Correlation | None:
    each = [spearman(*zip(*points, strict=True)) for points in pairs if len(points) >= LEAST]
    each = [rho for rho in each if not math.isnan(rho)]
    if not each:
        return None
    low, high = mean_interval(each) or (None, None)
    return Correlation(kind, *key, None, float(np.mean(each)), low, high, signs_p(each), len(each))


@lru_cache(maxsize=64)  # a quality is held against many metrics, and the other way round
def _resampled_ranks(values: tuple[float, ...]) -> FloatArray:
    """(RESAMPLES, n) ranks in each resample, equal values sharing the mean of theirs, minus their mean."""
    chosen = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    rows = np.asarray(values, np.float64)[chosen]
    below = (rows[:, None, :] < rows[:, :, None]).sum(axis=2)
    equal = (rows[:, None, :] == rows[:, :, None]).sum(axis=2)
    return np.asarray(below + (equal + 1) / 2 - (len(values) + 1) / 2)


def _as_far(by_chance: FloatArray, found: float) -> float:
    """Share of what chance gives that is as far from zero, what is found counted among it."""
    return float((1 + (np.abs(by_chance) >= abs(found) - 1e-9).sum()) / (1 + len(by_chance)))


def _percentiles(values: FloatArray) -> tuple[float, float]:
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)
