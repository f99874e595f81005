"""A run's folder belongs to one job; it is free when that is gone."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from afd_scale.config import ConfigError
from afd_scale.parallel.heartbeats import Heart, sign_path
from afd_scale.training import owner
from afd_scale.training.owner import Owner

HOLD = """
import sys, time
from pathlib import Path
from afd_scale.parallel.heartbeats import Heart
from afd_scale.training.owner import Owner
owner = Owner(Path(sys.argv[1])); owner.take(); Heart(Path(sys.argv[1]), 0, 1).start()
print("held", flush=True); time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    return other


def test_a_second_job_is_refused_by_name_and_takes_over_when_the_first_is_gone(tmp_path: Path) -> None:
    second = Owner(tmp_path / "run")
    with hold(tmp_path / "run") as first:
        try:
            with pytest.raises(ConfigError, match=rf"at a time: pid {first.pid} on \S+, started \d+ s before its last"):
                second.take()
        finally:
            first.kill()
    second.take()


def test_a_folder_in_which_nothing_began_goes_again(tmp_path: Path) -> None:
    for begun in (False, True):
        held = Owner(tmp_path / "run")
        held.take()
        if begun:
            (tmp_path / "run" / "config.yaml").touch()
        held.leave()
        assert (tmp_path / "run").exists() == begun
    Owner(tmp_path / "run").take()  # it was let go


def elsewhere(folder: Path, **fields: object) -> None:
    """A sign of an owner on another machine, whose lock is not seen here."""
    heart = Heart(folder, 0, 1)
    heart.start()
    sign = json.loads(sign_path(folder, 0).read_text())
    heart._stop.set()
    heart._thread.join()
    sign_path(folder, 0).write_text(json.dumps(sign | {"host": "node-7", "pid": 3} | fields))


def test_an_owner_on_another_machine_that_gives_signs_keeps_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(tmp_path)
    path = sign_path(tmp_path, 0)
    monkeypatch.setattr(owner.time, "sleep", lambda seconds: os.utime(path, times=(1, 1)))
    with pytest.raises(ConfigError, match="pid 3 on node-7"):
        Owner(tmp_path).take()


def test_an_owner_on_another_machine_that_gives_none_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(owner.time, "sleep", waited.append)
    elsewhere(tmp_path)
    held = Owner(tmp_path)
    held.take()
    held.leave()
    elsewhere(tmp_path, end="told to stop")  # it said so
    Owner(tmp_path).take()
    assert len(waited) == 1


def test_the_lock_of_a_machine_that_is_gone_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, waited = Owner(tmp_path), Owner(tmp_path), list[float]()
    first.take()
    elsewhere(tmp_path)

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:  # the file server lets go
            first._let_go()

    monkeypatch.setattr(owner.time, "sleep", sleep)
    second.take()
    assert len(waited) == 3
    waited[:] = [0] * 3
    with pytest.raises(ConfigError, match=r"no sign for 120 s; if it is gone, its lock outlives it: remove \S+/\.lock"):
        first.take()


def test_a_file_system_without_locks_leaves_nothing_that_outlives_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    Owner(tmp_path).take()  # and is killed
    Owner(tmp_path).take()
