"""Which checkpoint a run goes on from: damage of every kind is found, named and set aside."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from afd_scale.checkpoint import checksums
from afd_scale.checkpoint.checksums import DamagedError, check_part
from afd_scale.checkpoint.resume import newest_whole_checkpoint, read_state
from afd_scale.checkpoint.run_state import FORMAT, RunCheckpoints, SavedStudent
from afd_scale.config import ConfigError, RunConfig
from afd_scale.config.models import PolicyConfig, StudentConfig
from afd_scale.engines.resharding import Shards, snapshot
from afd_scale.parallel.ranks import alone
from afd_scale.training.run_folder import CONFIG, check_folder, start_anew

STUDENT = SavedStudent(PolicyConfig(student=StudentConfig()), "student")


class Part:
    def snapshot(self, folder: Path) -> Shards:
        return snapshot([("weight", torch.arange(100.0))], optimizer_steps=3)

    def load(self, folder: Path) -> None: ...


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 2 and 4."""
    config = RunConfig.model_validate({"method": "sft", "out": tmp_path})
    checkpoints = RunCheckpoints(config, alone())
    for step in (2, 4):
        checkpoints.save(step, {"student": Part(), "old_policy": Part()}, {}, STUDENT)
    checkpoints.finish()
    return checkpoints.folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "latest")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-64:] = bytes(255 - byte for byte in content[-64:])
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


SHARD = "networks/old_policy/rank_00000.safetensors"
HOW: tuple[Callable[[Path], None], ...] = (cut, flip, empty, Path.unlink)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "name", [SHARD, "state.json", "student/student.json", "config.yaml", "checksums/rank_00000.json"]
)
def test_a_damaged_checkpoint_is_named_and_set_aside(
    folder: Path, name: str, how: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    how(folder / "step_00000004" / name)
    found = newest_whole_checkpoint(folder, alone())
    assert found is not None
    assert (found["step"], found["folder"]) == (2, folder / "step_00000002")
    assert names(folder) == ["step_00000002", "step_00000004.damaged"]
    (line,) = caplog.messages
    assert line.startswith(f"checkpoint {folder / 'step_00000004'} is damaged and set aside as step_00000004.damaged: ")
    assert name.rpartition("/")[2] in line
    assert "\n" not in line


def test_what_is_whole_is_left_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = newest_whole_checkpoint(folder, alone())
    assert found is not None
    assert found["step"] == 4
    assert names(folder) == ["step_00000002", "step_00000004"]
    assert not caplog.messages


def test_where_all_are_damaged_the_run_does_not_begin_anew_in_silence(folder: Path) -> None:
    for checkpoint in list(folder.glob("step_*")):
        flip(checkpoint / SHARD)
    for _ in range(2):  # and the next start says the same
        with pytest.raises(ConfigError, match=r"must hold one that is whole: all are damaged, step_00000004.damaged"):
            newest_whole_checkpoint(folder, alone())
    assert names(folder) == ["step_00000002.damaged", "step_00000004.damaged"]
    (folder / "step_00000004").mkdir()  # a copy that is no better
    with pytest.raises(ConfigError, match="all are damaged"):
        newest_whole_checkpoint(folder, alone())
    assert names(folder)[-1] == "step_00000004.damaged-2"
    start_anew(RunConfig.model_validate({"method": "sft", "out": folder.parents[1]}))
    assert names(folder) == []
    assert newest_whole_checkpoint(folder, alone()) is None


def test_without_any_a_run_begins(tmp_path: Path) -> None:
    assert newest_whole_checkpoint(tmp_path, alone()) is None
    (tmp_path / ".step_00000011.partial").mkdir()
    assert newest_whole_checkpoint(tmp_path, alone()) is None


def test_the_ranks_check_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each its own where as many read as wrote."""
    for rank in range(3):
        file = tmp_path / f"of_{rank}"
        file.write_text(str(rank))
        checksums.write_note(tmp_path, rank, [file])
    read: list[str] = []
    real = checksums._hash
    monkeypatch.setattr(checksums, "_hash", lambda path: (read.append(path.name), real(path))[1])
    for ranks, shares in (
        (3, [["of_0"], ["of_1"], ["of_2"]]),
        (2, [["of_0", "of_2"], ["of_1"]]),
        (4, [["of_0"], ["of_1"], ["of_2"], []]),
    ):
        for rank, share in enumerate(shares):
            check_part(tmp_path, 3, rank, ranks)
            assert read == share
            read.clear()


def test_a_file_that_may_not_be_read_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checksums, "_hash", refuse)
    with pytest.raises(ConfigError, match=r"must be readable: Permission denied"):
        newest_whole_checkpoint(folder, alone())
    assert names(folder) == ["step_00000002", "step_00000004"]


def write_old(folder: Path, step: int, **state: int) -> Path:
    """As written before there were checksums."""
    checkpoint = folder / f"step_{step:08d}"
    (checkpoint / "networks" / "student").mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": step, "ranks": 1, **state}))
    Part().snapshot(folder).write(checkpoint / "networks" / "student", 0, 1)
    return checkpoint


def test_an_earlier_format_has_no_checksums_and_is_read(tmp_path: Path) -> None:
    for step in (1, 2):
        write_old(tmp_path, step, format=3)
    cut(tmp_path / "step_00000002" / "networks" / "student" / "rank_00000.safetensors")
    found = newest_whole_checkpoint(tmp_path, alone())
    assert found is not None
    assert found["step"] == 1
    assert names(tmp_path) == ["step_00000001", "step_00000002.damaged"]


def test_a_moved_base_may_be_told_of_by_hand(folder: Path) -> None:
    (folder / "step_00000004" / "student" / "base.json").write_text("{}")
    check_part(folder / "step_00000004", 1, 0, 1)


def test_another_versions_checkpoint_is_refused_before_its_config_is_compared(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"method": "sft", "out": tmp_path})
    write_old(config.folder / "checkpoints", 2, format=2)
    (config.folder / CONFIG).write_text("a field of another version: 3\n")
    with pytest.raises(ConfigError, match=rf"checkpoint .* must be of format {FORMAT}: another version"):
        check_folder(config)


def test_a_state_that_says_nothing_is_damage(tmp_path: Path) -> None:
    checkpoint = write_old(tmp_path, 2, format=3)
    for text in ("[]", "{}", "3", '{"step": "x"}', "\xff"):
        (checkpoint / "state.json").write_text(text, encoding="latin-1")
        with pytest.raises(DamagedError, match=r"state.json is absent or damaged"):
            read_state(checkpoint)


@pytest.mark.parametrize("name", ["/dev/zero", "../../elsewhere", "networks/../../x"])
def test_a_note_leads_to_no_file_elsewhere(folder: Path, name: str) -> None:
    note = folder / "step_00000004" / "checksums" / "rank_00000.json"
    note.write_text(json.dumps({name: {"bytes": 0, "xxh3": ""}}))
    with pytest.raises(DamagedError, match=r"checksums/rank_00000\.json is no list of checksums"):
        check_part(folder / "step_00000004", 1, 0, 1)
