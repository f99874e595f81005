"""Drawings of a study: each method's runs, and results over compute. Once as files, once in the page's colours."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from afd_scale.evaluation.page import INK, RULE, figure_svg
from afd_scale.files import replacing
from afd_scale.study.plan import Plan
from afd_scale.study.results import Record
from afd_scale.study.tables import Point, Table

WIDTH = 5.2  # inches
ON_WHITE = ("#1c2129", "#d9dee5")  # ink and rules of files
PALETTE = ("#3b76d6", "#d9792b", "#2f9e5f", "#b0489c", "#8a6d3b", "#1f9aa8", "#c8433f", "#7b6bd6", "#7f8790", "#a3a52d")
_UNDATED: Mapping[str, Mapping[str, None]] = {"svg": {"Date": None}, "png": {"Software": None}}
_MARKERS = "osD^vPX<>*"


@dataclass(frozen=True)
class Style:
    """How a drawing looks where it stands."""

    ink: str
    rule: str


Draw = Callable[[Style], Any]  # a figure


def runs_of_methods(table: Table, metric: str, values: Mapping[str, Sequence[float]]) -> Draw:
    """A line a row of the table: a dot for each run, and a bar at their mean; the teacher's mean across all.

    Args:
        values: of each row's runs.
    """
    rows = [row for row in table.rows if metric in row.cells and row.policy != "teacher"]
    teacher = next(
        (row.cells[metric].mean for row in table.rows if row.policy == "teacher" and metric in row.cells), None
    )

    def draw(style: Style) -> Any:
        longest = max((len(row.name) for row in rows), default=0)
        figure, axes = _axes(0.27 * len(rows) + 0.55, style, left=min(0.42, 0.04 + 0.0165 * longest))
        for place, row in enumerate(rows):
            colour = style.ink if row.policy == "base" else PALETTE[0]
            cell = row.cells[metric]
            axes.plot([cell.low, cell.high], [place, place], color=colour, linewidth=1.2, alpha=0.45)
            shown = values.get(row.name, ())
            axes.scatter(shown, [place] * len(shown), color=colour, s=14, alpha=0.55, linewidths=0)
            axes.plot([cell.mean] * 2, [place - 0.28, place + 0.28], color=colour, linewidth=2.2)
        if teacher is not None:
            axes.axvline(teacher, color=style.ink, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="x", color=style.rule, linewidth=0.7)
        axes.margins(x=0.06)
        return figure

    return draw


def result_over_compute(points: Sequence[Point]) -> Draw:
    """Means with ranges over PFLOP, a line a method; a ring marks those that no other one dominates."""
    methods = list(dict.fromkeys(point.method for point in points))

    def draw(style: Style) -> Any:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator  # a second to import

        below = 0.55 + 0.18 * -(-len(methods) // 3)
        figure, axes = _axes(2.2 + below, style, left=0.1, below=below)
        for number, method in enumerate(methods):
            mine = [point for point in points if point.method == method]
            colour, marker = PALETTE[number % len(PALETTE)], _MARKERS[number // len(PALETTE) % len(_MARKERS)]
            x, mean = [point.pflop for point in mine], [point.cell.mean for point in mine]
            spread = [[p.cell.mean - p.cell.low for p in mine], [p.cell.high - p.cell.mean for p in mine]]
            axes.errorbar(x, mean, spread, color=colour, marker=marker, markersize=4, linewidth=1.4, elinewidth=0.8,
                          label=method)  # fmt: skip
        best = [point for point in points if point.on_front]
        axes.scatter([p.pflop for p in best], [p.cell.mean for p in best], s=70, facecolors="none", linewidths=1.1,
                     edgecolors=style.ink)  # fmt: skip
        costs = [point.pflop for point in points]
        if max(costs) > 8 * min(costs) > 0:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(costs) < 100 * min(costs) else (1,)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda cost, _: f"{cost:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("PFLOP of training", fontsize=8, color=style.ink)
        axes.grid(axis="y", color=style.rule, linewidth=0.7)
        figure.legend(loc="lower center", ncols=3, fontsize=8, frameon=False, labelcolor=style.ink, borderpad=0.1)
        return figure

    return draw


def on_page(draw: Draw) -> Markup:
    """As SVG in the colours of the page."""
    return figure_svg(lambda: draw(Style(INK, RULE)))


def write_plot(draw: Draw, path: Path) -> None:
    """`path`.svg and `path`.png, on white."""
    figure = draw(Style(*ON_WHITE))
    for kind in _UNDATED:
        write_figure(figure, path.with_name(f"{path.name}.{kind}"))


def write_figure(figure: Any, path: Path) -> None:
    """An svg or png by its name, on white; the same bytes for the same figure."""
    from matplotlib import rc_context  # a second to import
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kind = path.suffix[1:]
    FigureCanvasAgg(figure)
    with rc_context({"svg.hashsalt": "afd_scale"}), replacing(path) as partial:
        figure.savefig(partial, format=kind, dpi=160, facecolor="white", metadata=_UNDATED[kind])


def values_of(
    table: Table, plan: Plan, records: Mapping[str, Record], failed: Mapping[str, str], metric: str
) -> dict[str, list[float]]:
    """Of each row's runs."""
    values = {}
    for row in table.rows:
        if row.name in plan.study.methods:
            trials = plan.row(row.name, plan.steps_of(row.name, table.view), records, failed)
            found = [records[trial.name].value(metric) for trial in trials if trial.name in records]
            values[row.name] = [value for value in found if value is not None]
    return values


def _axes(height: float, style: Style, left: float, below: float = 0.3) -> tuple[Any, Any]:
    """A figure with the axes that drawings share.

    Args:
        height: inches.
        left, below: margins; a share of the width, and inches.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((left, below / height, 0.97 - left, 1 - (below + 0.12) / height))
    axes.patch.set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(style.rule)
    axes.tick_params(which="both", length=0, labelsize=8, labelcolor=style.ink)
    axes.set_axisbelow(True)
    return figure, axes
