"""Videos longer than the teacher's, by how often its length has passed: from 0 to 1 times, 1 to 2, 2 to 4, 4 to 8.

A long video is cut into parts, each as long as the teacher's videos, and each part is measured by itself. A span holds
the parts within it, and has the mean of what they have.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from afd_scale.evaluation.curves import curve_svg
from afd_scale.evaluation.page import aligned
from afd_scale.evaluation.suites.suite import Metric

FIRST = "0-1x"

Measured = Mapping[str, float]  # by metric
BySpan = Mapping[str, Measured]


def spans(lengths: int) -> list[range]:
    """The parts of each span of a video so many times as long as the teacher's."""
    edges = [0]
    while edges[-1] < lengths:
        edges.append(min(max(1, 2 * edges[-1]), lengths))
    return [range(first, end) for first, end in itertools.pairwise(edges)]


def span_name(span: range) -> str:
    return f"{span.start}-{span.stop}x"


def middle(name: str) -> float:
    """Of a span, in lengths of the teacher's videos."""
    first, end = name.removesuffix("x").split("-")
    return (int(first) + int(end)) / 2


def by_span(parts: Sequence[Measured]) -> dict[str, dict[str, float]]:
    """Means over the parts of each span; a metric that none of its parts has is not in a span.

    Args:
        parts: what each has, the first one first; NaN is nothing.
    """
    found: dict[str, dict[str, float]] = {}
    for span in spans(len(parts)):
        names = dict.fromkeys(name for number in span for name in parts[number])
        columns = {name: [parts[number].get(name, np.nan) for number in span] for name in names}
        found[span_name(span)] = {
            name: float(np.nanmean(column)) for name, column in columns.items() if np.isfinite(column).any()
        }
    return found


def length_rows(policies: Mapping[str, BySpan], metrics: Mapping[str, Metric]) -> list[list[str]]:
    """A table's lines: metric, policy, and the policy's value in each span; headed by the spans' names.

    Args:
        policies: what each has, by span.
    """
    names = span_names(policies)
    rows = [["", "", *names]]
    for metric in _metrics_of(policies):
        lines = {policy: _column(measured, names, metric) for policy, measured in policies.items()}
        lines = {policy: line for policy, line in lines.items() if np.isfinite(line).any()}
        texts = aligned([value for line in lines.values() for value in line])
        label = metrics[metric].label if metric in metrics else metric
        for row, policy in enumerate(lines):
            rows.append(["" if row else label, policy, *texts[row * len(names) : (row + 1) * len(names)]])
    return rows


def length_curves(policies: Mapping[str, BySpan], metrics: Mapping[str, Metric]) -> list[tuple[str, str, Markup]]:
    """Metric, what it is, and the student's curve over the spans, the teacher's dashed.

    Where the teacher has one span alone, its videos being no longer, that is the line across.
    """
    names = span_names(policies)
    drawn = []
    for metric in _metrics_of(policies):
        values, teacher = (_column(policies.get(policy, {}), names, metric) for policy in ("student", "teacher"))
        if not np.isfinite(values).any():
            continue
        known = [value for value in teacher if np.isfinite(value)]
        of_all = teacher if len(policies.get("teacher", {})) > 1 else known[0] if known else None
        found = metrics.get(metric, Metric(metric, None, ""))
        drawn.append((found.label, found.meaning, curve_svg([middle(name) for name in names], values, of_all)))
    return drawn


def span_names(policies: Mapping[str, BySpan]) -> list[str]:
    """Of all policies, in their order in time."""
    return sorted({name for measured in policies.values() for name in measured}, key=middle)


def _metrics_of(policies: Mapping[str, BySpan]) -> list[str]:
    return list(dict.fromkeys(
        metric for measured in policies.values() for values in measured.values() for metric in values
    ))  # fmt: skip


def _column(measured: BySpan, names: Sequence[str], metric: str) -> list[float]:
    """NaN where there is nothing."""
    values = [measured.get(name, {}).get(metric) for name in names]
    return [np.nan if value is None else value for value in values]
