"""The runs of a study: done once, shared, gone on with; a failure stops no other."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from afd_scale.config import ConfigError
from afd_scale.study.plan import Plan
from afd_scale.study.runs import Place, read_record
from afd_scale.study.work import CLAIMS, Outcomes, StoppedError, work
from afd_scale.training.owner import ONE_JOB
from tests.unit.study.stand_ins import AFD, CHOOSE, LEAVE, RATES, ROOT, SFT, StandIn, left_by, make_plan

NO_DATA = ["data.source=null", "data.shards=/absent"]  # else the study would make it
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def small(**fields: object) -> Plan:
    return make_plan(overrides=NO_DATA, **fields)


def do(plan: Plan, place: Place, stand_in: StandIn, jobs: int = 2) -> Outcomes:
    return work(plan, place, jobs, stand_in, look_seconds=0.3)


def test_rates_are_chosen_and_all_is_done(tmp_path: Path) -> None:
    few = {"of": "afd", "sampler": ["sampler.timesteps=[1000]"]}
    methods = {"afd": {"config": AFD, "rates": RATES}, "sft": {"config": SFT}, "few": few}
    plan, place = small(methods=methods, choose=CHOOSE), Place(ROOT, tmp_path)
    stand_in = StandIn(place, lambda trial: 3.0 - 1e4 * (trial.rate or 0))
    outcomes = do(plan, place, stand_in)
    assert len(outcomes.records) == len(stand_in.started) == 4 + 6
    assert stand_in.started[:4] == [trial.name for trial in plan.choosing("afd")]
    assert stand_in.started.index("few-base-0.0002-0-60") > stand_in.started.index("afd-base-0.0002-0-60")
    found = outcomes.records["afd-base-0.0002-1-60"]
    assert found.value("trajectory_fd") == 1.0
    assert (found.teacher_clips, found.clips_read) == (80 * 16, 80 * 16)
    assert found.pflop > 0
    assert found.date == "2026-01-02 03:04 UTC"


def test_what_is_complete_is_not_done_again(tmp_path: Path) -> None:
    plan, place = small(), Place(ROOT, tmp_path)
    do(plan, place, StandIn(place))
    again = StandIn(place)
    outcomes = do(plan, place, again)
    assert again.started == []
    assert len(outcomes.records) == 4


def test_what_was_done_elsewhere_is_not_done_again(tmp_path: Path) -> None:
    """Here a seed more than there, and one there that is none of the study."""
    there = do(small(seeds=(0, 9)), Place(ROOT, tmp_path / "there"), StandIn(Place(ROOT, tmp_path / "there")))
    here = Place(ROOT, tmp_path / "here")
    stand_in = StandIn(here)
    outcomes = work(small(seeds=(0, 1)), here, 2, stand_in, look_seconds=0.3, known=there.records)
    assert sorted(stand_in.started) == ["afd-base-own-1-60", "sft-base-own-1-100"]
    assert sorted(outcomes.records) == [
        "afd-base-own-0-60", "afd-base-own-1-60", "sft-base-own-0-100", "sft-base-own-1-100"
    ]  # fmt: skip


def test_what_was_done_elsewhere_with_other_settings_is_none_of_the_study(tmp_path: Path) -> None:
    there = do(small(), Place(ROOT, tmp_path / "there"), StandIn(Place(ROOT, tmp_path / "there")))
    other = make_plan(overrides=[*NO_DATA, "data.global_batch=8"])
    outcomes = Outcomes(other, Place(ROOT, tmp_path / "here"), there.records)
    with pytest.raises(ConfigError, match=r"known \(.*-60\) must have the settings .* differ in data.global_batch=8$"):
        outcomes.look()


def test_a_run_that_is_not_at_its_end_goes_on(tmp_path: Path) -> None:
    plan, place = small(seeds=[0]), Place(ROOT, tmp_path)
    trial = plan.trials({}, {})[0]
    place.folder(trial).mkdir(parents=True)
    left = {**left_by(trial, place, 1.0), "summary.json": json.dumps({"steps": 3, "metrics": {}})}
    for name, text in left.items():
        (place.folder(trial) / name).write_text(text)
    stand_in = StandIn(place)
    do(plan, place, stand_in)
    assert trial.name in stand_in.started


def test_a_run_of_other_settings_is_none_of_the_study(tmp_path: Path) -> None:
    place = Place(ROOT, tmp_path)
    do(small(), place, StandIn(place))
    other = make_plan(overrides=[*NO_DATA, "evaluation.clips=7"])
    with pytest.raises(ConfigError, match=r"evaluation.clips is 192 there and 7 here"):
        do(other, place, StandIn(place))


def test_a_failure_is_one_line_and_stops_no_other(tmp_path: Path) -> None:
    few = {"of": "afd", "sampler": ["sampler.timesteps=[1000]"]}
    plan = small(seeds=[0], methods={"afd": {"config": AFD}, "few": few, "sft": {"config": SFT}})
    place = Place(ROOT, tmp_path)
    bad = {"afd-base-own-0-60": "import sys; print('noise'); sys.exit('error: it is broken')"}
    outcomes = do(plan, place, StandIn(place, instead=bad))
    assert outcomes.records.keys() == {"sft-base-own-0-100"}
    assert outcomes.failed["afd-base-own-0-60"] == "exit code 1: error: it is broken"
    assert "the run whose student it measures, afd-base-own-0-60, failed" in outcomes.failed["few-base-own-0-60"]
    shown = Outcomes(plan, place)
    shown.look()
    assert shown.failed == outcomes.failed
    healed = do(plan, place, StandIn(place))
    assert not healed.failed
    assert len(healed.records) == 3


def test_a_run_that_leaves_nothing_has_failed(tmp_path: Path) -> None:
    plan, place = small(seeds=[0]), Place(ROOT, tmp_path)
    outcomes = do(plan, place, StandIn(place, instead={"afd-base-own-0-60": "print('all well')"}))
    assert outcomes.failed == {"afd-base-own-0-60": "it left no result: all well"}


@contextmanager
def claimed_by_another(out: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the claim of a run."""
    (out / CLAIMS).mkdir()
    command = [sys.executable, "-c", HOLD, str(out / CLAIMS / name)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        yield other


def test_a_run_of_another_process_is_waited_for(tmp_path: Path) -> None:
    plan, place = small(), Place(ROOT, tmp_path)
    theirs = plan.trials({}, {})[0]
    with claimed_by_another(tmp_path, theirs.name) as other:

        def last_ends(trial):  # the other's run is complete, and the other ends, when all of ours have begun
            if len(stand_in.started) == 2:
                subprocess.run([sys.executable, "-c", LEAVE, str(place.folder(theirs)),
                                json.dumps(left_by(theirs, place, 5.0))], check=True)  # fmt: skip
                other.kill()
            return 1.0

        stand_in = StandIn(place, last_ends)
        outcomes = do(plan, place, stand_in)
    assert theirs.name not in stand_in.started
    assert len(stand_in.started) == 3
    assert outcomes.records[theirs.name].value("trajectory_fd") == 5.0


def test_the_claim_of_a_process_that_died_is_taken_over(tmp_path: Path) -> None:
    plan, place = small(), Place(ROOT, tmp_path)
    theirs = plan.trials({}, {})[0]
    with claimed_by_another(tmp_path, theirs.name) as other:

        def score(trial):
            if len(stand_in.started) == 3:
                other.kill()
            return 1.0

        stand_in = StandIn(place, score)
        outcomes = do(plan, place, stand_in)
    assert stand_in.started[-1] == theirs.name
    assert len(outcomes.records) == 4


def test_a_start_that_the_run_itself_refuses_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afd_scale.study.work._REFUSED_SECONDS", 0.2)
    plan, place = small(seeds=[0]), Place(ROOT, tmp_path)
    name = "afd-base-own-0-60"
    refused = f"import sys; print('error: out (x) {ONE_JOB}: pid 7'); sys.exit(2)"

    def score(trial):
        if stand_in.started.count(name) > 1:
            stand_in.instead = {}
        return 1.0

    stand_in = StandIn(place, score, {name: refused})
    outcomes = do(plan, place, stand_in)
    assert stand_in.started.count(name) == 2
    assert not outcomes.failed
    assert len(outcomes.records) == 2


def test_told_to_stop_it_tells_its_runs_and_waits_for_them(tmp_path: Path) -> None:
    plan, place = small(), Place(ROOT, tmp_path)
    saves = """
import os, pathlib, signal, sys, time
def save(*_):
    time.sleep(0.3)
    pathlib.Path(sys.argv[1] + ".saved").touch()
    sys.exit(3)
signal.signal(signal.SIGTERM, save)
os.kill(os.getppid(), signal.SIGINT)
time.sleep(60)
"""
    began = time.monotonic()
    stand_in = StandIn(place, instead={"afd-base-own-0-60": saves})
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(StoppedError):
        do(plan, place, stand_in, jobs=1)
    assert stand_in.started == ["afd-base-own-0-60"]
    assert (tmp_path / "afd-base-own-0-60.saved").exists()
    assert time.monotonic() - began < 20
    assert signal.getsignal(signal.SIGINT) == before
    assert not Outcomes(plan, place).failed
    assert len(do(plan, place, StandIn(place)).records) == 4


def test_a_run_is_one_process_with_its_share_of_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    plan, place = small(seeds=[0]), Place(ROOT, tmp_path)
    name = "afd-base-own-0-60"
    says = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ.get('SLURM_STEP_NUM_TASKS'))"
    do(plan, place, StandIn(place, instead={name: says}), jobs=1)
    assert (tmp_path / f"{name}.log").read_text() == f"{len(os.sched_getaffinity(0))} None\n"


def test_seconds_are_those_of_all_training_steps(tmp_path: Path) -> None:
    plan, place = small(seeds=[0]), Place(ROOT, tmp_path)
    trial = plan.trials({}, {})[0]
    place.folder(trial).mkdir(parents=True)
    lines = [{"step": step, "system/step_seconds": seconds} for step, seconds in ((-10, 1.0), (0, 0.5), (60, 2.0))]
    left = {**left_by(trial, place, 1.0), "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in lines)}
    for name, text in left.items():
        (place.folder(trial) / name).write_text(text)
    found = read_record(trial, place)
    assert found is not None
    assert found.seconds == 10 * 1.0 + 10 * 0.5 + 60 * 2.0
