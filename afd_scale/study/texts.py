"""The tables of a study as Markdown and CSV, and the words of its page."""

import csv
import io
from collections.abc import Collection, Mapping, Sequence

from afd_scale.evaluation.page import decimals_for
from afd_scale.evaluation.suites.suite import Metric
from afd_scale.study.plan import FLOPS, OWN, STEPS, Plan, Tried
from afd_scale.study.results import Record
from afd_scale.study.tables import BUDGETS, Row, Table, own_rows

ARROWS = {"lower": "↓", "higher": "↑", "teacher": "→", None: ""}
TIMES = "\N{MULTIPLICATION SIGN}"
ARROWS_NOTE = "↓ lower is better, ↑ higher is better, → the closer to the teacher's the better"
BUDGET_LABELS = {
    "steps": "updates", "teacher_clips": "teacher clips", "clips_read": "clips read", "pflop": "PFLOP",
    "seconds": "seconds", "calls": "passes a video",
}  # fmt: skip


def view_title(view: str, plan: Plan) -> str:
    compared = plan.study.compared_with
    return {
        OWN: "Each method at its own steps",
        STEPS: f"At as many updates as {compared}",
        FLOPS: f"At as many FLOPs as {compared}",
    }[view]


def shown_cells(table: Table, metrics: Mapping[str, Metric]) -> dict[str, dict[str, str]]:
    """By row and metric: mean and range, equal decimals in a column."""
    texts: dict[str, dict[str, str]] = {row.name: {} for row in table.rows}
    for metric in metrics:
        rows = [row for row in table.rows if metric in row.cells]
        # The teacher's may be smaller by far.
        decimals = decimals_for([row.cells[metric].mean for row in rows if row.policy != "teacher"])
        for row in rows:
            cell = row.cells[metric]
            mean, low, high = (f"{value:.{decimals}f}" for value in (cell.mean, cell.low, cell.high))
            texts[row.name][metric] = mean if cell.runs == 1 else f"{mean} [{low}, {high}]"
    return texts


def shown_differences(table: Table, metrics: Mapping[str, Metric]) -> dict[str, dict[str, str]]:
    """By row and metric: mean difference, its interval, and the ratio of the means; rows without one left out."""
    texts: dict[str, dict[str, str]] = {row.name: {} for row in table.rows if row.differences}
    for metric in metrics:
        rows = [row for row in table.rows if metric in row.differences]
        found = [row.differences[metric] for row in rows]
        decimals = decimals_for([each.mean for each in found])
        for row, each in zip(rows, found, strict=True):
            mean = f"{each.mean:+.{decimals}f}"
            interval = "" if each.low is None else f" [{each.low:+.{decimals}f}, {each.high:+.{decimals}f}]"
            ratio = "" if each.ratio is None else f" {TIMES}{each.ratio:.2f}"
            texts[row.name][metric] = f"{mean}{interval}{ratio}"
    return texts


def shown_budget(row: Row) -> dict[str, str]:
    return {key: number(value) for key, value in row.budget.items()}


def tuning(plan: Plan, name: str, records: Mapping[str, Record]) -> tuple[int, float] | None:
    """Runs and PFLOP that the choice of a method's rate took; None where it chose none of its own."""
    trials = plan.choosing(name)
    found = [records[trial.name] for trial in trials if trial.name in records]
    return (len(found), sum(record.pflop for record in found)) if trials else None


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"


def markdown(plan: Plan, tables: Sequence[Table], records: Mapping[str, Record], failed: Mapping[str, str]) -> str:
    """All tables, what was chosen, and what is missing."""
    metrics = plan.metrics
    labels = [f"{metric.label} {ARROWS[metric.better]}".strip() for metric in metrics.values()]
    lines = [f"# {plan.study.title}", ""]
    for table in tables:
        lines += [f"## {view_title(table.view, plan)}: {table.heading}", ""]
        cells = shown_cells(table, metrics)
        lines += _paragraph(["", "updates", *labels, "runs"], [
            [row.name, number(row.budget["steps"]) if row.budget else "",
             *(cells[row.name].get(m, "") for m in metrics), _runs(row)] for row in table.rows
        ])  # fmt: skip
        if differences := shown_differences(table, metrics):
            lines += [f"Minus {plan.study.compared_with}, paired by seed and base, with 95 % intervals of the mean "
                      "(bootstrap over pairs) and the ratio of the means:", ""]  # fmt: skip
            lines += _paragraph(["", *labels, "pairs"], [
                [row.name, *(differences[row.name].get(m, "") for m in metrics),
                 str(max(each.pairs for each in row.differences.values()))]
                for row in table.rows if row.differences
            ])  # fmt: skip
    lines += ["Means over seeds and bases with the least and the greatest run in brackets. " + ARROWS_NOTE + ".", ""]
    lines += ["## Budgets", ""]
    lines += _paragraph(["", *BUDGET_LABELS.values(), "runs to choose its rate", "their PFLOP"], [
        [name, *(shown_budget(row).get(key, "") for key in BUDGETS),
         *(("", "") if (spent := tuning(plan, name, records)) is None else (str(spent[0]), number(spent[1])))]
        for name, row in own_rows(tables).items()
    ])  # fmt: skip
    lines += _choices(plan, records, failed)
    if missing := missing_runs(plan, records, failed):
        lines += [f"## Missing: {len(missing)}", "", *(f"- {name}: {why}" for name, why in missing.items()), ""]
    return "\n".join(lines)


def missing_runs(plan: Plan, records: Mapping[str, Record], failed: Mapping[str, str]) -> dict[str, str]:
    """Why, by name: runs that are known to be needed, and rows that wait for a choice."""
    missing = {trial.name: failed.get(trial.name, "not done yet") for trial in plan.trials(records, failed)
               if trial.name not in records}  # fmt: skip
    for name, method in plan.study.methods.items():
        trained = method.of or name
        if plan.chooser(trained) is not None and plan.chosen(trained, records, failed) is None:
            missing[name] = (
                f"its learning rate is not chosen, {plan.chooser(trained)} has runs that are missing or failed"
            )
    return missing


def choice_remark(tried: Sequence[Tried], chosen: float | None) -> str:
    """What to know of a choice."""
    if chosen is None:
        return "not chosen yet"
    rates = sorted(each.rate for each in tried)
    if len(rates) > 1 and chosen in (rates[0], rates[-1]):
        return "at the edge of what was tried"
    return ""


def csv_text(plan: Plan, tables: Sequence[Table]) -> str:
    """A line a row and metric."""
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    write(["view", "table", "row", "policy", "metric", "mean", "low", "high", "runs", "planned", "difference",
           "difference_low", "difference_high", "pairs", "ratio", *BUDGETS])  # fmt: skip
    for table in tables:
        for row in table.rows:
            for metric, cell in row.cells.items():
                found = row.differences.get(metric)
                gap = [""] * 5 if found is None else [found.mean, found.low, found.high, found.pairs, found.ratio]
                write([table.view, table.heading, row.name, row.policy, metric, cell.mean, cell.low, cell.high,
                       cell.runs, row.planned, *gap, *(row.budget.get(key, "") for key in BUDGETS)])  # fmt: skip
    return text.getvalue()


def choices(plan: Plan, records: Mapping[str, Record], failed: Collection[str]) -> list[dict[str, str]]:
    """The rates that were tried: `name` of the method, `rate`, `mean`, `runs`, and what to know of that which was
    `chosen`."""
    rows = []
    for name in plan.trained:
        tried, chosen = plan.tried(name, records), plan.chosen(name, records, failed)
        rows += [
            {"name": name, "rate": f"{each.rate:g}", "mean": "" if each.mean is None else f"{each.mean:.3g}",
             "runs": f"{each.runs} of {each.planned}",
             "chosen": "" if each.rate != chosen else f"chosen {choice_remark(tried, chosen)}".strip()}
            for each in tried
        ]  # fmt: skip
    return rows


def _choices(plan: Plan, records: Mapping[str, Record], failed: Collection[str]) -> list[str]:
    choose, rows = plan.study.choose, choices(plan, records, failed)
    if choose is None or not rows:
        return []
    seeds = ", ".join(map(str, choose.seeds))
    return ["## Learning rates", "", f"Chosen by the mean of {choose.metric}, {choose.better} is better, over all "
            f"bases and seeds {seeds}, which are in no table.", "",
            *_paragraph(["method", "rate", choose.metric, "runs", ""], [[*row.values()] for row in rows])]  # fmt: skip


def _paragraph(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [markdown_table(head, rows), ""]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def _runs(row: Row) -> str:
    return str(row.runs) if row.runs == row.planned else f"{row.runs} of {row.planned}"
