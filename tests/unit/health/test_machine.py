"""Disks and shared memory of a machine."""

import os
import time
from collections import namedtuple
from pathlib import Path

import pytest

from afd_scale.config import load_config
from afd_scale.health import disks, memory

ROOT = Path(__file__).parents[3]
MIB, GIB = 2**20, 2**30


def disk_of(monkeypatch: pytest.MonkeyPatch, module: object, total: int, free: int) -> None:
    usage = namedtuple("usage", "total used free")(total, total - free, free)
    monkeypatch.setattr(module, "shutil", type("shutil", (), {"disk_usage": staticmethod(lambda path: usage)}))


@pytest.mark.parametrize(
    ("free", "needed", "state"),
    [(10, 0, "ok"), (10, 7, "ok"), (10, 9, "warning"), (10, 11, "wrong"), (1, 0, "warning"), (0, 0, "wrong")],
)
def test_room_for_checkpoints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, needed: int, state: str
) -> None:
    disk_of(monkeypatch, disks, 100 * GIB, free * GIB)
    found = disks.check_room("out", tmp_path / "not" / "there", needed * GIB)
    assert found.state == state
    assert bool(found.remedy) == (state != "ok")


def test_a_checkpoint_of_the_toy_run_has_the_bytes_of_its_parts() -> None:
    config = load_config(ROOT / "configs/toy/smoke/afd.yaml")
    # One that a run wrote has 16,051,558, with its headers.
    assert disks.checkpoint_bytes(config) == pytest.approx(16_051_558, rel=0.01)
    assert disks.needed_for_checkpoints(config) == 3 * disks.checkpoint_bytes(config)


def test_writing_leaves_nothing(tmp_path: Path) -> None:
    found = disks.check_writing("out", tmp_path / "runs" / "x", size=2 * MIB)
    assert [each.what for each in found] == ["out: writing", "out: clock of its files"]
    assert "MB/s" in found[0].value
    assert found[1].state == "ok"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("seconds", [3600.0, -3600.0])
def test_a_clock_that_is_off_is_told(tmp_path: Path, seconds: float) -> None:
    found = disks.check_writing("out", tmp_path, size=MIB, clock=lambda: time.time() + seconds)
    assert found[1].state == "warning"
    assert "off this machine's" in found[1].value


def test_a_slow_disk_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disks, "SLOW_BYTES_PER_SECOND", 1e15)
    assert disks.check_writing("out", tmp_path, size=MIB)[0].state == "warning"


def test_a_folder_that_cannot_be_written_to_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (found,) = disks.check_writing("out", tmp_path / "file", size=MIB)
    assert (found.state, found.value) == ("wrong", f"Not a directory ({tmp_path}/file)")


@pytest.mark.parametrize(
    ("total", "free", "ranks", "state", "words"),
    [
        (64, 64, 0, "ok", ""),
        (64, 64, 1, "ok", ""),
        (64, 64, 8, "wrong", "--shm-size=1g"),
        (64, 1, 0, "wrong", "what fills it"),
        (4096, 2048, 8, "ok", ""),
        (4096, 512, 8, "wrong", "what fills it"),
    ],
)
def test_room_in_shared_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, total: int, free: int, ranks: int, state: str, words: str
) -> None:
    disk_of(monkeypatch, memory, total * MIB, free * MIB)
    found = memory.check_room(ranks, tmp_path)
    assert found.state == state
    assert words in found.remedy


def test_shared_memory_that_is_not_there(tmp_path: Path) -> None:
    assert memory.check_room(0, tmp_path / "shm").state == "wrong"


def test_leftovers_are_counted_and_removed_where_nobody_uses_them(tmp_path: Path) -> None:
    shm, tmp = tmp_path / "shm", tmp_path / "tmp"
    for folder in (shm, tmp):
        folder.mkdir()
    for number in ("000000", "000001"):
        (shm / f"{number}_resume").write_bytes(b" " * os.sysconf("SC_PAGESIZE"))
        for lock in ("barrier_filelock", "cache_filelock"):
            (tmp / f"{number}_{lock}").touch()
    with (shm / "000001_resume").open("r+b"):
        found = memory.check_leftovers(shm, tmp)
        assert [(each.value, each.state) for each in found] == [
            ("1 used, 1 dead", "warning"), ("2 used, 2 dead", "warning"),
        ]  # fmt: skip
        assert memory.clean(shm, tmp).value == "1 blocks, 2 lock files of jobs that are gone"
        assert [each.value for each in memory.check_leftovers(shm, tmp)] == ["1 used", "2 used"]
    assert memory.clean(shm, tmp).value == "1 blocks, 2 lock files of jobs that are gone"
    assert [(each.value, each.state) for each in memory.check_leftovers(shm, tmp)] == [("none", "ok")] * 2


def test_a_block_that_is_no_good_is_wrong_where_somebody_holds_it(tmp_path: Path) -> None:
    (tmp_path / "000000_locals").touch()
    assert [each.state for each in memory.check_leftovers(tmp_path, tmp_path)] == ["warning", "ok"]
    with (tmp_path / "000000_locals").open("r+b"):
        found = memory.check_leftovers(tmp_path, tmp_path)
        assert [each.state for each in found] == ["ok", "ok", "wrong"]
        assert "000000_locals (0 bytes)" in found[2].value
