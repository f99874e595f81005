"""The report of a run: one HTML file that needs nothing else, and the table of its metrics.

Everything is read from the run folder (`config.yaml`, `metrics.jsonl`, `summary.json`, `samples/`); what is
not there yet is left out, so a report can be written at any time.
"""

import importlib.metadata
import math
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from afd_scale.evaluation.agreement import CALIBRATION_BINS
from afd_scale.evaluation.alarms import LOOK, PREFIX, episodes
from afd_scale.evaluation.curves import curve_svg
from afd_scale.evaluation.lengths import length_curves, length_rows
from afd_scale.evaluation.page import aligned, data_url, render
from afd_scale.evaluation.run_files import (
    CONFIG,
    METRICS,
    SECTIONS,
    read_diagnosed,
    read_metrics,
    read_sections,
    read_summary,
)
from afd_scale.evaluation.suites import SUITES
from afd_scale.evaluation.suites.suite import Better, Metric
from afd_scale.evaluation.video import read_title
from afd_scale.files import write_text

REPORT_NAME = "report.html"
STEP, COMPUTE, STEP_SECONDS = "step", "compute/pflop", "system/step_seconds"
TEACHER = f"{LOOK}teacher/"  # what the teacher's videos have of a diagnosed metric
POLICIES = ("base", "student", "teacher")
VERSIONED = ("afd-scale", "torch", "deepspeed", "diffusers", "transformers", "numpy", "mosaicml-streaming", "av",
             "opencv-python-headless")  # fmt: skip


def provenance_header(ranks: int) -> str:
    """`# key: value` lines that open a run's config.yaml: date, commit, versions, ranks."""
    return "".join(f"# {key}: {value}\n" for key, value in (provenance() | {"ranks": str(ranks)}).items())


def provenance() -> dict[str, str]:
    """Date, commit and versions of now."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        commit = found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "not a git checkout"
    installed = {dist.name: dist.version for dist in importlib.metadata.distributions() if dist.name in VERSIONED}
    versions = {name: installed[name] for name in VERSIONED if name in installed}
    return {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "git_commit": commit, **versions}


def metric_table(summary: Mapping[str, Any]) -> str:
    """The metrics of a summary.json as aligned plain text, a line a metric, a column a policy; and below them, where
    videos are longer than the data's, those by length, a line a metric and policy, a column a span."""
    rows = [[row["label"], row["better"], *row["values"]] for row in _metric_rows(summary)]
    text = _aligned_text([["", "better", *_policies(summary)], *rows])
    by_length = summary.get("metrics_by_length", {})
    return f"{text}\n\n{_aligned_text(length_rows(by_length, _over_time(summary)))}" if by_length else text


def _aligned_text(rows: Sequence[Sequence[str]]) -> str:
    """Two columns of words, then numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]  # fmt: skip
    return "\n".join(line.rstrip() for line in lines)


def write_report(run_folder: Path, x: str | None = None) -> Path:
    """Write `report.html` into a run's folder and return its path.

    Args:
        x: metric that curves are drawn over, beside those that a reader may choose anyway; None is the step.
    Raises:
        ValueError: the folder holds no run, a file of it is damaged, or its metrics have no x.
    """
    config = read_sections(run_folder, SECTIONS)
    config_text = (run_folder / CONFIG).read_text()
    facts = header_facts(config_text)
    summary: Mapping[str, Any] = read_summary(run_folder) or {}
    metrics_path = run_folder / METRICS
    records = read_metrics(metrics_path) if metrics_path.is_file() else []

    metrics = SUITES[suite].metrics if (suite := config.get("evaluation", {}).get("metrics", "toy")) in SUITES else {}
    diagnosed = read_diagnosed(run_folder)
    axes = _axes(records, x)

    steps = summary.get("steps") or (max(records[-1]["step"], 0) if records else 0)
    title_facts = [
        ("method", summary.get("method") or config["method"]["name"]),
        ("steps", f"{steps:,}" if summary else f"{steps:,} of {config['train']['steps']:,}, not finished"),
        *((label, facts.pop(key)) for key, label in
          (("ranks", "ranks"), ("date", "date"), ("git_commit", "commit")) if key in facts),
    ]  # fmt: skip
    samples = newest_samples(run_folder / "samples")
    html = render(
        "report.html.j2",
        name=config["name"],
        title_facts=title_facts,
        policies=_policies(summary),
        metric_rows=_metric_rows(summary),
        length_curves=length_curves(summary.get("metrics_by_length", {}), _over_time(summary)),
        clips=[(read_title(path), data_url(path, "video/mp4")) for path in samples if path.suffix == ".mp4"],
        images=[(path.stem, data_url(path, "image/png")) for path in samples if path.suffix == ".png"],
        alarms=episodes(records, metrics),
        watched=any(key.startswith(PREFIX) for record in records for key in record),
        diagnosed=diagnosed,
        calibration_bins=CALIBRATION_BINS,
        axes=list(axes),
        curve_groups=_curve_groups(records, list(axes.values())),
        timings=_timings(summary.get("seconds", {})),
        config_text=config_text,
        versions=facts,
    )
    report = run_folder / REPORT_NAME
    write_text(report, html)
    return report


def header_facts(config_text: str) -> dict[str, str]:
    """What `provenance_header` wrote."""
    return dict(re.findall(r"^# ([\w.-]+): (.+)$", config_text, flags=re.MULTILINE))


def newest_samples(folder: Path) -> list[Path]:
    """Sample files of the end of the run, else those of the newest step folder."""
    for place in [folder, *sorted(folder.glob("*/"), reverse=True)]:
        files = sorted(path for path in place.glob("[!.]*") if path.suffix in {".mp4", ".png"})
        if files:
            return files
    return []


def _policies(summary: Mapping[str, Any]) -> list[str]:
    measured = summary.get("metrics", {})
    return [name for name in POLICIES if name in measured] + [name for name in measured if name not in POLICIES]


def _metric_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each metric that any policy has, the suite's first and in its order."""
    measured: dict[str, dict[str, float | None]] = summary.get("metrics", {})
    known = SUITES[suite].metrics if (suite := summary.get("suite", "toy")) in SUITES else {}
    names = dict.fromkeys([*known, *(name for values in measured.values() for name in values)])
    rows = []
    for name in names:
        values = {policy: _number(measured[policy].get(name)) for policy in _policies(summary)}
        if not any(math.isfinite(value) for value in values.values()):
            continue
        metric = known.get(name, Metric(name, None, ""))
        rows.append({
            "name": name,
            "label": metric.label,
            "better": metric.better or "",
            "meaning": metric.meaning,
            "values": aligned(list(values.values())),
            "ratio": _ratio(values),
            "verdict": _verdict(metric.better, values),
        })  # fmt: skip
    return rows


def _over_time(summary: Mapping[str, Any]) -> Mapping[str, Metric]:
    """How to read the suite's metrics of parts of a video."""
    return SUITES[suite].over_time if (suite := summary.get("suite", "toy")) in SUITES else {}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _ratio(values: Mapping[str, float]) -> str:
    """Student over base."""
    base, student = values.get("base", math.nan), values.get("student", math.nan)
    return f"{student / base:.2f}" if base and math.isfinite(student / base) else ""


def _verdict(better: Better | None, values: Mapping[str, float]) -> str:
    """Whether the student is `better` or `worse` than the base, where that is known and more than rounding shows."""
    if better is None or _ratio(values) == "1.00":
        return ""
    base, student, teacher = (values.get(policy, math.nan) for policy in POLICIES)
    towards_teacher = abs(base - teacher) - abs(student - teacher)
    gain = {"lower": base - student, "higher": student - base, "teacher": towards_teacher}[better]
    return "better" if gain > 0 else "worse" if gain < 0 else ""


def _axes(records: Sequence[Mapping[str, Any]], x: str | None) -> dict[str, list[float | None]]:
    """What curves may be drawn over, a value a record: first what was asked for, then steps, compute, time.

    Raises:
        ValueError: no record has x.
    """
    logged = dict.fromkeys(key for record in records for key in record)
    if x is not None and x not in logged:
        raise ValueError(f"x ({x}) must be a metric of the run: {', '.join(logged) or 'it has logged none'}")
    names = dict.fromkeys([*([] if x is None else [x]), STEP, *([COMPUTE] if COMPUTE in logged else [])])
    axes = {name: [record.get(name) for record in records] for name in names}
    if STEP_SECONDS in logged:
        axes["seconds of training"] = list(_seconds(records))
    return axes


def _seconds(records: Sequence[Mapping[str, Any]]) -> Iterator[float | None]:
    """Time in steps since the first logged one."""
    total, before = 0.0, None
    for record in records:
        each = record.get(STEP_SECONDS)
        total += 0.0 if before is None or each is None else each * (record[STEP] - before)
        before = record[STEP]
        yield total


def _curve_groups(
    records: Sequence[Mapping[str, Any]], axes: Sequence[Sequence[float | None]]
) -> list[tuple[str, list[tuple[str, str, list[Markup]]]]]:
    """(group, [(metric, last value, an svg for each axis)]), grouped by what stands before the last "/"."""
    groups: dict[str, list[tuple[str, str, list[Markup]]]] = {}
    keys = dict.fromkeys(key for record in records for key in record if key != STEP)
    for key in (key for key in keys if not key.startswith((PREFIX, TEACHER))):
        rows = [row for row, record in enumerate(records) if key in record]
        values = [math.nan if records[row][key] is None else records[row][key] for row in rows]
        wanted = records[rows[-1]].get(TEACHER + key.removeprefix(LOOK)) if key.startswith(LOOK) else None
        drawn = []
        for axis in axes:
            xs = [math.nan if (x := axis[row]) is None else x for row in rows]
            drawn.append(curve_svg(xs, values, wanted))
        group, _, name = key.rpartition("/")
        last = f"{values[-1]:.4g}" + ("" if wanted is None else f" of {wanted:.4g}")
        groups.setdefault(group, []).append((name, last, drawn))
    # Timings of the machine interest last.
    return sorted(groups.items(), key=lambda item: item[0] == "system")


def _timings(seconds: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """(what, time in words, percent of the longest)."""
    longest = max(seconds.values(), default=0.0) or 1.0
    return [(name, _duration(value), 100 * value / longest) for name, value in seconds.items()]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02.0f} s"
