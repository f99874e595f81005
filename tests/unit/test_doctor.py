"""tools/doctor.py on one machine."""

import json
import os
from pathlib import Path

import pytest

from tests.tools import ROOT, call_tool

TOY = ROOT / "configs" / "toy" / "afd.yaml"
LAUNCHERS = ("RANK", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_RANK", "MASTER_ADDR")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in LAUNCHERS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


def test_one_json_object_and_nothing_else(tmp_path: Path) -> None:
    done = call_tool("doctor", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["fit"] else 1)
    assert {each["topic"] for each in found["findings"]} == {
        "versions", "GPUs", "shared memory", "disks", "names", "ranks",
    }  # fmt: skip
    assert [each for each in found["findings"] if each["state"] in ("wrong", "warning") and not each["remedy"]] == []
    assert os.listdir(tmp_path) == []


def test_a_run_is_looked_at_by_its_config(tmp_path: Path) -> None:
    done = call_tool("doctor", "--config", TOY, f"out={tmp_path}/elsewhere", "data.shards=s3://x/y", "data.source=null",
                     f"data.cache={tmp_path}/copies")  # fmt: skip
    assert f"({tmp_path}/elsewhere)" in done.stdout
    assert f"({tmp_path}/copies)" in done.stdout
    assert "cache of data.shards" in done.stdout


def test_what_is_wrong_ends_with_1_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node-0.invalid slots=3\n")
    done = call_tool("doctor", "--hostfile", tmp_path / "hosts", "--config", TOY)
    assert done.returncode == 1
    assert "-> add it to /etc/hosts or DNS" in done.stdout
    assert "3 ranks on 1 machine" in done.stdout
    assert "data.global_batch (32) must divide among 3 data ranks" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train.steps=3"], "error: override (train.steps=3) must come with --config: it changes a run"),
        (["--config", "absent.yaml"], "error: config (absent.yaml) must be a readable YAML file: No such file"),
        (["--hostfile", "absent"], "error: hostfile (absent) must be a readable text"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], line: str) -> None:
    done = call_tool("doctor", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(line)
    assert len(done.stderr.splitlines()) == 1
