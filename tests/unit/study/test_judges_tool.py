"""tools/judges.py: what it leaves, what it does not measure twice, what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from afd_scale.study import judged_runs, regimes, scatter
from tests.random_runs import write_random_run
from tests.tools import load_tool
from tests.unit.study.made_up import at

judges = load_tool("judges")
FEW_METRICS = ("trajectory_fd", "physics_error")  # one that is there, one that is not


@pytest.fixture(autouse=True)
def few_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scatter, "MAIN_METRICS", FEW_METRICS)
    monkeypatch.setattr(scatter, "QUALITIES", ("pair_accuracy", "brier"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Checkpoints that were measured, with made-up results."""
    asked: list[Path] = []

    def measure(config: Any, checkpoint: Path, clips: int, weights: str | None) -> dict[str, Any]:
        asked.append(checkpoint)
        return {regime: at(0.5 + len(asked) / 100, 10.0 - len(asked) / 10) for regime in ("seen", "4x")}

    monkeypatch.setattr(judged_runs, "measure_checkpoint", measure)
    return asked


def test_it_measures_each_checkpoint_once_and_writes_all(
    tmp_path: Path, measured: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [tmp_path / f"run{number}" for number in range(4)]
    for number, run in enumerate(runs):
        write_random_run(run, steps=(1, 2), seed=number)
    out = tmp_path / "out"
    assert judges.main([*map(str, runs[:3]), "--out", str(out)]) == 0
    assert "3 runs, 6 checkpoints" in capsys.readouterr().out
    assert len(measured) == 6
    assert judges.main([*map(str, runs), "--out", str(out), "--json"]) == 0
    assert [checkpoint.parents[1].name for checkpoint in measured[6:]] == ["run3", "run3"]
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "judges.json").read_text())
    assert [run["name"] for run in printed["runs"]] == ["run0", "run1", "run2", "run3"]
    assert printed["runs"][0]["checkpoints"]["2"]["4x"]["judges"]["it"]["pair_accuracy"] == 0.52
    between = [one for one in printed["correlations"] if one["kind"] == "between" and one["share"] == 1.0]
    assert {one["rho"] for one in between} == {1.0}
    assert {path.name for path in (out / "plots").iterdir()} == {
        f"{kind}_it_{metric}.png" for kind in ("between", "within") for metric in FEW_METRICS
    }
    assert judges.main([str(runs[0]), "--out", str(out), "--clips", "72"]) == 0
    assert len(measured) == 10, "of another number of clips they are measured again"


def test_a_run_with_random_weights_goes_all_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(regimes, "REFERENCE_CLIPS", 108)
    regimes.truth_of.cache_clear()
    write_random_run(tmp_path / "run", prompts="seen")
    assert judges.main([str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--clips", "36"]) == 0
    regimes.truth_of.cache_clear()
    table = capsys.readouterr().out
    for regime in regimes.REGIMES:
        assert f"| discriminator | {regime} | 1 |" in table
    assert table == (tmp_path / "out" / "table.md").read_text()


def test_what_cannot_be_compared_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, world in (("a", "kick"), ("b", "drop")):
        write_random_run(tmp_path / name, world=world)
    write_random_run(tmp_path / "other" / "a")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text((tmp_path / "a" / "config.yaml").read_text())
    for runs, reason in (
        (("a", "b"), "must be of one world"),
        (("a", "other/a"), "must have names of their own"),
        (("new",), "must hold a complete checkpoint"),
        (("nothing",), "config"),
    ):
        assert judges.main([*(str(tmp_path / run) for run in runs), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert reason in said
