"""Which checkpoint a run goes on from."""

import json
from pathlib import Path

import pytest

from afd_scale.checkpoint.run_state import FORMAT, newest_checkpoint
from afd_scale.config import ConfigError, RunConfig
from afd_scale.training.run_folder import CONFIG, check_folder


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


def test_another_versions_checkpoint_is_refused_before_its_config_is_compared(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"method": "sft", "out": tmp_path})
    save(config.folder / "checkpoints", 2)
    (config.folder / CONFIG).write_text("a field of another version: 3\n")
    with pytest.raises(ConfigError, match=rf"checkpoint .* must be of format {FORMAT}: another version"):
        check_folder(config)
