"""What docs/study shows follows from the figures beside it."""

import json
import re
from pathlib import Path

import pytest

from afd_scale.study.plan import Plan
from afd_scale.study.results import RESULTS, read_results
from afd_scale.study.runs import Place, check_known
from afd_scale.study.sections import read_study
from afd_scale.study.tables import make_tables
from afd_scale.study.texts import markdown
from tests.unit.study.stand_ins import ROOT

SHOWN = ROOT / "docs" / "study"
STUDIES = sorted(path.parent for path in SHOWN.glob(f"*/{RESULTS}"))
FIGURE = re.compile(r"(?<![\w.])\d*\.\d+(?!\w|\.\d)")
DRIFT = "Longer than the teacher's clips"
# By section, the studies whose rows it shows, and others whose figures its text has.
ROWS = {
    "The methods": ("kick",),
    "The first world": ("drop",),
    "AFD after a little imitation": ("kick_after_sft", "kick_after_more_sft"),
    "What moves the limit": ("kick_limit",),
    "AFD without each of its parts": ("kick_ablations",),
}
MORE = {"Does a judge's quality predict the student?": ("kick_judges",)}


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_tables_are_those_of_the_results(folder: Path) -> None:
    plan = Plan(read_study(ROOT / "configs" / "studies" / f"{folder.name}.yaml"), ROOT)
    results = read_results(folder / RESULTS)
    records = {record.name: record for record in results.runs}
    assert results.title == plan.study.title
    for trial in plan.trials(records, results.failed):
        check_known(records[trial.name], trial, Place(ROOT, ROOT / "runs"))
    text = markdown(plan, make_tables(plan, records, results.failed), records, results.failed)
    assert (folder / "table.md").read_text() == text


Rows = list[list[str]]


def sections(text: str) -> dict[str, str]:
    """By their titles; what stands before the first has none."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))


def rows_of(text: str) -> Rows:
    """Of all tables, cell by cell; without the row of dashes."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def prose_of(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("|"))


def figures(text: str) -> set[float]:
    return {float(figure) for figure in FIGURE.findall(text)}


def means(text: str) -> set[float]:
    """Of the cells, without ranges and differences."""
    cells = (cell.partition(" [")[0] for row in rows_of(text) for cell in row)
    return figures("\n".join(cell for cell in cells if not cell.startswith(("+", "-"))))


def tables(*studies: str) -> str:
    return "\n".join((SHOWN / study / "table.md").read_text() for study in studies)


def holds(row: list[str], cells: list[str], *, means: bool) -> bool:
    """Whether a row has all cells, in this order; of `means` the ranges are left out."""
    there = iter(cell.partition(" [")[0] if means else cell for cell in row)
    return all(cell in there for cell in cells)


@pytest.mark.parametrize("title", ROWS)
def test_rows_are_those_of_a_study(title: str) -> None:
    """Each row with ranges has its cells, in their order, in one row of a table of the section's studies."""
    there = rows_of(tables(*ROWS[title]))
    shown = [row for row in rows_of(sections((SHOWN / "README.md").read_text())[title]) if any("[" in x for x in row)]
    assert shown
    assert [row for row in shown if not any(holds(each, row[1:], means=False) for each in there)] == []


def test_rows_of_the_readme_are_those_of_a_study() -> None:
    there, shown = rows_of(tables("kick", "kick_after_sft")), rows_of(worth())[1:]
    assert len(shown) > 5
    assert [row for row in shown if not any(holds(each, row[1:], means=True) for each in there)] == []


def worth() -> str:
    return sections((ROOT / "README.md").read_text())["What it is worth"]


def test_figures_of_the_text_are_in_the_tables() -> None:
    """Each decimal fraction is a mean in a table of the page or of the section's studies, or any figure of those whose
    figures its text has; 0.13 may be .13 there. That it is the right one is for readers to see."""
    page = (SHOWN / "README.md").read_text()
    on_page = means(page)
    for title, text in sections(page).items():
        said = figures(prose_of(text))
        there = on_page | means(tables(*ROWS.get(title, ()))) | figures(tables(*MORE.get(title, ())))
        assert said <= there, f"{title}: {sorted(said - there)}"
    assert figures(prose_of(worth())) <= on_page


@pytest.mark.parametrize("folder", ["kick_drift", "drop_drift"])
def test_drift_is_that_of_the_runs(folder: str) -> None:
    """Each row of a table by length has, run by run, the distances of the runs that its folder has under its name."""
    rows = [row for row in rows_of(sections((SHOWN / "README.md").read_text())[DRIFT]) if row[-1] == f"`{folder}`"]
    assert rows
    for _, *cells, names, _ in rows:
        runs = sorted(SHOWN.joinpath(folder).glob(names.strip("`") + ".json"))
        assert runs, names
        spans = [json.loads(run.read_text())["metrics_by_length"]["student"] for run in runs]
        for cell, span in zip(cells, ("0-1x", "1-2x", "2-4x"), strict=True):
            assert cell == ", ".join(f"{run[span]['trajectory_fd']:.1f}" for run in spans)
