"""Which checkpoint a run goes on from."""

import json
from pathlib import Path

import pytest
import torch

from afd_scale.checkpoint.run_state import FORMAT, RunCheckpoints, newest_checkpoint
from afd_scale.config import ConfigError, RunConfig
from afd_scale.config.models import PolicyConfig, StudentConfig
from afd_scale.training.run_folder import CONFIG, check_folder
from tests.students import read_folder


def save(folder: Path, step: int, **state: int) -> None:
    checkpoint = folder / f"step_{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": step, **state}))


def test_the_newest_complete_one_is_taken(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step in (2, 10):
        save(tmp_path, step, format=FORMAT)
    (tmp_path / ".step_00000011.partial").mkdir()
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert (newest["step"], newest["folder"].name) == (10, "step_00000010")


class Shard:
    """This rank's part of a network: one number."""

    def __init__(self, value: int):
        self.value = value

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "part").write_text(str(self.value))

    def load(self, folder: Path) -> None:
        self.value = int((folder / "part").read_text())


def test_every_role_is_below_networks_whatever_its_name(tmp_path: Path) -> None:
    checkpoints = RunCheckpoints(tmp_path, is_main=True, size=1, barrier=lambda: None, keep=2)
    roles = {"student": Shard(1), "fake_score": Shard(2)}  # a role may have the name of the folder of whole weights
    policy = PolicyConfig(student=StudentConfig())
    folder = checkpoints.save(3, roles, {"epoch": 1}, [("weight", torch.ones(2))], policy)
    assert {path.name for path in folder.iterdir()} == {"networks", "student", "state.json"}
    assert {path.name for path in (folder / "networks").iterdir()} == roles.keys()
    assert read_folder(folder / "student")[0] == policy
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert (newest["step"], newest["data"], newest["folder"]) == (3, {"epoch": 1}, folder)
    read = {"student": Shard(0), "fake_score": Shard(0)}
    checkpoints.load(folder, read)
    assert {name: shard.value for name, shard in read.items()} == {"student": 1, "fake_score": 2}


def test_another_versions_checkpoint_is_refused_before_its_config_is_compared(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"method": "sft", "out": tmp_path})
    save(config.folder / "checkpoints", 2)
    (config.folder / CONFIG).write_text("a field of another version: 3\n")
    with pytest.raises(ConfigError, match=rf"checkpoint .* must be of format {FORMAT}: another version"):
        check_folder(config)
