"""A rehearsal from its command line: all stages of the smallest run, and how one that fails is told of."""

import json
import time
from pathlib import Path

import psutil
import pytest

from afd_scale.config import RunConfig, load_config
from afd_scale.rehearsal.outcome import Outcome, all_well
from afd_scale.rehearsal.shrink import Layout
from afd_scale.rehearsal.stages import NAMES, Place, run_stages
from tests.tools import ROOT, Done, call_tool

SMALLEST = ROOT / "configs" / "toy" / "sft.yaml"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_smallest_run_is_rehearsed_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    kept = tmp_path / "kept"
    done = call_tool("rehearse", "--config", SMALLEST, "--ranks", "2", "--gpus", "2", "--json", "--keep", kept,
                     f"data.shards={tmp_path / 'absent'}", f"out={tmp_path}")  # fmt: skip
    found = json.loads(done.stdout)
    assert done.returncode == 0, (found, done.stderr[-3000:])
    assert [row["stage"] for row in found["stages"]] == ["prepare", *NAMES]
    assert {row["status"] for row in found["stages"]} == {"ok"}
    assert found["ranks_here"] == {"data": 2, "sequence": 1}
    assert found["report"] == str(kept / "runs" / "toy-sft" / "report.html")
    assert Path(found["report"]).is_file()
    assert any("configs/toy/base" in line and "is here" in line for line in found["stand_ins"])
    steps = [
        json.loads(line)["step"] for line in (kept / "runs" / "toy-sft" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, steps[-1] + 1))
    assert len(steps) >= 5
    assert list((kept / "made" / "videos").glob("*.mp4"))


def refused(done: Done, line: str) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {line}")
    assert done.stderr.count("\n") == 1


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    refused(call_tool("rehearse", "--config", tmp_path / "absent.yaml"), f"config ({tmp_path / 'absent.yaml'}) must be")
    refused(call_tool("rehearse", "--config", SMALLEST, "train.steps=0"), "train.steps (0)")
    refused(call_tool("rehearse", "--config", SMALLEST, "--gpus", "0"), "gpus (0) must be at least 1")
    refused(call_tool("rehearse", "--config", SMALLEST, "--keep", tmp_path), f"keep ({tmp_path}) must not exist yet")


def stages(folder: Path, train: str, limit_seconds: float = 60.0) -> list[Outcome]:
    """Of a source tree whose launch/train.py is this."""
    (folder / "launch").mkdir()
    (folder / "launch" / "train.py").write_text(train)
    config: RunConfig = load_config(SMALLEST, [f"out={folder / 'runs'}"])
    place = Place(folder, SMALLEST, folder / "logs", folder / "made", Layout(1, 1), limit_seconds)
    return list(run_stages(config, place, lambda name: None))


def test_a_stage_that_fails_says_why_and_where_its_log_is(tmp_path: Path) -> None:
    first, *others = stages(tmp_path, "import sys; print('hello'); sys.exit('error: student.weights (x) must exist')")
    assert (first.stage, first.status) == ("train and save", "failed")
    assert first.said == "student.weights (x) must exist"
    assert first.log == tmp_path / "logs" / "train.log"
    assert {"hello", "error: student.weights (x) must exist"} <= set(first.tail)
    assert not any("elastic" in line for line in first.tail), "torchrun says nothing of why"
    assert [(row.stage, row.status) for row in others] == [(name, "not reached") for name in NAMES[1:]]
    assert not all_well([first, *others])


@pytest.mark.slow
def test_a_stage_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    train = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    first, *_ = stages(tmp_path, train, limit_seconds=20.0)
    assert (first.status, first.said) == ("failed", "no checkpoint in time")
    pid, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 30
    while is_alive(pid):
        assert time.monotonic() < deadline, "it goes on without the one who started it"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
