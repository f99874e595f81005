"""Signs of life: who is named when ranks are lost, stopped or silent."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from afd_scale.parallel import heartbeats
from afd_scale.parallel.heartbeats import Heart, is_bereavement, living, read_sign, sign_path


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield other
    other.kill()
    other.wait()


@pytest.fixture
def heart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Heart]:
    monkeypatch.setattr(heartbeats, "_LAST_WORDS_SECONDS", 0.5)
    heart = Heart(tmp_path, 0, 3)
    heart.start()
    yield heart
    heart.end()


def sign_of(folder: Path, rank: int, pid: int, silent: float = 0.0, **fields: object) -> None:
    """What another rank has written some time ago."""
    path = sign_path(folder, rank)
    path.write_text(json.dumps(json.loads(sign_path(folder, 0).read_text()) | {"rank": rank, "pid": pid} | fields))
    os.utime(path, times=(time.time() - silent,) * 2)


def test_a_sign_says_where_a_rank_is(heart: Heart, tmp_path: Path) -> None:
    heart.at("train, step 3")
    heart._write()
    sign = read_sign(sign_path(tmp_path, 0))
    assert sign is not None
    assert sign.pid == os.getpid()
    assert sign.at.startswith("train, step 3 for 0 s, in ")


def test_a_dead_rank_is_named_by_the_first_that_is_left(
    heart: Heart, tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    sign_of(tmp_path, 1, process.pid, phase="train, step 7", seconds=4.2)
    process.kill()
    process.wait()
    said, known = heart.lost()
    assert known
    assert f"pid {process.pid}) is gone; its last sign was train, step 7 for 4 s, in" in said
    assert Heart(tmp_path, 2, 3).lost() == ("others are lost; rank 0 says which", True)


def test_a_stopped_rank_is_named(heart: Heart, tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    sign_of(tmp_path, 2, process.pid)
    os.kill(process.pid, signal.SIGSTOP)
    said, known = heart.lost()
    assert known
    assert "rank 2 " in said
    assert "is stopped" in said


def test_who_failed_is_named_and_not_who_mourns(heart: Heart, tmp_path: Path) -> None:
    sign_of(tmp_path, 1, os.getpid(), end="connection closed", bereaved=True)
    sign_of(tmp_path, 2, os.getpid(), end="CUDA out of memory", phase="train, step 9")
    said, known = heart.lost()
    assert known
    assert said.count("rank") == 1
    assert "rank 2 " in said
    assert "failed at train, step 9" in said
    assert "CUDA out of memory" in said


def test_a_rank_of_another_machine_without_a_last_word_is_named_by_the_main_one(heart: Heart, tmp_path: Path) -> None:
    sign_of(tmp_path, 1, 1, host="elsewhere", end="connection closed", bereaved=True)
    sign_of(tmp_path, 2, 1, host="elsewhere", phase="save")
    said, known = heart.lost()
    assert not known, "it may wait for the others still"
    assert said.startswith("rank 2 (elsewhere, pid 1) has no last word; its last sign was save")


def test_nobody_is_named_where_all_mourn(heart: Heart, tmp_path: Path) -> None:
    for rank in (1, 2):
        sign_of(tmp_path, rank, os.getpid(), end="timed out", bereaved=True)
    said, known = heart.lost()
    assert not known
    assert "no rank is known to be lost; " in said


def test_silence_is_told_once_and_so_is_its_end(heart: Heart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the main rank's own clock, whatever that of the other's machine says."""
    now, told = [1000.0], list[str]()
    monkeypatch.setattr(heartbeats.time, "monotonic", lambda: now[0])
    for passed, written in ((0, 500.0), (29, 500.0), (31, 500.0), (33, 500.0), (35, 501.0), (37, 501.0)):
        now[0] = 1000.0 + passed
        sign_of(tmp_path, 1, os.getpid(), phase="save", seconds=2)
        os.utime(sign_path(tmp_path, 1), times=(written, written))
        heart._write()
        heart._look_around(told.append)
    assert len(told) == 2
    assert "has given no sign for 31 s; its last was save for 2 s" in told[0]
    assert told[1] == "rank 1 gives signs again"


def test_a_sign_that_cannot_be_read_for_a_while_ends_nothing(heart: Heart, tmp_path: Path) -> None:
    told: list[str] = []
    sign_of(tmp_path, 1, os.getpid(), silent=31.0)
    heart._look_around(told.append)
    own = sign_path(tmp_path, 0).read_text()
    for rank in (1, 0):
        sign_path(tmp_path, rank).write_text("")
        heart._look_around(told.append)
    sign_path(tmp_path, 0).write_text(own)
    assert not told


def test_a_thousand_ranks_spare_the_file_system(heart: Heart, tmp_path: Path) -> None:
    many = Heart(tmp_path, 900, 1000, machine=range(896, 904))
    assert (Heart(tmp_path, 0, 1000).beat_seconds, many.beat_seconds) == (5.0, 10.0)
    for rank in (1, 897):
        sign_of(tmp_path, rank, os.getpid())
    assert list(many._read()) == [897]


def test_a_rank_at_a_place_of_its_own_comes_first(heart: Heart, tmp_path: Path) -> None:
    heart.at("evaluate")
    heart._write()
    sign_of(tmp_path, 1, os.getpid())
    sign_of(tmp_path, 2, os.getpid(), phase="train, step 2")
    assert heart.places().startswith("rank 2 at train, step 2")
    assert "ranks 0, 1 at evaluate" in heart.places()


def test_a_damaged_sign_is_none(tmp_path: Path) -> None:
    for text in ("", "{", "[1]", '{"rank": "x"}', "[" * 100_000):
        (tmp_path / "sign").write_text(text)
        assert read_sign(tmp_path / "sign") is None


def test_a_full_disk_does_not_hide_why_a_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def run() -> None:
        with living(tmp_path, 0, 1):
            monkeypatch.setattr(Path, "write_text", write)
            raise ValueError("three saves have failed")

    with pytest.raises(ValueError, match="three saves"):
        run()


def test_a_good_end_leaves_nothing(tmp_path: Path) -> None:
    heart = Heart(tmp_path, 0, 1)
    heart.start()
    heart.end()
    assert not list(tmp_path.iterdir())


def test_what_says_that_others_are_lost() -> None:
    assert is_bereavement(RuntimeError("[../third_party/gloo/transport/tcp/pair.cc] Connection closed by peer"))
    assert not is_bereavement(RuntimeError("CUDA out of memory"))
    assert not is_bereavement(RuntimeError("s3://shards/index.json: Connection reset by peer"))  # its own trouble
    assert not is_bereavement(ValueError("gloo/"))
