"""Diagnostics and alarms of whole runs: alike on one rank and two, with a sequence, and where a run was stopped."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import ROOT, on_ranks
from tests.distributed.small_run import write_small_run

TRAIN = ROOT / "launch" / "train.py"
STEPS = 6
OPTIONS = ("train.diagnose_every=2", "evaluation.diagnosed_prompts=3", "evaluation.diagnosed_rollouts=2",
           "train.save_every=2", "train.keep_checkpoints=9")  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_run(tmp_path_factory.mktemp("diagnostics"), STEPS)


def train(config: Path, ranks: int, name: str, *options: str) -> tuple[int, str]:
    done = on_ranks(ranks, TRAIN, "--config", config, f"name={name}", *OPTIONS, *options)
    return done.returncode, done.stderr


def logged(config: Path, name: str) -> list[dict[str, Any]]:
    """Metrics but those of the machine."""
    text = (config.parent / "runs" / name / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("system/")} for line in lines]


@pytest.fixture(scope="module")
def two_ranks(config: Path) -> list[dict[str, Any]]:
    code, said = train(config, 2, "two")
    assert code == 0, said[-3000:]
    assert said.count("two is diagnosed on 3 prompts") == 1
    assert "the training data's own prompts" in said
    return logged(config, "two")


def looks(lines: list[dict[str, Any]]) -> list[dict[str, float]]:
    found = [{key: value for key, value in line.items() if key.startswith("diagnostics/")} for line in lines]
    return [line for line in found if line]


def test_every_second_step_is_diagnosed_and_the_end_of_the_warm_up(two_ranks: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in two_ranks if "diagnostics/logit_gap" in line] == [0, 2, 4, 6]
    first, *_, last = looks(two_ranks)
    assert first["diagnostics/drift"] == 0, "the base itself"
    assert last["diagnostics/drift"] > 0.001
    assert last["diagnostics/logit_gap"] != first["diagnostics/logit_gap"]
    for name in (
        "pair_accuracy",
        "calibration_error",
        "logit_group_std",
        "diversity",
        "sharpness",
        "teacher/sharpness",
    ):
        assert f"diagnostics/{name}" in last
    assert last["diagnostics/teacher/sharpness"] == pytest.approx(1, abs=0.2)
    pflop = [line["compute/pflop"] for line in two_ranks]
    assert pflop == sorted(pflop)
    steps = [line["compute/pflop"] for line in two_ranks if line["step"] >= 0]
    assert steps[2] - steps[1] == pytest.approx(steps[1] - steps[0])


@pytest.mark.parametrize(("ranks", "sequence"), [(1, 1), (2, 2)], ids=["one rank", "a sequence of two"])
def test_ranks_do_not_change_it(config: Path, two_ranks: list[dict[str, Any]], ranks: int, sequence: int) -> None:
    name = f"other{ranks}{sequence}"
    code, said = train(config, ranks, name, f"parallel.sequence={sequence}", "train.steps=2")
    assert code == 0, said[-3000:]
    for ours, theirs in zip(looks(logged(config, name)), looks(two_ranks), strict=False):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if "agreement" not in key:  # two clips that are nearly equal may change places
                assert value == pytest.approx(theirs[key], abs=2e-3), key


def test_a_resumed_run_finds_the_same(config: Path, two_ranks: list[dict[str, Any]]) -> None:
    folder = config.parent / "runs" / "two"
    resumed = config.parent / "runs" / "resumed"
    shutil.copytree(folder, resumed)
    (resumed / "summary.json").unlink()
    for step in (4, 6):
        shutil.rmtree(resumed / "checkpoints" / f"step_{step:08d}")
    text = (resumed / "config.yaml").read_text()
    (resumed / "config.yaml").write_text(text.replace("name: two", "name: resumed"))
    code, said = train(config, 2, "resumed")
    assert code == 0, said[-3000:]
    assert "resumes after step 2" in said
    assert logged(config, "resumed") == two_ranks
    report = (resumed / "report.html").read_text()
    assert "own prompts, not held-out ones" in report


def test_an_alarm_ends_the_run_and_stands_until_it_is_let_go(config: Path) -> None:
    """A random student hardly shows a ball: it is blurred at its second look."""
    code, said = train(config, 2, "stopped", "train.stop_on_alarm=[hacked, blurred]")
    assert code == 2, said[-3000:]
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: train.stop_on_alarm ended the run, which has saved step 2: blurred: on the ")
    assert said.count("alarm blurred: on the diagnosed prompts sharpness is ") == 1
    saved = config.parent / "runs" / "stopped" / "checkpoints"
    assert [path.name for path in saved.glob("step_*")] == ["step_00000002"]

    code, said = train(config, 2, "stopped", "train.stop_on_alarm=[hacked, blurred]")
    assert code == 2, said[-3000:]
    assert (
        "train.stop_on_alarm (hacked, blurred) must leave out an alarm that is on where the run goes on, at step 2"
        in said
    )
    code, said = train(config, 2, "stopped", "train.stop_on_alarm=[hacked]")
    assert code == 0, said[-3000:]
    lines = logged(config, "stopped")
    assert [line["step"] for line in lines if "diagnostics/logit_gap" in line] == [0, 2, 4, 6]
    assert "Alarms" in (config.parent / "runs" / "stopped" / "report.html").read_text()
