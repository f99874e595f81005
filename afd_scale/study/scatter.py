"""Scatter plots of a judge's quality and a student's metric: a point a run, and apart from these the runs over time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afd_scale.evaluation.suites import Metric
from afd_scale.files import slug
from afd_scale.study.judge_tables import MAIN_METRICS, QUALITIES
from afd_scale.study.judged_runs import JudgedRun, judges_of
from afd_scale.study.plots import ON_WHITE, PALETTE, write_figure
from afd_scale.study.prediction import SMALLER_IS_BETTER, Correlation, Series, series_of
from afd_scale.study.regimes import REGIMES

INK, RULE, POINT = *ON_WHITE, PALETTE[0]
CELL = (2.1, 1.7)  # inches


def write_scatter_plots(
    runs: Sequence[JudgedRun], found: Sequence[Correlation], metrics: dict[str, Metric], folder: Path
) -> list[Path]:
    """`between_JUDGE_METRIC.png` and `within_JUDGE_METRIC.png`, regimes downwards, qualities to the right.

    Args:
        found: whose numbers stand over the points.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for judge in judges_of(runs):
        for metric in (name for name in MAIN_METRICS if name in metrics):
            said = [one for one in found if (one.judge, one.metric) == (judge, metric)]
            for kind in ("between", "within"):
                path = folder / f"{kind}_{slug(judge)}_{slug(metric)}.png"
                write_figure(_grid(runs, said, judge, metric, metrics[metric], kind), path)
                written.append(path)
    return written


def _grid(
    runs: Sequence[JudgedRun], said: Sequence[Correlation], judge: str, metric: str, reading: Metric, kind: str
) -> Any:  # fmt: skip
    from matplotlib.figure import Figure  # a second to import

    present = [name for name in REGIMES if any(name in run.end for run in runs)]
    width, height = CELL[0] * len(QUALITIES) + 0.4, CELL[1] * len(present) + 0.8
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(0.6 / width, 0.45 / height, 1 - 0.1 / width, 1 - 0.5 / height, wspace=0.35, hspace=0.3)
    over = "one point a run, at its end" if kind == "between" else "a line a run, over its checkpoints"
    figure.suptitle(f"{judge}: quality and {reading.label.lower()}, {over}; up and right are better", fontsize=9)
    for row, regime in enumerate(present):
        for column, quality in enumerate(QUALITIES):
            axes = figure.add_subplot(len(present), len(QUALITIES), row * len(QUALITIES) + column + 1)
            series = [series_of(run, regime, judge, quality, metric, reading) for run in runs]
            (_points if kind == "between" else _lines)(axes, series)
            wanted = ("between", 1.0) if kind == "between" else ("levels", None)
            rho = next((one for one in said if (one.regime, one.quality) == (regime, quality)
                        and (one.kind, one.share) == wanted), None)  # fmt: skip
            _dress(axes, rho, ylabel=regime if column == 0 else "",
                   xlabel=_axis_title(quality) if row == len(present) - 1 else "")  # fmt: skip
    return figure


def _points(axes: Any, series: Sequence[Series]) -> None:
    ends = [one[1.0] for one in series]
    axes.scatter(*zip(*ends, strict=True), s=14, color=POINT, alpha=0.7, linewidths=0)


def _lines(axes: Any, series: Sequence[Series]) -> None:
    for one in series:
        points = np.array([one[share] for share in sorted(one)])
        axes.plot(*points.T, color=POINT, alpha=0.45, linewidth=0.8, marker="o", markersize=2)
        axes.plot(*points[-1:].T, color=INK, marker="o", markersize=3)


def _dress(axes: Any, rho: Correlation | None, xlabel: str, ylabel: str) -> None:
    if rho is not None:
        interval = "" if rho.low is None else f" [{rho.low:+.2f}, {rho.high:+.2f}]"
        axes.set_title(f"{rho.rho:+.2f}{interval}", fontsize=7, color=INK, pad=2)
    axes.set_xlabel(xlabel, fontsize=7, color=INK)
    axes.set_ylabel(ylabel, fontsize=8, color=INK)
    axes.locator_params(nbins=4)
    axes.tick_params(length=0, labelsize=6, labelcolor=INK)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_color(RULE)


def _axis_title(quality: str) -> str:
    return ("minus " if quality in SMALLER_IS_BETTER else "") + quality.replace("_", " ")
