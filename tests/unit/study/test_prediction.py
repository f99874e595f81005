"""Correlations of judges with what becomes of students, in cases worked by hand."""

import math

import numpy as np
import pytest

from afd_scale.evaluation.suites import Metric
from afd_scale.evaluation.suites.kick import KickSuite
from afd_scale.study.judge_tables import judge_tables
from afd_scale.study.judged_runs import JudgedRun
from afd_scale.study.prediction import (
    Correlation,
    changes,
    correlations,
    levels,
    mean_interval,
    series_of,
    shuffled_p,
    signs_p,
    spearman_interval,
)
from tests.unit.study.made_up import at, made_up

METRICS = {name: KickSuite.metrics[name] for name in ("trajectory_fd", "dynamic_degree")}
DISTANCE = METRICS["trajectory_fd"]


def found(runs: list[JudgedRun], **wanted: object) -> list[Correlation]:
    said = correlations(runs, METRICS)
    return [one for one in said if all(getattr(one, name) == value for name, value in wanted.items())]


def test_between_runs_each_is_one_point_and_better_is_positive() -> None:
    # At half time the better judges are of the runs that end worse; at the end it is the other way round.
    runs = [made_up(f"run{i}", {50: (0.9 - i / 10, 7.0), 100: (0.5 + i / 10, 20.0 - i)}) for i in range(6)]
    half, end = found(runs, kind="between", quality="pair_accuracy", metric="trajectory_fd")
    assert (half.share, half.rho, half.runs) == (0.5, pytest.approx(-1), 6)
    assert (end.share, end.rho, end.low, end.high) == (1.0, *[pytest.approx(1)] * 3)
    assert end.is_clear
    (moving,) = found(runs, kind="between", share=1.0, metric="dynamic_degree")
    assert moving.rho == pytest.approx(1), "nearer to the teacher's is better"


def test_smaller_errors_of_calibration_are_better() -> None:
    runs = [made_up(f"run{i}", {9: (0.5, 10.0 + i)}, calibration_error=0.1 + i / 50) for i in range(4)]
    (said,) = found(runs, quality="calibration_error", metric="trajectory_fd")
    assert said.rho == pytest.approx(1)
    assert not found(runs, quality="pair_accuracy"), "which is the same in all"


def test_within_runs_and_between_them_may_be_opposite() -> None:
    # Inside each run accuracy falls while the student gets better; runs with the higher level end better.
    runs = [
        made_up(f"run{i}", {step: (0.9 + i - step / 1000, 50.0 - 5 * i - step / 10) for step in (20, 40, 60, 80, 100)})
        for i in range(6)
    ]  # fmt: skip
    (between,) = found(runs, kind="between", share=1.0, metric="trajectory_fd")
    (level,) = found(runs, kind="levels", metric="trajectory_fd")
    assert (between.rho, level.rho) == (pytest.approx(1), pytest.approx(-1))
    assert (level.low, level.high, level.runs) == (pytest.approx(-1), pytest.approx(-1), 6)


def test_changes_are_what_comes_next() -> None:
    run = made_up("run", {1: (0.5, 9.0), 2: (0.9, 8.0), 4: (0.6, 3.0)})
    series = series_of(run, "seen", "it", "pair_accuracy", "trajectory_fd", DISTANCE)
    assert levels(series) == [(0.5, -9.0), (0.9, -8.0), (0.6, -3.0)]
    assert changes(series) == [(0.5, 1.0), (0.9, 5.0)]
    gains, runs = [1.0, 4.0, 2.0, 5.0], []
    for name in "abcd":
        distances = 20 - np.cumsum([0.0, *gains])
        runs.append(made_up(name, {i + 1: ((gains[i] if i < 4 else 0) / 10, distances[i]) for i in range(5)}))
    (said,) = found(runs, kind="changes", metric="trajectory_fd")
    assert said.rho == pytest.approx(1), "the judge is good just before the student gains most"


def test_what_is_missing_is_left_out() -> None:
    runs = [made_up(f"run{i}", {5: (0.5 + i / 10, 9.0 - i), 10: (0.5 + i / 10, 9.0 - i)}) for i in range(5)]
    gap = made_up("gap", {10: (0.1, 0.1)})
    del gap.checkpoints[10]["seen"]["judges"]["it"]["pair_accuracy"]
    early = JudgedRun("early", "all", {5: {"seen": at(0.1, 0.1)}, 10: {}})  # it ends without this regime
    (end,) = found([*runs, gap, early], kind="between", share=1.0, metric="trajectory_fd")
    (half,) = found([*runs, gap, early], kind="between", share=0.5, metric="trajectory_fd")
    assert (end.runs, half.runs) == (5, 5)
    assert end.rho == half.rho == pytest.approx(1)
    assert not found(runs[:3]), "three runs have no rank correlation worth the name"


def test_intervals() -> None:
    rising = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert spearman_interval(rising, [x**3 for x in rising]) == pytest.approx((1, 1))
    assert spearman_interval(rising, [-x for x in rising]) == pytest.approx((-1, -1))
    assert spearman_interval(rising[:5], rising[:5]) is None, "one in sixty is perfect by chance"
    assert spearman_interval(rising, [7.0] * 6) is None, "nothing varies"
    noise = np.random.default_rng(5)
    low, high = spearman_interval(noise.normal(size=40).tolist(), noise.normal(size=40).tolist()) or (math.nan,) * 2
    assert -0.5 < low < 0 < high < 0.5
    # A mean of n values has a standard error of their deviation over the root of n.
    values = noise.normal(2.0, 1.0, 400)
    low, high = mean_interval(values.tolist()) or (math.nan,) * 2
    assert (low, high) == pytest.approx(
        (values.mean() - 1.96 * values.std() / 20, values.mean() + 1.96 * values.std() / 20), abs=0.02
    )
    assert mean_interval([1.0] * 5) is None


def test_what_chance_alone_gives() -> None:
    rising = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    # Two of the 720 orders of six are perfect, and two of the 64 ways to choose six signs are all alike.
    assert shuffled_p(rising, rising) == pytest.approx(2 / 720, abs=0.004)
    assert signs_p([0.5] * 6) == pytest.approx(2 / 64, abs=0.012)
    assert signs_p([0.5, -0.5] * 3) == 1, "a mean of zero is no farther than any other"
    assert shuffled_p(rising[:5], rising[:5]) is signs_p(rising[:5]) is None
    noise = np.random.default_rng(0)
    clear = [p < 0.05 for _ in range(200) if (p := shuffled_p(*noise.normal(size=(2, 8)).tolist())) is not None]
    assert len(clear) == 200
    assert 0.01 < np.mean(clear) < 0.09, "one in twenty, where nothing is there"


def test_the_table_says_what_was_found_and_what_is_not_known() -> None:
    runs = [made_up(f"run{i}", {50: (0.9, 7.0), 100: (0.5 + i / 10, 20.0 - i)}, ("seen", "2x")) for i in range(6)]
    metrics: dict[str, Metric] = dict(METRICS)
    table = judge_tables(runs, correlations(runs, metrics), metrics)
    assert "6 runs, 12 checkpoints" in table
    assert "| it | seen | 6 | 0.75 (0.5 to 1) | - |" in table
    assert "| 2x | 6 | 17.5 (15 to 20) / 1 |" in table
    assert "| it | seen | pair accuracy | 1 | +1.00* [+1.00, +1.00] | +1.00* [+1.00, +1.00] |" in table
    assert (
        "- Between runs, judged at the end: 4 of 4 correlations have a star, where chance alone gives about 0.2."
        in table
    )
    assert "- Within runs, levels: too few runs to tell from chance." in table
    assert "## Limits" in table
