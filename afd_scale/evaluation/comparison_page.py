"""The result of a comparison for people: a table in Markdown, and one HTML page that needs nothing else."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from afd_scale.evaluation.comparison import ALL
from afd_scale.evaluation.lengths import FIRST, length_curves
from afd_scale.evaluation.page import INK, LINE, aligned, bands_svg, data_url, distributions_svg, render
from afd_scale.evaluation.suites.suite import Metric
from afd_scale.evaluation.video import read_title

COLUMNS = ("source", "teacher", "distance", "in spreads", "over chance")


def markdown_tables(result: Mapping[str, Any]) -> str:
    """A table a split, those of all clips first."""
    lines = [f"# {result['source']['name']} against {result['teacher']['name']}"]
    for split, found in result["splits"].items():
        clips = found["clips"]
        lines += ["", f"## {split}", "", f"Clips: source {clips['source']}, teacher {clips['teacher']}", ""]
        lines += [f"| metric | better | {' | '.join(COLUMNS)} |", "| --- | --- " + "| ---: " * len(COLUMNS) + "|"]
        for row in metric_rows(result, split):
            cells = (*row["values"], row["distance"], row["spreads"], row["over_chance"])
            lines.append(f"| {row['label']} | {row['better'] or ''} | {' | '.join(cells)} |")
    if result["lengths"] > 1:
        lines += _length_table(result)
    lines += ["", "Distance: Wasserstein between the clips of both sides, in the metric's unit; in spreads: over the "
              "teacher's standard deviation; over chance: over what 95 of 100 random divisions of all clips stay "
              "below, so that up to 1 may be due to the choice of clips."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _length_table(result: Mapping[str, Any]) -> list[str]:
    """Means of the source by how many of the teacher's lengths have passed, with their distances over chance."""
    found = {name: metric for name, metric in result["splits"][ALL]["metrics"].items() if metric["by_length"]}
    spans = list(dict.fromkeys(span for metric in found.values() for span in metric["by_length"]))
    lines = ["", "## Beyond the teacher's length", "", f"| metric | better | teacher | {' | '.join(spans)} |",
             "| --- | --- | ---: " + "| ---: " * len(spans) + "|"]  # fmt: skip
    for name, metric in found.items():
        known = [metric["by_length"].get(span, {}) for span in spans]
        means = (math.nan if mean is None else mean for mean in (metric["teacher"], *(x.get("source") for x in known)))
        teacher, *values = aligned(list(means))
        cells = [f"{value}{_over_chance(each)}" for value, each in zip(values, known, strict=True)]
        described = result["metrics"][name]
        lines.append(f"| {described['label']} | {described['better'] or ''} | {teacher} | {' | '.join(cells)} |")
    return [*lines, "", "The source's means in the spans of its time, each followed by its distance over chance."]


def _over_chance(found: Mapping[str, float | None]) -> str:
    distance, chance = found.get("distance"), found.get("chance")
    return f" (x {distance / chance:.1f})" if distance is not None and chance else ""


def metric_rows(result: Mapping[str, Any], split: str) -> list[dict[str, Any]]:
    """The lines of a split's table, as texts."""
    rows = []
    for name, found in result["splits"][split]["metrics"].items():
        source, teacher, distance, chance = (
            math.nan if found[key] is None else found[key] for key in ("source", "teacher", "distance", "chance")
        )
        values = aligned([source, teacher, distance])
        spreads = found["distance_in_spreads"]
        ratio = distance / chance if chance > 0 else 0.0 if distance == 0 else math.nan
        wanted = result["metrics"][name]["better"] == "lower" and source < teacher
        rows.append(result["metrics"][name] | {
            "name": name,
            "values": values[:2],
            "distance": values[2],
            "spreads": "-" if spreads is None else f"{spreads:.2f}",
            "over_chance": f"{ratio:.1f}" if math.isfinite(ratio) else "-",
            "verdict": "" if not math.isfinite(ratio) else "better" if ratio <= 1 or wanted else "worse",
        })  # fmt: skip
    return rows


def write_comparison_page(result: Mapping[str, Any], samples: Sequence[Path], page: Path) -> None:
    """Write the page.

    Args:
        result: the content of evaluation.json.
        samples: mp4s to show, both sides in each.
    """
    form, source, teacher = result["form"], result["source"], result["teacher"]
    facts = [
        ("source", f"{source['name']}, {len(source['clips'])} clips"),
        ("teacher", f"{teacher['name']}, {len(teacher['clips'])} clips"),
        ("form", f"{form['width']} x {form['height']}, {form['frames']} frames, {form['fps']:g} a second"),
        ("prompts", "the same" if result["same_prompts"] else "others on each side"),
        *((key.replace("git_", ""), result["provenance"][key]) for key in ("date", "git_commit")),
    ]
    page.write_text(render(
        "comparison.html.j2",
        name=f"{source['name']} against {teacher['name']}",
        title_facts=facts,
        all=ALL,
        splits={split: (found["clips"], metric_rows(result, split)) for split, found in result["splits"].items()},
        clips=[(read_title(path), data_url(path, "video/mp4")) for path in samples],
        drawings=[(result["metrics"][name]["label"], *_drawings(result, name))
                  for name, found in result["splits"][ALL]["metrics"].items()
                  if found["distance"] or found["teacher_spread"]],
        length_curves=_length_curves(result),
        rejects={side: result[side]["rejects"] for side in ("source", "teacher") if result[side]["rejects"]},
    ))  # fmt: skip


def _length_curves(result: Mapping[str, Any]) -> list[tuple[str, str, Markup]]:
    """As of `length_curves`; none where the source's videos are no longer than the teacher's."""
    known = {name: metric for name, metric in result["splits"][ALL]["metrics"].items() if metric["by_length"]}
    student: dict[str, dict[str, float]] = {}
    for name, metric in known.items():
        for span, each in metric["by_length"].items():
            student.setdefault(span, {})[name] = math.nan if each["source"] is None else each["source"]
    teacher = {name: metric["teacher"] for name, metric in known.items() if metric["teacher"] is not None}
    metrics = {name: Metric(**result["metrics"][name]) for name in known}
    return length_curves({"student": student, "teacher": {FIRST: teacher}}, metrics) if known else []


def _drawings(result: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Over the time of a clip, where there is such, and over clips."""
    bins = result["splits"][ALL]["metrics"][name]["by_time"]
    seconds = result["form"]["frames"] / result["form"]["fps"]
    known = [
        ((number + 0.5) * seconds / len(bins), found)
        for number, found in enumerate(bins)
        if found["source"] is not None and found["teacher"] is not None
    ]
    over_time = "" if not known else bands_svg(
        [time for time, _ in known],
        {LINE: [found["source"] for _, found in known], INK: [found["teacher"] for _, found in known]},
        [found["teacher_spread"] for _, found in known],
    )  # fmt: skip
    values = {
        colour: [clip["values"][name] for clip in result[side]["clips"] if name in clip["values"]]
        for side, colour in (("teacher", INK), ("source", LINE))
    }
    return over_time, distributions_svg(values)
