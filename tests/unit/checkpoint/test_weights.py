import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from afd_scale.checkpoint.weights import find_weights, save_weights
from afd_scale.config.models import PolicyConfig
from tests.students import read_folder

CONFIG = PolicyConfig.model_validate(
    {"student": {"weights": "some/start"},
     "sampler": {"chunk_frames": 2, "window_frames": 6, "sink_frames": 2, "timestep_shift": 4.5}}
)  # fmt: skip
STATE = {"a.weight": torch.randn(4, 5), "a.bias": torch.randn(4).bfloat16(), "b": torch.randn(3, 4).T}


def write_run(run: Path, *steps: str) -> None:
    for step in steps:
        save_weights(STATE.items(), run / "checkpoints" / step / "student", CONFIG)


def test_round_trip_in_one_file(tmp_path: Path) -> None:
    save_weights(STATE.items(), tmp_path / "student", CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == ["model.safetensors", "student.json"]
    modes = {path.stat().st_mode for path in (tmp_path / "student").iterdir()}
    assert len(modes) == 1
    config, state = read_folder(tmp_path / "student")
    assert config == CONFIG
    assert state.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)


def test_an_older_folder_has_one_section_for_both(tmp_path: Path) -> None:
    save_weights(STATE.items(), tmp_path / "student", CONFIG)
    written = json.loads((tmp_path / "student" / "student.json").read_text())
    assert written.keys() == {"student", "sampler"}
    del written["sampler"]["first_chunk_timesteps"]  # newer than such folders
    flat = {**written["student"], **written["sampler"]}
    (tmp_path / "student" / "student.json").write_text(json.dumps(flat))
    config, _ = read_folder(tmp_path / "student")
    assert config == CONFIG


def test_round_trip_in_shards(tmp_path: Path) -> None:
    """80 bytes and 8 bytes fill the first shard of 90; 48 bytes make a second."""
    save_weights(STATE.items(), tmp_path / "student", CONFIG, max_shard_bytes=90)
    index = json.loads((tmp_path / "student" / "model.safetensors.index.json").read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index == {"metadata": {"total_size": 136}, "weight_map": {"a.weight": first, "a.bias": first, "b": second}}
    assert load_file(tmp_path / "student" / second).keys() == {"b"}
    _, state = read_folder(tmp_path / "student")
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)


def test_a_tensor_above_the_limit_gets_its_own_shard(tmp_path: Path) -> None:
    save_weights(STATE.items(), tmp_path / "student", CONFIG, max_shard_bytes=10)
    assert len(list((tmp_path / "student").glob("model-*-of-00003.safetensors"))) == 3
    assert read_folder(tmp_path / "student")[1].keys() == STATE.keys()


def test_streamed_tensors_may_vanish_after_their_turn(tmp_path: Path) -> None:
    def gathered() -> Iterator[tuple[str, Tensor]]:
        for name in ("a", "b"):
            tensor = torch.full((3,), 7.0)
            yield name, tensor
            tensor.fill_(-1)

    save_weights(gathered(), tmp_path / "student", CONFIG)
    assert all((tensor == 7).all() for tensor in read_folder(tmp_path / "student")[1].values())


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(2)
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        save_weights(failing(), tmp_path / "student", CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_save_is_written_over_and_a_complete_one_is_not(tmp_path: Path) -> None:
    (tmp_path / ".student.partial").mkdir()
    (tmp_path / ".student.partial" / "rest").write_text("")
    save_weights(STATE.items(), tmp_path / "student", CONFIG)
    assert not (tmp_path / ".student.partial").exists()
    assert not (tmp_path / "student" / "rest").exists()
    with pytest.raises(ValueError, match="must not exist: nothing is overwritten"):
        save_weights(STATE.items(), tmp_path / "student", CONFIG)


def test_find_weights(tmp_path: Path) -> None:
    write_run(tmp_path, "step_00000010", "step_00000020", ".step_00000030.partial")
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "latest").write_text("step_00000010\n")  # a run that died before it moved the pointer
    newest = checkpoints / "step_00000020" / "student"
    for path in (tmp_path, checkpoints, checkpoints / "step_00000020", newest):
        assert find_weights(path) == newest
    assert find_weights(checkpoints / "step_00000010") == checkpoints / "step_00000010" / "student"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nowhere", "must exist"),
        ("young", "must hold a complete checkpoint"),
        ("young/checkpoints/.step_00000001.partial", "still being written"),
        ("young/checkpoints/.step_00000001.partial/student", "still being written"),
        ("empty", "must be a run, checkpoint or student folder"),
    ],
)
def test_find_weights_says_in_one_line_what_is_wrong(path: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "young", ".step_00000001.partial")
    with pytest.raises(ValueError, match=reason) as error:
        find_weights(tmp_path / path)
    assert "\n" not in str(error.value)


def damage(folder: Path, how: str) -> None:
    if how == "shard missing":
        (folder / "model-00002-of-00002.safetensors").unlink()
    elif how == "shard cut":
        path = folder / "model-00001-of-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
    elif how == "tensor missing":
        save_file({"other": torch.ones(1)}, folder / "model-00002-of-00002.safetensors")
    elif how == "index damaged":
        (folder / "model.safetensors.index.json").write_text("{}")
    elif how == "config unknown":
        (folder / "student.json").write_text('{"colour": 3}')
    elif how == "config missing":
        (folder / "student.json").unlink()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("shard missing", "must hold every file of its index: model-00002-of-00002.safetensors is missing"),
        ("shard cut", "model-00001-of-00002.safetensors.* must be a whole safetensors file"),
        ("tensor missing", "must hold every tensor of its index: b is missing"),
        ("index damaged", "must be an index of shards"),
        ("config unknown", "student.json.* must describe a student: student.colour"),
        ("config missing", "student.json.* must be readable"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(how: str, reason: str, tmp_path: Path) -> None:
    save_weights(STATE.items(), tmp_path / "student", CONFIG, max_shard_bytes=90)
    damage(tmp_path / "student", how)
    with pytest.raises(ValueError, match=reason) as error:
        read_folder(tmp_path / "student")
    assert "\n" not in str(error.value)
