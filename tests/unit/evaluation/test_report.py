"""The report shows what the run left, in one file that asks for nothing else."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from afd_scale.config.load import load_config
from afd_scale.data.worlds.drop import ToyPrompt, render_clips
from afd_scale.evaluation.report import _seconds, metric_table, provenance_header, write_report
from afd_scale.evaluation.run_files import read_metrics, read_summary
from afd_scale.evaluation.suites.toy import ToySuite
from afd_scale.evaluation.suites.trajectory import score
from afd_scale.evaluation.video import write_comparison_mp4, write_grid
from tests.distributed import processes

ROOT = Path(__file__).parents[3]
TIMES = "\N{MULTIPLICATION SIGN}"
CONFIG = {"name": "toy<b>", "method": {"name": "afd", "clip": 1.0}, "train": {"steps": 100}}
SUMMARY = {
    "method": "afd",
    "steps": 100,
    "metrics": {
        "teacher": {
            "trajectory_fd": 1.02,
            "dynamic_degree": 1.0,
            "all_in_one": 0.996,
            "mass_error": 0.01,
            "sharpness": 1.0,
        },
        "base": {
            "trajectory_fd": 104.2,
            "dynamic_degree": 1.5,
            "all_in_one": 0.14,
            "mass_error": 0.0,
            "sharpness": 0.9,
        },
        "student": {
            "trajectory_fd": 15.1,
            "dynamic_degree": 0.6,
            "all_in_one": 0.35,
            "mass_error": 0.06,
            "sharpness": 1.2,
        },
    },
    "seconds": {"train": 61.3, "evaluate": 14.8, "data": 7384},
}


class _Page(HTMLParser):
    """Text, attributes and the cells of each table row."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.addresses, self.text, self.rows, self.in_cell = [], [], [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in {"src", "href", "xlink:href", "srcset"}]
        if tag == "tr":
            self.rows.append([])
        elif tag in {"td", "th"}:
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in {"td", "th"}

    def handle_data(self, data):
        self.text.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data

    def row(self, label):
        return next([cell.strip() for cell in row] for row in self.rows if row[0].startswith(label))


@pytest.fixture
def run(tmp_path):
    """A finished run."""
    facts = "# date: 2026-05-01 12:00 UTC\n# git_commit: 0123456789ab\n# ranks: 4\n# torch: 2.13.0\n"
    (tmp_path / "config.yaml").write_text(facts + yaml.safe_dump(CONFIG))
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    lines = [{"step": step, "student/loss": 1 / step, "system/step_seconds": 0.5} for step in (5, 10, 15)]
    lines += [{"step": 20, "student/loss": None, "discriminator/accuracy": 0.75}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    clips = {name: np.full((2, 3, 16, 16), 90, np.uint8) for name in ("teacher", "base", "student")}
    write_comparison_mp4(clips, ["a ball & <i>floor</i>", "another"], tmp_path / "samples")
    write_grid(clips, ["a ball", "another"], tmp_path / "samples" / "grid.png")
    return tmp_path


def _page(run):
    return _Page(write_report(run).read_text())


def test_nothing_is_fetched(run):
    html = write_report(run).read_text()
    addresses = _Page(html).addresses
    assert sum(address.startswith("data:video/mp4;base64,") for address in addresses) == 2
    assert sum(address.startswith("data:image/png;base64,") for address in addresses) == 1
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"https?:|//\w|@import|<script|<link", re.sub(r"data:\S+;base64,[\w+/=]+", "", html))
    assert not list(run.glob(".*")), "no temporary file stays"


def test_title_says_what_ran(run):
    text = " ".join("".join(_page(run).text).split())
    for fact in (
        "toy<b>",
        "method afd",
        "steps 100",
        "ranks 4",
        "commit 0123456789ab",
        "date 2026-05-01 12:00 UTC",
    ):
        assert fact.replace(" ", "") in text.replace(" ", ""), fact


def test_metrics_are_those_of_the_summary(run):
    page = _page(run)
    assert page.row("Metric") == ["Metric", "Better", "base", "student", "teacher", "student / base"]
    assert page.row("Trajectory distance")[1:] == ["↓ lower", "104.20", "15.10", "1.02", f"{TIMES} 0.14 ✓"]
    assert page.row("All in one")[1:] == ["↑ higher", "0.140", "0.350", "0.996", f"{TIMES} 2.50 ✓"]
    assert page.row("Dynamic degree")[1:] == ["→ as teacher", "1.500", "0.600", "1.000", f"{TIMES} 0.40 ✓"]
    assert page.row("Sharpness")[1:] == ["→ as teacher", "0.900", "1.200", "1.000", f"{TIMES} 1.33 ✗"]
    assert page.row("Mass error")[1:] == ["↓ lower", "0.000", "0.060", "0.010", ""], "no ratio to zero"


def test_prompts_and_configuration_are_escaped(run):
    html = write_report(run).read_text()
    assert "a ball &amp; &lt;i&gt;floor&lt;/i&gt;" in html
    assert "<h1>toy&lt;b&gt;</h1>" in html


def test_every_metric_has_its_curve_below_its_group(run):
    page = _page(run)
    assert page.tags.count("svg") == 3 * 2, "over steps and over seconds"
    text = [piece.strip() for piece in page.text if piece.strip()]
    labels = ["loss", "discriminator", "accuracy", "system", "step_seconds"]
    assert [piece for piece in text if piece in labels] == labels
    assert text[text.index("accuracy") + 1] == "0.75"


def test_times_versions_and_configuration_are_shown(run):
    page = _page(run)
    assert page.row("train")[1] == "1 min 01 s"
    assert page.row("evaluate")[1] == "14.8 s"
    assert page.row("data")[1] == "2 h 03 min"
    assert page.row("torch")[1] == "2.13.0"
    assert "clip: 1.0" in "".join(page.text)


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    page = _page(tmp_path)
    assert "0 of 100, not finished" in page.text
    assert not {"table", "video", "img", "svg"} & set(page.tags)


def test_two_policies_and_unknown_metrics_are_shown_without_a_ratio(run):
    measured = {
        "teacher": {"all_in_one": 1.0},
        "student": {"all_in_one": 0.5, "vbench": 87.6, "mass_error": float("nan")},
    }
    (run / "summary.json").write_text(json.dumps({"method": "sft", "steps": 9, "metrics": measured, "seconds": {}}))
    page = _page(run)
    assert page.row("Metric") == ["Metric", "Better", "student", "teacher"]
    assert page.row("All in one")[2:] == ["0.500", "1.000"]
    assert page.row("vbench")[1:] == ["", "87.6", "-"]
    assert not any(row[0].startswith("Mass error") for row in page.rows), "measured nowhere"


def test_samples_of_the_newest_step_stand_in_for_missing_final_ones(run):
    for step in ("step_00000010", "step_00000020"):
        (run / "samples" / step).mkdir()
    for path in list((run / "samples").glob("*.mp4")):
        path.rename(run / "samples" / "step_00000010" / path.name)
    (run / "samples" / "grid.png").rename(run / "samples" / "step_00000020" / "grid.png")
    page = _page(run)
    assert "video" not in page.tags
    assert page.tags.count("img") == 1


def test_the_plain_table_is_aligned():
    assert metric_table(SUMMARY).splitlines() == [
        "                     better     base  student  teacher",
        "Trajectory distance  lower    104.20    15.10     1.02",
        "Dynamic degree       teacher   1.500    0.600    1.000",
        "All in one           higher    0.140    0.350    0.996",
        "Mass error           lower     0.000    0.060    0.010",
        "Sharpness            teacher   0.900    1.200    1.000",
    ]


BY_LENGTH = {
    "student": {"0-1x": {"mass_error": 0.06}, "1-2x": {"mass_error": 0.2}, "2-4x": {"mass_error": 0.5}},
    "teacher": {"0-1x": {"mass_error": 0.01}, "1-2x": {"mass_error": 0.01}, "2-4x": {"mass_error": None}},
}


def test_metrics_beyond_the_teachers_length_are_shown(run):
    assert "Beyond the teacher" not in "".join(_page(run).text)
    before = metric_table(SUMMARY)
    assert metric_table(SUMMARY | {"metrics_by_length": BY_LENGTH}).splitlines() == [
        *before.splitlines(),
        "",
        "                      0-1x   1-2x   2-4x",
        "Mass error  student  0.060  0.200  0.500",
        "            teacher  0.010  0.010      -",
    ]
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"metrics_by_length": BY_LENGTH}))
    assert read_summary(run)["metrics_by_length"] == BY_LENGTH
    page = _page(run)
    assert "Beyond the teacher's length" in page.text
    assert page.tags.count("circle") >= 3


def test_a_summary_whose_spans_are_none_is_left_out(run, caplog):
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"metrics_by_length": {"student": {"late": {}}}}))
    assert read_summary(run) is None
    assert "metrics_by_length" in caplog.text


def test_descriptors_are_those_of_the_toy_metrics():
    clips = render_clips(ToyPrompt.every()[:4], seed=0, physics="teacher")
    assert list(ToySuite.metrics) == list(score(clips, ToyPrompt.every()[:4], clips))


def test_provenance_header_leaves_a_loadable_config(run):
    header = provenance_header(ranks=3)
    assert re.search(r"^# git_commit: \S", header, flags=re.MULTILINE)
    path = run / "config.yaml"
    path.write_text(header + "name: r\nmethod: {name: sft}\ntrain: {steps: 7}\n")
    assert load_config(path).train.steps == 7
    page = _page(run)
    assert page.row("torch")[1] == torch.__version__
    assert page.text[page.text.index("ranks") + 1] == "3"


def test_damaged_lines_of_metrics_are_left_out(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    assert not caplog.messages, "a dying run leaves such a last line"
    path.write_bytes(b'{"step": 1}\n{"st\n\xff\xfe\n3\n{"loss": 3}\n{"step": "4"}\n\x00\x00\n{"step": 3}\n')
    assert read_metrics(path) == [{"step": 1}, {"step": 3}]
    assert caplog.messages == [f"{path}: 6 of 8 lines are damaged, and left out"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"steps": "x"}', b'{"steps": 3}'])
def test_a_damaged_summary_is_left_out(tmp_path, content, caplog):
    path = tmp_path / "summary.json"
    assert read_summary(tmp_path) is None
    assert not caplog.messages
    path.write_bytes(content)
    assert read_summary(tmp_path) is None
    (said,) = caplog.messages
    assert said.startswith(f"run ({path}) must be the summary of a run: ")
    assert said.endswith(": it is left out")


@pytest.mark.parametrize("content", [b"", b"name: x", b"{", b"\xff"])
def test_a_damaged_config_is_one_line(run, content):
    (run / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"^run \(.*config.yaml.*\) must be "):
        write_report(run)


def test_the_tool_refuses_a_folder_that_is_no_run(run):
    done = processes.run(sys.executable, ROOT / "tools" / "report.py", run)
    assert (done.returncode, done.stdout.strip()) == (0, str(run / "report.html"))
    (run / "config.yaml").unlink()
    done = processes.run(sys.executable, ROOT / "tools" / "report.py", run)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "must hold config.yaml" in done.stderr


def _log(run, *records):
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_alarms_are_listed_with_what_was_found(run):
    fooled = {"discriminator/win_probability": 0.9, "discriminator/accuracy": 0.2}
    steps = [{"step": step, **fooled, "alarm/saturated": float(25 <= step < 40)} for step in range(5, 50, 5)]
    _log(run, *steps)
    page = _page(run)
    row = page.row("saturated")
    assert row[:3] == ["saturated", "25", "40"]
    assert row[3].startswith("The judge takes rollouts for better than the teacher's videos: they win 80% of the pairs")
    assert row[3].endswith("Raise the judge's learning rate, or lower the student's: the judge must keep up.")
    assert not any(piece.strip() == "alarm" for piece in page.text), "no curve of it"
    _log(run, *[record for record in steps if record["step"] < 40])
    assert _page(run).row("saturated")[2] == "still on"
    _log(run, {"step": 5, **fooled, "alarm/saturated": 0.0})
    assert "None was raised." in _page(run).text
    _log(run, {"step": 5, **fooled})
    assert "Alarms" not in _page(run).text, "a run of before there were any"


def test_curves_may_be_over_something_else(run):
    _log(run, *({"step": step, "student/loss": 1 / step, "compute/pflop": 3.0 * step} for step in (5, 10)))
    text = [piece.strip() for piece in _page(run).text if piece.strip()]
    assert text[text.index("over") + 1 : text.index("over") + 3] == ["step", "compute/pflop"]
    html = write_report(run, x="student/loss").read_text()
    assert re.search(r'id="axis-0" checked><label class="axis" for="axis-0">student/loss<', html)
    with pytest.raises(ValueError, match=r"x \(loss\) must be a metric of the run: step, student/loss, compute/pflop"):
        write_report(run, x="loss")


def test_seconds_are_added_up_over_steps():
    timed = [(-3, 2.0), (0, 2.0), (1, None), (5, 0.5)]
    records = [{"step": step, "system/step_seconds": seconds} for step, seconds in timed]
    assert list(_seconds(records)) == [0, 6, 6, 8]


def test_what_diagnostics_look_at_is_said(run):
    facts = {"dataset": "shards/held", "held_out": True, "prompts": 8, "rollouts": 4}
    (run / "diagnostics.json").write_text(json.dumps(facts))
    _log(run, {"step": 5, "diagnostics/sharpness": 0.7, "diagnostics/teacher/sharpness": 1.1})
    page = _page(run)
    text = " ".join(page.text)
    assert "8 held-out prompts of shards/held, 4 rollouts each: 32 pairs" in text
    assert "0.7 of 1.1" in text
    assert page.tags.count("svg") == 1, "the teacher's value is a line in the student's curve"
    (run / "diagnostics.json").write_text(json.dumps(facts | {"held_out": False}))
    assert "training data's own prompts, not held-out ones" in " ".join(_page(run).text)
