"""All that is made of the results of a study: tables, plots and one page that needs nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from afd_scale.evaluation.page import data_url, render
from afd_scale.evaluation.video import read_title
from afd_scale.files import write_text
from afd_scale.study.plan import OWN, Plan, Trial
from afd_scale.study.plots import Draw, on_page, result_over_compute, runs_of_methods, values_of, write_plot
from afd_scale.study.results import Record
from afd_scale.study.runs import Place
from afd_scale.study.samples import write_samples
from afd_scale.study.tables import BUDGETS, Table, make_tables, over_compute, own_rows
from afd_scale.study.texts import (
    ARROWS,
    ARROWS_NOTE,
    BUDGET_LABELS,
    choices,
    csv_text,
    markdown,
    missing_runs,
    number,
    shown_budget,
    shown_cells,
    shown_differences,
    tuning,
    view_title,
)

TABLE, CSV, PAGE = "table.md", "table.csv", "index.html"


@dataclass(frozen=True)
class _Drawing:
    """A plot of a metric.

    Attributes:
        kind: of `runs`, or over `compute`.
        file: its name, without an ending.
    """

    kind: str
    label: str
    file: str
    draw: Draw

    @property
    def svg(self) -> Markup:
        return on_page(self.draw)


def write_outputs(plan: Plan, place: Place, records: Mapping[str, Record], failed: Mapping[str, str]) -> str:
    """Write table.md, table.csv, plots/, samples/ and index.html into the folder of a study.

    Args:
        records: of `results.json`, by name.
        failed: why, by name.
    Returns:
        The content of table.md.
    """
    place.out.mkdir(parents=True, exist_ok=True)
    tables = make_tables(plan, records, failed)
    text = markdown(plan, tables, records, failed)
    write_text(place.out / TABLE, text)
    write_text(place.out / CSV, csv_text(plan, tables))
    drawings = _drawings(plan, tables, records, failed)
    (place.out / "plots").mkdir(exist_ok=True)
    for drawing in drawings:
        write_plot(drawing.draw, place.out / "plots" / drawing.file)
    videos = write_samples(plan, place, records, failed)
    write_text(place.out / PAGE, _page(plan, place, tables, drawings, videos, records, failed))
    return text


def _drawings(
    plan: Plan, tables: Sequence[Table], records: Mapping[str, Record], failed: Mapping[str, str]
) -> list[_Drawing]:
    drawings = []
    own = [table for table in tables if table.view == OWN]
    for name, metric in plan.metrics.items():
        label = f"{metric.label} {ARROWS[metric.better]}".strip()
        for place, table in enumerate(own):
            if any(name in row.cells for row in table.rows):
                several = len(plan.study.tables()) > 1
                draw = runs_of_methods(table, name, values_of(table, plan, records, failed, name))
                drawings.append(_Drawing("runs", f"{table.heading}: {label}" if several else label,
                                         f"{name}_{place}" if several else name, draw))  # fmt: skip
        points = over_compute(plan, records, failed, name, metric.better)
        if len({point.pflop for point in points}) > 1:
            drawings.append(_Drawing("compute", label, f"{name}_over_compute", result_over_compute(points)))
    return drawings


def _page(
    plan: Plan, place: Place, tables: Sequence[Table], drawings: Sequence[_Drawing],
    videos: Sequence[Path], records: Mapping[str, Record], failed: Mapping[str, str],
) -> str:  # fmt: skip
    planned = plan.trials(records, failed)
    return render(
        "study.html.j2",
        package="afd_scale.study",
        name=plan.study.title,
        title_facts=_facts(plan, records, planned),
        tables=[_table(plan, table) for table in tables],
        compared=plan.study.compared_with,
        metrics=[{"label": metric.label, "arrow": ARROWS[metric.better], "meaning": metric.meaning}
                 for metric in plan.metrics.values()],
        arrows_note=ARROWS_NOTE,
        over_runs=[drawing for drawing in drawings if drawing.kind == "runs"],
        over_compute=[drawing for drawing in drawings if drawing.kind == "compute"],
        videos=[(read_title(path), data_url(path, "video/mp4")) for path in videos],
        grid=data_url(place.out / "samples" / "grid.png", "image/png") if videos else None,
        shown_run=f"seed {plan.study.seeds[0]}, base {next(iter(plan.study.bases))}",
        budget_labels=list(BUDGET_LABELS.values()),
        budgets={name: ([shown_budget(row).get(key, "") for key in BUDGETS], _tuning(plan, name, records))
                 for name, row in own_rows(tables).items()},
        choices=choices(plan, records, failed),
        choose=plan.study.choose,
        settings={name: _settings(plan, name) for name in plan.study.methods},
        study=plan.study,
        missing=missing_runs(plan, records, failed),
        commands=[(record.name, record.command) for record in records.values()],
    )  # fmt: skip


def _facts(plan: Plan, records: Mapping[str, Record], planned: Sequence[Trial]) -> list[tuple[str, str]]:
    study = plan.study
    there = records.values()
    commits = sorted({record.commit for record in there if record.commit})
    dates = sorted({record.date[:10] for record in there if record.date})
    facts = {
        "runs": f"{sum(trial.name in records for trial in planned)} of {len(planned)}",
        "seeds": ", ".join(map(str, study.seeds)),
        "bases": ", ".join(study.bases) if len(study.bases) > 1 else "",
        "PFLOP of all": number(sum(record.pflop for record in there if not plan.study.methods[record.method].of)),
        "date": " to ".join(dict.fromkeys([*dates[:1], *dates[-1:]])),
        "commit": ", ".join(commits),
    }
    return [(label, value) for label, value in facts.items() if value]


def _table(plan: Plan, table: Table) -> dict[str, Any]:
    cells, differences = shown_cells(table, plan.metrics), shown_differences(table, plan.metrics)
    return {
        "title": view_title(table.view, plan),
        "heading": table.heading,
        "rows": [
            {
                "name": row.name,
                "policy": row.policy,
                "steps": number(row.budget["steps"]) if row.budget else "",
                "cells": [_split(cells[row.name].get(metric, "")) for metric in plan.metrics],
                "runs": f"{row.runs}" if row.runs == row.planned else f"{row.runs} of {row.planned}",
            }
            for row in table.rows
        ],
        "differences": [
            {
                "name": row.name,
                "cells": [_split(differences[row.name].get(metric, "")) for metric in plan.metrics],
                "pairs": max(each.pairs for each in row.differences.values()),
            }
            for row in table.rows
            if row.differences
        ],
    }


def _split(text: str) -> tuple[str, str]:
    """A number and what stands behind it."""
    first, _, rest = text.partition(" ")
    return first, rest


def _tuning(plan: Plan, name: str, records: Mapping[str, Record]) -> tuple[str, str]:
    spent = tuning(plan, name, records)
    return ("", "") if spent is None else (str(spent[0]), number(spent[1]))


def _settings(plan: Plan, name: str) -> tuple[str, str]:
    """Where the runs of a method come from, and what is overridden."""
    method = plan.study.methods[name]
    if method.of is not None:
        return f"students of {method.of}, sampled otherwise", " ".join(method.sampler)
    source = f"like {method.like}" if method.like else str(method.config)
    overrides = [*method.overrides, *([f"{method.steps} steps"] if method.steps else [])]
    rates = method.rates
    if rates is not None:
        overrides.append(f"{rates.field} of {', '.join(f'{value:g}' for value in rates.values)}")
    return source, "; ".join(overrides)
