"""Tables, plots and page: right numbers, and all of it from results.json alone."""

import csv
from pathlib import Path

import numpy as np
import pytest
import yaml

from afd_scale.evaluation.video import write_comparison_mp4
from afd_scale.study.page import write_outputs
from afd_scale.study.results import read_results, write_results
from afd_scale.study.runs import Place
from afd_scale.study.samples import _cut
from afd_scale.study.tables import front, make_tables, over_compute, paired
from afd_scale.study.texts import markdown
from tests.tools import call_tool
from tests.unit.study.stand_ins import AFD, CHOOSE, RATES, ROOT, SFT, by_name, make_plan, metrics

TIMES = "\N{MULTIPLICATION SIGN}"
METHODS = {"afd": {"config": AFD, "rates": RATES}, "sft": {"config": SFT}}
STUDY = {"compared_with": "afd", "methods": METHODS, "choose": CHOOSE, "bases": {"one": [], "two": []}, "budgets": [10]}


def results():
    """A plan with everything done: afd scores 1 and 3 by base, sft one more and 0.5 by seed."""
    plan = make_plan(**STUDY)

    def score(trial):
        return {"one": 1.0, "two": 3.0}[trial.base] + (trial.method == "sft") * (1 + 0.5 * trial.seed)

    records = by_name(plan.choosing("afd"), lambda trial: trial.rate or 0)
    records |= by_name(plan.trials(records, {}), score)
    records |= by_name(plan.choosing("afd"), lambda trial: trial.rate or 0)
    return plan, records


def test_cells_are_means_with_ranges_over_seeds_and_bases() -> None:
    plan, records = results()
    (table,) = make_tables(plan, records, {})
    rows = {row.name: row for row in table.rows}
    assert list(rows) == ["base", "teacher", "afd", "sft"]
    afd, sft = rows["afd"].cells["trajectory_fd"], rows["sft"].cells["trajectory_fd"]
    assert (afd.mean, afd.low, afd.high, afd.runs) == (2.0, 1.0, 3.0, 4)
    assert (sft.mean, sft.low, sft.high) == (3.25, 2.0, 4.5)
    assert rows["base"].cells["trajectory_fd"].mean == 10.0
    assert not rows["afd"].differences
    gap = rows["sft"].differences["trajectory_fd"]
    assert (gap.mean, gap.pairs, gap.ratio) == (1.25, 4, 3.25 / 2)
    assert gap.low is not None
    assert gap.high is not None
    assert 1.0 <= gap.low <= 1.25 <= gap.high <= 1.5


def test_a_difference_is_of_runs_that_both_have() -> None:
    plan, records = results()
    del records["afd-two-0.0001-1-60"], records["sft-one-own-0-100"]
    (table,) = make_tables(plan, records, {})
    gap = next(row for row in table.rows if row.name == "sft").differences["trajectory_fd"]
    assert (gap.mean, gap.pairs) == (1.25, 2)


def test_an_interval_needs_three_pairs_and_is_the_same_each_time() -> None:
    assert paired([1.0, 2.0], [2.0, 4.0]).low is None
    assert paired([1.0], [0.0]).ratio is None
    ours, theirs = np.random.default_rng(1).normal(0.3, 1, (2, 40)).tolist()
    first = paired(ours, theirs)
    assert first == paired(ours, theirs)
    gaps = np.subtract(ours, theirs)
    half = 1.96 * gaps.std() / 40**0.5
    assert first.low == pytest.approx(gaps.mean() - half, abs=0.15 * half)
    assert first.high == pytest.approx(gaps.mean() + half, abs=0.15 * half)


def test_the_front_is_what_nothing_dominates() -> None:
    assert front([(1, 5), (2, 3), (2, 4), (3, 3), (4, 1), (1, 5)]) == [True, True, False, False, True, True]


def test_results_over_compute_have_all_steps_and_a_front() -> None:
    plan, records = results()
    points = {(p.method, p.steps): p for p in over_compute(plan, records, {}, "trajectory_fd", "lower")}
    assert points.keys() == {("afd", 10), ("afd", 60), ("sft", 10), ("sft", 100)}
    assert points["afd", 60].pflop == 6.0
    assert {key for key, point in points.items() if point.on_front} == {("afd", 10)}
    closest = over_compute(plan, records, {}, "sharpness", "teacher")
    assert {(p.method, p.steps) for p in closest if p.on_front} == {("afd", 10), ("sft", 10)}
    assert all(p.on_front is None for p in over_compute(plan, records, {}, "sharpness", None))


def test_the_text_says_what_was_chosen_and_what_is_missing() -> None:
    plan, records = results()
    lost = "sft-one-own-0-100"
    del records[lost]
    text = markdown(plan, make_tables(plan, records, {}), records, {lost: "exit code 1: error: broken"})
    assert "| afd | 60 | 2.00 [1.00, 3.00] |" in text
    assert "| sft | 100 | 3.67 [2.50, 4.50] | 0.800 [0.800, 0.800] | 3 of 4 |" in text
    assert f"| sft | +1.33 [+1.00, +1.50] {TIMES}1.57 |" in text
    assert "| afd | 0.0001 | 0.0001 | 4 of 4 | chosen at the edge of what was tried |" in text
    assert "seeds 100, 101, which are in no table" in text
    assert "## Missing: 1" in text
    assert f"- {lost}: exit code 1: error: broken" in text


def test_everything_follows_from_results_json(tmp_path: Path) -> None:
    plan, records = results()
    study = {"title": "A study", "seeds": [0, 1], "metrics": ["trajectory_fd", "sharpness"], **STUDY}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    write_results(plan.study.title, records.values(), {}, tmp_path / "results.json")
    assert {record.name: record for record in read_results(tmp_path / "results.json").runs} == records
    expected = write_outputs(plan, Place(ROOT, tmp_path / "a"), records, {})
    done = call_tool("compare", tmp_path / "study.yaml", "--from", tmp_path / "results.json", "--out", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    for name in ("table.md", "table.csv", "index.html", "plots/trajectory_fd.svg", "plots/trajectory_fd.png",
                 "plots/trajectory_fd_over_compute.svg"):  # fmt: skip
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert (tmp_path / "b/table.md").read_text() == expected
    page = (tmp_path / "b/index.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<svg") == 4
    lines = list(csv.DictReader((tmp_path / "b/table.csv").read_text().splitlines()))
    assert len(lines) == 4 * 2
    assert next(line for line in lines if line["row"] == "sft")["difference"] == "1.25"


def test_bad_usage_is_one_line(tmp_path: Path) -> None:
    done = call_tool("compare", ROOT / "configs/studies/smoke.yaml", "--jobs", "0")
    assert (done.returncode, done.stderr) == (2, "error: argument --jobs: (0) must be at least 1\n")
    done = call_tool("compare", ROOT / "configs/studies/smoke.yaml", "--from", tmp_path / "results.json")
    assert done.returncode == 2
    assert done.stderr == "error: out (None) must be given with --from: the folder to write\n"
    (tmp_path / "results.json").write_text('{"title": 3}')
    done = call_tool("compare", ROOT / "configs/studies/smoke.yaml", "--from", tmp_path / "results.json", "--out",
                     tmp_path / "x")  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: results (")
    assert done.stderr.count("\n") == 1


def test_clips_are_cut_out_of_a_runs_videos(tmp_path: Path) -> None:
    columns = {name: np.full((1, 4, 16, 16), value, np.uint8)
               for name, value in (("teacher", 20), ("base", 120), ("student", 220))}  # fmt: skip
    write_comparison_mp4(columns, ["a ball"], tmp_path, fps=8)
    (path,) = tmp_path.glob("*.mp4")
    clips, fps = _cut(path, list(columns))
    assert fps == 8
    for name, frames in columns.items():
        assert clips[name].shape == (4, 240, 240, 3)
        assert abs(clips[name].astype(int) - frames.flat[0]).max() <= 12, name  # but for what H.264 loses


def test_base_and_teacher_are_shown_where_they_were_measured() -> None:
    plan, records = results()
    alone = {name: record.model_copy(update={"metrics": {"student": metrics(1.0)["student"]}})
             for name, record in records.items()}  # fmt: skip
    (table,) = make_tables(plan, alone, {})
    assert [row.name for row in table.rows] == ["afd", "sft"]
