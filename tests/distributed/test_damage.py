"""Two ranks whose disk fails them in the middle of a save, and a run that goes on from what damage has left."""

import json
import re
import shutil
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from afd_scale.checkpoint.load_student import read_student
from tests.distributed.processes import ROOT, on_ranks
from tests.distributed.small_run import write_small_run

TRAIN = ROOT / "launch" / "train.py"
STEPS = 5
NAME = "run"


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    write_small_run(folder, STEPS)
    return folder


def train(configs: Path, out: Path, *options: str, program: Path = TRAIN) -> CompletedProcess[str]:
    fixed = ("train.save_every=2", "train.keep_checkpoints=5", "evaluation.metrics=none", "evaluation.samples=0")
    return on_ranks(2, program, "--config", configs / "afd.yaml", f"name={NAME}", f"out={out}", *fixed, *options)


@pytest.fixture(scope="module")
def whole(configs: Path) -> Path:
    """The folder of an uninterrupted run, with checkpoints of steps 2, 4 and 5."""
    result = train(configs, configs / "whole")
    assert result.returncode == 0, result.stderr[-3000:]
    assert names(configs / "whole" / NAME) == ["latest", *(f"step_{step:08d}" for step in (2, 4, 5))]
    return configs / "whole" / NAME


def names(run: Path) -> list[str]:
    """Each partial one's own part left out."""
    return sorted(re.sub(r"\.[0-9a-f]{8}\.partial$", ".partial", path.name) for path in (run / "checkpoints").iterdir())


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("system/")} for line in lines]


def assert_same(run: Path, whole: Path) -> None:
    for role in (None, "old_policy"):
        ours, theirs = (read_student(folder, role).state for folder in (run, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert metrics(run) == metrics(whole)


def patched(folder: Path, body: str) -> Path:
    """launch/train.py, with `write(tensors, path, rank, save)` in place of what writes a file of shards."""
    script = folder / "patched.py"
    script.write_text(f"""
import errno, os, runpy, signal, time
from pathlib import Path
from afd_scale.engines import resharding

save_file, rank = resharding.save_file, int(os.environ["RANK"])

def write(tensors, path, metadata):
    step = int(path.parents[2].name.split(".")[1].removeprefix("step_"))
    save = lambda: save_file(tensors, path, metadata=metadata)
{body}

resharding.save_file = write
runpy.run_path({str(TRAIN)!r}, run_name="__main__")
""")
    return script


def test_a_run_goes_on_from_what_damage_has_left(configs: Path, whole: Path, tmp_path: Path) -> None:
    """A flipped shard of the second rank, a cut state, and every file beside the checkpoints."""
    run = tmp_path / NAME
    shutil.copytree(whole, run)
    shard = run / "checkpoints" / "step_00000005" / "networks" / "student" / "rank_00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-64:] = bytes(255 - byte for byte in content[-64:])
    shard.write_bytes(content)
    state = run / "checkpoints" / "step_00000004" / "state.json"
    state.write_bytes(state.read_bytes()[:40])
    for name in ("summary.json", "config.yaml"):
        (run / name).write_bytes((run / name).read_bytes()[:100])
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\x00\n")
    result = train(configs, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    for said in (
        "step_00000005 is damaged and set aside as step_00000005.damaged: networks/student/rank_00001.safetensors is",
        "step_00000004 is damaged and set aside as step_00000004.damaged: state.json has 40 bytes",
        f"run ({run / 'summary.json'}) must be the summary of a run: ",
        f"{run / 'config.yaml'} is absent or damaged: the run goes on by",
        "lines are damaged, and left out",
        f"{NAME} resumes after step 2 from",
    ):
        assert said in result.stderr
    assert_same(run, whole)
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS
    kept = ["step_00000004", "step_00000004.damaged", "step_00000005", "step_00000005.damaged"]
    assert names(run) == ["latest", "step_00000002", *kept]


def test_a_damaged_student_is_refused_by_who_reads_it(whole: Path, tmp_path: Path) -> None:
    """The exported weights lie in the shards: a tool takes no damaged ones."""
    run = tmp_path / NAME
    shutil.copytree(whole, run)
    shard = run / "checkpoints" / "step_00000005" / "networks" / "student" / "rank_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"weights .* must be whole: networks/student/rank_00001.* has \d+ bytes"):
        read_student(run)
    read_student(run, "old_policy")
    read_student(run / "checkpoints" / "step_00000004")


def test_killed_in_a_write_the_older_one_is_whole(configs: Path, whole: Path, tmp_path: Path) -> None:
    killed = train(configs, tmp_path, program=patched(tmp_path, """
    if (step, rank, path.parent.name) == (4, 1, "old_policy"):
        path.write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    save()
"""))  # fmt: skip
    assert killed.returncode == -9
    assert names(tmp_path / NAME) == [".step_00000004.partial", "latest", "step_00000002"]
    result = train(configs, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"{NAME} resumes after step 2 from" in result.stderr
    assert names(tmp_path / NAME) == names(whole)
    assert_same(tmp_path / NAME, whole)


def test_one_ranks_full_disk_costs_a_checkpoint(configs: Path, whole: Path, tmp_path: Path) -> None:
    result = train(configs, tmp_path, program=patched(tmp_path, """
    if (step, rank) == (2, 1):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save()
"""))  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert (
        "step 2 could not be saved (No space left on device): the run goes on; there is no checkpoint" in result.stderr
    )
    assert names(tmp_path / NAME) == ["latest", "step_00000004", "step_00000005"]
    lines = map(json.loads, (tmp_path / NAME / "metrics.jsonl").read_text().splitlines())
    assert 1.0 in [line.get("system/failed_saves") for line in lines]
    assert_same(tmp_path / NAME, whole)


def test_a_disk_that_stays_full_ends_the_run_in_one_line(configs: Path, tmp_path: Path) -> None:
    result = train(configs, tmp_path, "train.save_every=1", program=patched(tmp_path, """
    if (step > 1) and rank == 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save()
"""))  # fmt: skip
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "must have room: 3 saves in a row have failed, the last of step 4 (No space left on device)" in line
    assert names(tmp_path / NAME) == ["latest", "step_00000001"]


def test_told_to_stop_in_a_write_it_is_waited_for(configs: Path, whole: Path, tmp_path: Path) -> None:
    """And for the one that being told to stop begins."""
    result = train(configs, tmp_path, program=patched(tmp_path, """
    if step == 2 and rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    save()
"""))  # fmt: skip
    assert result.returncode == 3, result.stderr[-3000:]
    saved = names(tmp_path / NAME)
    assert saved[:2] == ["latest", "step_00000002"]
    assert len(saved) == 3
    assert train(configs, tmp_path).returncode == 0
    assert_same(tmp_path / NAME, whole)


def test_a_clock_saves_too(configs: Path, tmp_path: Path) -> None:
    result = train(configs, tmp_path, "train.save_every=null", "train.save_minutes=1e-6", "train.keep_checkpoints=1",
                   "train.keep_every=2")  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert names(tmp_path / NAME) == ["latest", *(f"step_{step:08d}" for step in (2, 4, 5))]
    assert result.stderr.count("saved /") == STEPS
