"""What a checkpoint is made of, when it is complete, and what becomes of one that cannot be written."""

import errno
import logging
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from afd_scale.checkpoint import run_state
from afd_scale.checkpoint.checksums import check_part
from afd_scale.checkpoint.resume import newest_whole_checkpoint, read_state
from afd_scale.checkpoint.run_state import MOST_FAILURES, RunCheckpoints, SavedStudent
from afd_scale.config import ConfigError, RunConfig
from afd_scale.config.models import PolicyConfig, StudentConfig
from afd_scale.engines.resharding import SavedShards, Shards, snapshot
from afd_scale.parallel.ranks import alone
from tests.disks import small_disk
from tests.students import read_folder

POLICY = PolicyConfig(student=StudentConfig())
STUDENT = SavedStudent(POLICY, "student")
RANKS = alone()


class Part:
    """This rank's part of a network: a number, in a shard whose writing may be held up or fail."""

    def __init__(self, value: float, before: Callable[[], None] = lambda: None):
        self.weight, self.before = torch.full((2,), value), before

    def snapshot(self, folder: Path) -> Shards:
        return _Held(snapshot([("weight", self.weight)]), self.before)

    def load(self, folder: Path) -> None:
        with SavedShards(folder) as saved:
            self.weight = saved.part("weight", 2, 0, 1)


class _Held(Shards):
    def __init__(self, shards: Shards, before: Callable[[], None]):
        super().__init__(shards.tensors, shards.facts)
        object.__setattr__(self, "before", before)

    def write(self, folder: Path, rank: int, ranks: int) -> Path:
        self.before()  # type: ignore[attr-defined]
        return super().write(folder, rank, ranks)


def fail() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig.model_validate({"method": "sft", "out": tmp_path})


def checkpoints_of(config: RunConfig, **train: Any) -> RunCheckpoints:
    return RunCheckpoints(config.model_copy(update={"train": config.train.model_copy(update=train)}), RANKS)


def save(checkpoints: RunCheckpoints, step: int, part: Part | None = None, wait: bool = True, **more: Any) -> None:
    checkpoints.save(step, {"student": part or Part(step)}, {"epoch": step}, more.pop("student", STUDENT), **more)
    checkpoints.settle(wait)


def names(checkpoints: RunCheckpoints) -> list[str]:
    """Each partial one's own part left out."""
    return sorted(re.sub(r"\.[0-9a-f]{8}\.partial$", ".partial", path.name) for path in checkpoints.folder.iterdir())


def test_every_role_is_below_networks_whatever_its_name(config: RunConfig) -> None:
    checkpoints = checkpoints_of(config)
    roles = {"student": Part(1), "fake_score": Part(2)}  # a role may have the name of the folder of the policy
    checkpoints.save(3, roles, {"epoch": 1}, STUDENT, {"spread": 0.5})
    checkpoints.finish()
    folder = checkpoints.folder / "step_00000003"
    assert {path.name for path in folder.iterdir()} == {"networks", "student", "state.json", "config.yaml", "checksums"}
    assert {path.name for path in (folder / "networks").iterdir()} == roles.keys()
    assert [path.name for path in (folder / "student").iterdir()] == ["student.json"], "its weights are the shards'"
    newest = newest_whole_checkpoint(checkpoints.folder, RANKS)
    assert newest is not None
    assert {name: newest[name] for name in ("step", "data", "method", "folder", "exported", "ranks")} == {
        "step": 3, "data": {"epoch": 1}, "method": {"spread": 0.5}, "folder": folder, "exported": "student", "ranks": 1
    }  # fmt: skip
    read = {"student": Part(0), "fake_score": Part(0)}
    checkpoints.load(newest, read)
    assert {name: part.weight.tolist() for name, part in read.items()} == {"student": [1, 1], "fake_score": [2, 2]}


def test_what_the_shards_lack_of_a_student_is_written_whole(config: RunConfig) -> None:
    checkpoints = checkpoints_of(config)
    save(checkpoints, 1, student=SavedStudent(POLICY, "student", None, iter([("weight", torch.ones(2))])))
    policy, state = read_folder(checkpoints.folder / "step_00000001" / "student")
    assert policy == POLICY
    assert {name: tensor.tolist() for name, tensor in state.items()} == {"weight": [1, 1]}


def test_it_is_written_while_training_goes_on(config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    """What is written is what was there when the save began, and it is not complete before it is all there."""
    caplog.set_level(logging.INFO)
    checkpoints, go_on = checkpoints_of(config), threading.Event()
    part = Part(1, lambda: go_on.wait(10) or None)  # type: ignore[func-returns-value]
    save(checkpoints, 4, part, wait=False)
    part.weight += 5
    checkpoints.settle()
    assert names(checkpoints) == [".step_00000004.partial"]
    assert (checkpoints.asked, checkpoints.saved) == (4, 0)
    go_on.set()
    checkpoints.finish()
    assert names(checkpoints) == ["latest", "step_00000004"]
    assert checkpoints.saved == 4
    written = checkpoints.folder / "step_00000004" / "networks" / "student" / "rank_00000.safetensors"
    assert load_file(written)["weight"].tolist() == [1, 1]
    values = checkpoints.metrics()
    assert values.keys() == {"system/save_pause_seconds", "system/save_write_seconds"}
    assert values["system/save_pause_seconds"] < values["system/save_write_seconds"]
    assert checkpoints.metrics() == {}
    assert "step_00000004: training paused for" in caplog.text


def test_the_next_save_waits_for_the_one_before(config: RunConfig) -> None:
    checkpoints, go_on = checkpoints_of(config), threading.Event()
    save(checkpoints, 1, Part(1, lambda: go_on.wait(10) or None), wait=False)  # type: ignore[func-returns-value]
    threading.Timer(0.2, go_on.set).start()
    save(checkpoints, 2, wait=False)
    assert checkpoints.saved == 1
    assert checkpoints.metrics()["system/save_pause_seconds"] > 0.05, "half of it waited 0.2 s"
    checkpoints.finish()
    assert names(checkpoints) == ["latest", "step_00000001", "step_00000002"]


def test_a_save_that_fails_leaves_the_older_one_and_the_run_goes_on(
    config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = checkpoints_of(config)
    save(checkpoints, 1)
    save(checkpoints, 2, Part(2, fail))
    assert names(checkpoints) == ["latest", "step_00000001"]
    assert "step 2 could not be saved (No space left on device): the run goes on; step 1 is the newest" in caplog.text
    assert checkpoints.metrics()["system/failed_saves"] == 1
    with pytest.raises(ConfigError, match=r"^out .* must have room: step 2 could not be saved; step 1 is the newest"):
        checkpoints.finish()
    save(checkpoints, 3)
    checkpoints.finish()
    assert "system/failed_saves" not in checkpoints.metrics()
    assert names(checkpoints) == ["latest", "step_00000001", "step_00000003"]


def test_saves_that_fail_one_after_the_other_end_the_run(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = checkpoints_of(config)
    save(checkpoints, 1, Part(1, fail))
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: fail())  # not even the folder
    save(checkpoints, 2)
    assert checkpoints.failures == MOST_FAILURES - 1
    with pytest.raises(ConfigError, match=r"3 saves in a row have failed, the last of step 3 .*no checkpoint yet"):
        save(checkpoints, 3)


def test_our_own_mistakes_are_no_full_disk(config: RunConfig) -> None:
    def slip() -> None:
        raise RuntimeError("a slip")

    checkpoints = checkpoints_of(config)
    with pytest.raises(RuntimeError, match="a slip"):
        save(checkpoints, 1, Part(1, slip))


def test_which_checkpoints_stay(config: RunConfig) -> None:
    checkpoints = checkpoints_of(config, keep_checkpoints=2, keep_every=3)
    for step in range(1, 9):
        save(checkpoints, step)
    assert names(checkpoints) == ["latest", *(f"step_{step:08d}" for step in (3, 6, 7, 8))]
    assert (checkpoints.folder / "latest").read_text() == "step_00000008"


def test_what_a_killed_run_left_is_swept(config: RunConfig) -> None:
    checkpoints = checkpoints_of(config)
    for left_over in (".step_00000001.partial", ".step_00000002.deleting"):
        (checkpoints.folder / left_over / "inner").mkdir(parents=True)
    save(checkpoints, 3)
    assert names(checkpoints) == ["latest", "step_00000003"]


def test_ranks_of_an_earlier_start_that_live_on_write_elsewhere(config: RunConfig) -> None:
    earlier, go_on = checkpoints_of(config), threading.Event()
    save(earlier, 3, Part(1, lambda: go_on.wait(10) or None), wait=False)  # type: ignore[func-returns-value]
    later = checkpoints_of(config)

    def write() -> None:
        go_on.set()
        assert earlier._write is not None
        earlier._write.thread.join()

    save(later, 3, Part(2, write))
    folder = later.folder / "step_00000003"
    check_part(folder, 1, 0, 1)
    assert load_file(folder / "networks" / "student" / "rank_00000.safetensors")["weight"].tolist() == [2, 2]


def test_minutes_between_saves(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(run_state.time, "monotonic", lambda: now[0])
    assert not checkpoints_of(config).due()
    checkpoints = checkpoints_of(config, save_minutes=2)
    now[0] += 119
    assert not checkpoints.due()
    now[0] += 2
    assert checkpoints.due()
    save(checkpoints, 1)
    assert not checkpoints.due()


class TwoRanks:
    """Threads that agree by a barrier, each a rank."""

    def __init__(self, rank: int, meeting: threading.Barrier, said: dict[int, Any]):
        self.rank, self.size, self.is_main, self.meeting, self.said = rank, 2, rank == 0, meeting, said

    def _all(self, value: Any) -> list[Any]:
        self.said[self.rank] = value
        self.meeting.wait(20)
        values = [self.said[rank] for rank in range(2)]
        self.meeting.wait(20)
        return values

    def largest(self, values: Any) -> list[float]:
        return [float(max(each)) for each in zip(*self._all(values), strict=True)]

    def run_on_all(self, work: Callable[..., Any], *arguments: Any) -> Any:
        result, error = None, None
        try:
            result = work(*arguments)
        except Exception as problem:
            error = problem
        for first in self._all(error):
            if first is not None:
                raise first
        return result

    def run_on_main(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return self._all(self.run_on_all(lambda: work(*arguments) if self.is_main else None))[0]


def on_two_ranks(config: RunConfig, script: Callable[[RunCheckpoints], Any]) -> list[Any]:
    """A script on two ranks at once; what each returns or raises."""
    meeting, said = threading.Barrier(2), {}

    def run(rank: int) -> Any:
        try:
            return script(RunCheckpoints(config, TwoRanks(rank, meeting, said)))
        except ConfigError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


def test_all_ranks_must_be_done(config: RunConfig) -> None:
    """The main rank has written its part, and waits for the other's."""
    go_on, seen = threading.Event(), []

    def script(checkpoints: RunCheckpoints) -> None:
        def hold() -> None:
            if checkpoints.ranks.rank == 1:
                go_on.wait(10)

        save(checkpoints, 1, Part(checkpoints.ranks.rank, hold), wait=False)
        seen.append(names(checkpoints))
        checkpoints.ranks.largest([0])
        go_on.set()
        checkpoints.finish()
        seen.append(names(checkpoints))

    on_two_ranks(config, script)
    assert seen == [[".step_00000001.partial"]] * 2 + [["latest", "step_00000001"]] * 2
    folder = config.folder / "checkpoints" / "step_00000001"
    assert read_state(folder)["ranks"] == 2
    assert len(list(folder.rglob("rank_*.safetensors"))) == len(list(folder.rglob("rank_*.json"))) == 2
    check_part(folder, 2, 0, 1)


def test_one_ranks_full_disk_is_all_ranks(config: RunConfig) -> None:
    def script(checkpoints: RunCheckpoints) -> list[int]:
        save(checkpoints, 1, Part(1))
        for step in (2, 3):
            save(checkpoints, step, Part(1, fail if checkpoints.ranks.rank == 1 else lambda: None), wait=False)
            checkpoints.settle(wait=True)
        return [checkpoints.asked, checkpoints.saved, checkpoints.failures]

    assert on_two_ranks(config, script) == [[3, 1, 2]] * 2
    assert sorted(path.name for path in (config.folder / "checkpoints").iterdir()) == ["latest", "step_00000001"]


def test_a_real_full_disk(config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", kib=256) as disk:
        checkpoints = checkpoints_of(config.model_copy(update={"out": disk}))
        save(checkpoints, 1)
        large = Part(2)
        large.weight = torch.ones(100_000)
        save(checkpoints, 2, large)
        assert names(checkpoints) == ["latest", "step_00000001"]
        assert "step 2 could not be saved (" in caplog.text
        assert "\n" not in caplog.messages[-1]
        save(checkpoints, 3)
        assert read_state(checkpoints.folder / "step_00000003")["step"] == 3
