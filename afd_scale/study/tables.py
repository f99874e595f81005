"""What the runs of a study say together: means with ranges, paired differences, results over compute."""

import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from afd_scale.evaluation.suites.suite import Better
from afd_scale.study.plan import OWN, Plan, Trial
from afd_scale.study.results import STUDENT, Record

RESAMPLES = 10_000
LEAST_PAIRS = 3  # of two, an interval by bootstrap is the two themselves
BUDGETS = ("steps", "teacher_clips", "clips_read", "pflop", "seconds", "calls")


@dataclass(frozen=True)
class Cell:
    """A metric over runs: mean, least, greatest, and of how many."""

    mean: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True)
class Difference:
    """From the method compared with, over pairs of runs of one seed and base.

    Attributes:
        low, high: of the mean, 95 % by bootstrap over pairs; None of fewer than `LEAST_PAIRS`.
        ratio: of the means of these runs; None over zero.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int
    ratio: float | None


@dataclass(frozen=True)
class Row:
    """Of a table.

    Attributes:
        policy: student for a method; else base or teacher.
        planned: runs that there should be.
        cells, differences: by metric, those that are there.
        budget: means over the runs, by `BUDGETS`; of methods with a run.
    """

    name: str
    policy: str
    runs: int
    planned: int
    cells: Mapping[str, Cell]
    differences: Mapping[str, Difference]
    budget: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """Methods side by side.

    Attributes:
        view: their steps are their own, equal, or equal in FLOPs.
    """

    view: str
    heading: str
    rows: Sequence[Row]


def own_rows(tables: Sequence[Table]) -> dict[str, Row]:
    """The students' rows of the tables in which each method has its own steps, by name."""
    own = (row for table in tables if table.view == OWN for row in table.rows)
    return {row.name: row for row in own if row.policy == STUDENT}


@dataclass(frozen=True)
class Point:
    """A method at a number of updates: what that costs and brings.

    Attributes:
        on_front: no other point costs as little and is as good, and better in one of the two; None where no direction
            of the metric is good.
    """

    method: str
    steps: int
    pflop: float
    cell: Cell
    on_front: bool | None = None


def make_tables(plan: Plan, records: Mapping[str, Record], failed: Collection[str]) -> list[Table]:
    """A table for each way to set the steps and each heading, in this order."""
    tables = []
    for view in plan.views:
        trials = {name: plan.row(name, plan.steps_of(name, view), records, failed) for name in plan.study.methods}
        found = {name: _found(row, records) for name, row in trials.items()}
        beside = [_reference(policy, plan, found) for policy in ("base", "teacher")]
        planned = len(plan.study.seeds) * len(plan.study.bases)
        for heading, names in plan.study.tables().items():
            rows = [_row(name, plan, found, planned) for name in names]
            tables.append(Table(view, heading, [row for row in [*beside, *rows] if row is not None]))
    return tables


def over_compute(
    plan: Plan, records: Mapping[str, Record], failed: Collection[str], metric: str, better: Better | None
) -> list[Point]:
    """The methods that train, at all steps that were run for the tables and budgets, by method and compute."""
    points = []
    for name in plan.trained:
        steps_each = {*(plan.steps_of(name, view) for view in plan.views), *plan.study.budgets}
        for steps in sorted(steps_each):
            found = _found(plan.row(name, steps, records, failed), records).values()
            cell = _cell(record.value(metric) for record in found)
            if cell is not None:
                points.append(Point(name, steps, statistics.mean(record.pflop for record in found), cell))
    if better is None:
        return points
    worse = _worse(better, _cell(record.value(metric, "teacher") for record in records.values()))
    marks = front([(point.pflop, worse(point.cell.mean)) for point in points])
    return [Point(p.method, p.steps, p.pflop, p.cell, mark) for p, mark in zip(points, marks, strict=True)]


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each point, (cost, badness), is dominated by no other: one as small in both, and smaller in one."""
    return [not any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)
            for point in points]  # fmt: skip


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Of so many pairs, at least one; the same for the same numbers."""
    gaps = np.subtract(ours, theirs)
    low = high = None
    if len(gaps) >= LEAST_PAIRS:
        means = np.random.default_rng(0).choice(gaps, (RESAMPLES, len(gaps))).mean(axis=1)
        low, high = (float(bound) for bound in np.percentile(means, (2.5, 97.5)))
    below = statistics.mean(theirs)
    ratio = statistics.mean(ours) / below if below else None
    return Difference(float(gaps.mean()), low, high, len(gaps), ratio)


_Found = Mapping[tuple[int, str], Record]  # by seed and base


def _found(trials: Iterable[Trial], records: Mapping[str, Record]) -> _Found:
    return {(trial.seed, trial.base): records[trial.name] for trial in trials if trial.name in records}


def _row(name: str, plan: Plan, found: Mapping[str, _Found], planned: int) -> Row:
    mine, compared = found[name], plan.study.compared_with
    differences = {}
    if compared is not None and compared != name:
        for metric in plan.metrics:
            pairs = [
                (ours, theirs) for key in mine if key in found[compared]
                if (ours := mine[key].value(metric)) is not None
                and (theirs := found[compared][key].value(metric)) is not None
            ]  # fmt: skip
            if pairs:
                differences[metric] = paired(*zip(*pairs, strict=True))
    budget = {key: statistics.mean(getattr(record, key) for record in mine.values()) for key in BUDGETS} if mine else {}
    return Row(name, STUDENT, len(mine), planned, _cells(plan, mine.values(), STUDENT), differences, budget)


def _reference(policy: str, plan: Plan, found: Mapping[str, _Found]) -> Row | None:
    """Base or teacher, of each seed and base as the first method measured it, the one compared with before others."""
    order = sorted(found, key=lambda name: name != plan.study.compared_with)
    records: dict[tuple[int, str], Record] = {}
    for name in order:
        for key, record in found[name].items():
            if policy in record.metrics:
                records.setdefault(key, record)
    if not records:
        return None
    return Row(policy, policy, len(records), len(records), _cells(plan, records.values(), policy), {}, {})


def _cells(plan: Plan, records: Collection[Record], policy: str) -> dict[str, Cell]:
    cells = {metric: _cell(record.value(metric, policy) for record in records) for metric in plan.metrics}
    return {metric: cell for metric, cell in cells.items() if cell is not None}


def _cell(values: Iterable[float | None]) -> Cell | None:
    there = [value for value in values if value is not None]
    return Cell(statistics.mean(there), min(there), max(there), len(there)) if there else None


def _worse(better: Better, teacher: Cell | None) -> Callable[[float], float]:
    """How bad a value is."""
    if better == "teacher":
        goal = teacher.mean if teacher else 0.0
        return lambda value: abs(value - goal)
    return (lambda value: value) if better == "lower" else (lambda value: -value)
