"""What is known of judges in each regime, as markdown: how robust they are, what they predict, with limits."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from afd_scale.evaluation.suites import Metric
from afd_scale.study.judged_runs import JudgedRun, judges_of
from afd_scale.study.prediction import Correlation
from afd_scale.study.regimes import PHYSICS, REGIMES
from afd_scale.study.texts import markdown_table

QUALITIES = ("pair_accuracy", "calibration_error", "brier", "agreement/physics", "agreement/sharpness", "prompt_right")
MAIN_METRICS = ("trajectory_fd", PHYSICS, "dynamic_degree", "sharp_fraction", "sharpness")  # as far as a world has them

BETWEEN = """\
Spearman over runs, 95 % by bootstrap over runs; a star where runs dealt out anew are as far from zero in less than one
case of twenty. All is turned so that more is better: positive says that a better judge comes with a better student at
the end. `at` is the share of a run's steps at which the judge is measured.
"""
WITHIN = """\
Spearman over the checkpoints of a run, the mean over runs; a star where signs at random are as far from zero in less
than one case of twenty. `levels`: a quality and the metric at the same checkpoint. `changes`: a quality, and what the
metric does until the next checkpoint.
"""
LIMITS = """\
- Runs are the sample: an interval over a handful of them is wide, and percentiles of so few are too narrow. Runs differ
  in what they were made to differ in (seed, base, method, data); what is found holds for such differences.
- Many correlations are looked at, and one in twenty has a star by chance; those of one run are not independent either.
  What was not asked before is a guess.
- A judge is measured on its own student's rollouts: the better the student, the harder the pairs. So a worse pair
  accuracy may go with a better student. `prompt_right` looks at the teacher's clips alone and has no such part.
- Within a run everything moves with time, and so levels may move together without one making the other. Changes are
  less open to that; they say what comes next, not how a run ends.
- Late windows show a ball that has bounced and come to rest: physics is measured where the teacher's still flies.
- The text is a bag of words: another order is no drift at all, other words around the same attributes are.
- `unseen` is unseen by the training against the teacher; the base may have been pretrained on all prompts.
- Toy worlds are in the reach of student and judge. None of this is evidence about real video.
"""


def judge_tables(runs: Sequence[JudgedRun], found: Sequence[Correlation], metrics: Mapping[str, Metric]) -> str:
    """The whole table.

    Args:
        metrics: how to read the student's.
    """
    main = [name for name in MAIN_METRICS if name in metrics]
    checkpoints = sum(len(run.checkpoints) for run in runs)
    between = _correlation_table([one for one in found if one.kind == "between"], main)
    within = _correlation_table([one for one in found if one.kind != "between"], main)
    parts = [
        f"# Judges and what becomes of the student\n\n{len(runs)} runs, {checkpoints} checkpoints. Means over runs, in "
        "brackets the least and the greatest.",
        f"## How robust the judges are\n\nAt the end of each run.\n\n{_quality_table(runs)}",
        "## What the students do\n\nAt the end of each run; behind the stroke the teacher's own figure.\n\n"
        f"{_student_table(runs, metrics)}",
        f"## Between runs: does a judge's quality predict the end?\n\n{BETWEEN}\n{between}",
        f"## Within runs, over time\n\n{WITHIN}\n{within}",
        "## In short\n\n" + "\n".join(_answers(found, main)),
        f"## Limits\n\n{LIMITS.strip()}",
    ]
    return "\n\n".join(parts) + "\n"


def _quality_table(runs: Sequence[JudgedRun]) -> str:
    rows = []
    for judge in judges_of(runs):
        for regime in REGIMES:
            ends = [end for end in _ends(runs, regime) if judge in end["judges"]]
            if ends:
                cells = [_spread(end["judges"][judge].get(quality) for end in ends) for quality in QUALITIES]
                rows.append([judge, regime, str(len(ends)), *cells])
    return markdown_table(["judge", "regime", "runs", *map(_title, QUALITIES)], rows)


def _student_table(runs: Sequence[JudgedRun], metrics: Mapping[str, Metric]) -> str:
    rows = []
    for regime in REGIMES:
        ends = _ends(runs, regime)
        if ends:
            cells = [_beside(ends, name) for name in metrics]
            rows.append([regime, str(len(ends)), *cells])
    return markdown_table(["regime", "runs", *(metric.label for metric in metrics.values())], rows)


def _beside(ends: Sequence[Mapping[str, Any]], name: str) -> str:
    teacher = [end["teacher"][name] for end in ends if name in end["teacher"]]
    said = _spread(end["student"].get(name) for end in ends)
    return f"{said} / {mean(teacher):.3g}" if teacher else said


def _correlation_table(found: Sequence[Correlation], main: Sequence[str]) -> str:
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for one in found:
        if one.quality in QUALITIES and one.metric in main:
            place = one.kind if one.share is None else f"{one.share:g}"
            cells.setdefault((one.judge, one.regime, _title(one.quality), place), {})[one.metric] = _cell(one)
    if not cells:
        return "Too few: a rank correlation is of 4 runs, or of 4 checkpoints of one, at least."
    rows = [[*key, *(row.get(metric, "-") for metric in main)] for key, row in cells.items()]
    return markdown_table(["judge", "regime", "quality", "at", *main], rows)


def _answers(found: Sequence[Correlation], main: Sequence[str]) -> list[str]:
    """Of each kind, how many correlations are clear, and which."""
    lines = []
    said: Mapping[str, Callable[[Correlation], bool]] = {
        "Between runs, judged at the end": lambda one: one.kind == "between" and one.share == 1.0,
        "Between runs, judged earlier": lambda one: one.kind == "between" and one.share != 1.0,
        "Within runs, levels": lambda one: one.kind == "levels",
        "Within runs, changes": lambda one: one.kind == "changes",
    }
    for name, belongs in said.items():
        those = [one for one in found if belongs(one) and one.quality in QUALITIES and one.metric in main]
        tested = [one for one in those if one.p is not None]
        clear = sorted((one for one in tested if one.is_clear), key=lambda one: -abs(one.rho))
        if not tested:
            lines.append(f"- {name}: too few runs to tell from chance.")
            continue
        which = "; ".join(f"{one.judge}, {one.regime}: {_title(one.quality)} with {one.metric} {_cell(one)}"
                          for one in clear[:5])  # fmt: skip
        lines.append(f"- {name}: {len(clear)} of {len(tested)} correlations have a star, where chance alone gives "
                     f"about {len(tested) / 20:.1f}. " + (f"The strongest: {which}." if clear else "So none is known.")
                     )  # fmt: skip
    return lines


def _ends(runs: Sequence[JudgedRun], regime: str) -> list[Mapping[str, Any]]:
    """A regime at the end of each run that has it."""
    return [run.end[regime] for run in runs if regime in run.end]


def _spread(values: Iterable[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    return f"{mean(there):.3g}" + (f" ({min(there):.3g} to {max(there):.3g})" if len(there) > 1 else "")


def _cell(one: Correlation) -> str:
    interval = "" if one.low is None or one.high is None else f" [{one.low:+.2f}, {one.high:+.2f}]"
    return f"{one.rho:+.2f}{'*' if one.is_clear else ''}{interval}"


def _title(quality: str) -> str:
    return quality.replace("_", " ").replace("/", " ")
