"""What killed jobs leave in shared memory: told from what a living one uses, removed, or named with what to do."""

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from afd_scale.config import RunConfig
from afd_scale.data.check import check_dataset
from afd_scale.data.leftovers import blocks, lock_files, remove_dead, remove_dead_locks, unusable
from tests.distributed.processes import environment
from tests.toy_datasets import make_procedural_shards

CLAIM = (4 + len(b"/data\x000")).to_bytes(4, "little") + b"/data\x000"


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    folder = tmp_path / "shm"
    folder.mkdir()
    return folder


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    for number in ("000000", "000001", "000002"):
        (folder / f"{number}_barrier_filelock").touch()
        (folder / f"{number}_cache_filelock").touch()
    (folder / "000000_mine.txt").touch()
    return folder


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_a_block_that_a_process_has_open_is_in_use_and_stays(memory: Path) -> None:
    for name in ("000000_locals", "000000_resume", "1234567_barrier"):
        (memory / name).write_bytes(b"x")
    with (memory / "000000_locals").open("r+b"):
        assert {found.path.name: found.use for found in blocks(memory)} == {
            "000000_locals": "used", "000000_resume": "dead", "1234567_barrier": "dead",
        }  # fmt: skip
        assert names(remove_dead(memory)) == ["000000_resume", "1234567_barrier"]
        assert os.listdir(memory) == ["000000_locals"]
    assert names(remove_dead(memory)) == ["000000_locals"]


def test_a_block_that_another_process_has_mapped_is_in_use(memory: Path) -> None:
    block = memory / "000003_shard_states"
    block.write_bytes(b"x" * 16)
    code = ("import mmap, os, sys\nf = os.open(sys.argv[1], os.O_RDWR)\nm = mmap.mmap(f, 16)\nos.close(f)\n"
            "print('mapped', flush=True)\nsys.stdin.read()")  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", code, block], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "mapped\n"
        assert [found.use for found in blocks(memory)] == ["used"]
        assert remove_dead(memory) == []
        job.kill()
    assert [found.use for found in blocks(memory)] == ["dead"]


def test_what_is_not_streaming_s_is_left_alone(memory: Path) -> None:
    for name in ("nccl-x", "00000_locals", "000000_locals.txt", "000000_unknown", "x000000_locals"):
        (memory / name).touch()
    (memory / "000000_barrier").symlink_to(memory / "nccl-x")
    assert blocks(memory) == []
    assert remove_dead(memory) == []
    assert len(os.listdir(memory)) == 6
    assert blocks(memory / "absent") == []


def test_locks_of_a_number_in_use_stay(memory: Path, temporary: Path) -> None:
    (memory / "000001_locals").write_bytes(CLAIM)
    (memory / "000002_locals").write_bytes(CLAIM)
    with (
        (memory / "000001_locals").open("r+b"),
        (temporary / "000000_cache_filelock").open() as held,
    ):
        fcntl.flock(held, fcntl.LOCK_EX)  # of a job whose blocks are in another container's memory
        uses = {found.path.name: found.use for found in lock_files(blocks(memory), temporary)}
        assert [name for name, use in uses.items() if use == "used"] == [
            "000001_barrier_filelock", "000001_cache_filelock",
        ]  # fmt: skip
        assert names(remove_dead_locks(temporary, memory)) == [
            "000000_barrier_filelock", "000002_barrier_filelock", "000002_cache_filelock",
        ]  # fmt: skip
    assert sorted(os.listdir(temporary)) == [
        "000000_cache_filelock", "000000_mine.txt", "000001_barrier_filelock", "000001_cache_filelock",
    ]  # fmt: skip


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_another_user_s_is_told_and_stays(memory: Path, temporary: Path) -> None:
    (memory / "000000_locals").write_bytes(CLAIM)
    (memory / "000000_locals").chmod(0o600)
    for folder in (memory.parent, memory, temporary):
        folder.chmod(0o1777)
    child = os.fork()
    if not child:  # as the other user
        os.chdir(memory.parent)
        os.setuid(12345)
        shm, tmp = Path(memory.name), Path(temporary.name)
        found = blocks(shm)
        uses = {each.use for each in found + lock_files(found, tmp)}
        os._exit(0 if uses == {"another user's"} and remove_dead(shm) == remove_dead_locks(tmp, shm) == [] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(os.listdir(temporary)) == 7


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("000000_locals", b"", r"locals \(0 bytes\) must hold something"),
        ("000000_shard_states", b"", r"shard_states \(0 bytes\) must hold something"),
        ("000004_barrier", b"x" * 8, r"barrier \(8 bytes\) must have 12 bytes"),
        ("000000_locals", b"\xff\xff\xff\x7fgarbage\xff", r"locals \(12 bytes\) must name the folders"),
        ("000000_locals", b"\x0f\0\0\0/data\0many", r"locals \(14 bytes\) must name the folders"),
        ("000000_locals", CLAIM, None),
        ("000000_locals", b"\0\0\0\0" + CLAIM[4:], None),  # released by its job
        ("000000_shard_states", b"x", None),
    ],
)
def test_a_block_that_is_no_good_is_named(memory: Path, name: str, content: bytes, reason: str | None) -> None:
    (memory / name).write_bytes(content)
    found = unusable(memory)
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(reason, found)


IN_ITS_OWN_MEMORY = """
import sys
from pathlib import Path

from afd_scale.config import ConfigError, RunConfig
from afd_scale.data.reader import TeacherStream

config = RunConfig.model_validate_json(sys.argv[1])
shm = Path("/dev/shm")
for name in ("000001_locals", "000000_barrier", "000001_shard_states", "000001_epoch_shape"):
    (shm / name).touch()
claim = str(Path(sys.argv[2])).encode() + b"\\0" + b"0"
(shm / "000000_locals").write_bytes((4 + len(claim)).to_bytes(4, "little") + claim)
with (shm / "000000_locals").open("r+b") as used:  # by a job that claims the same folder of copies
    before = used.read()
    stream = TeacherStream(config)
    next(stream)
    stream.close()
    assert not [block for block in shm.iterdir() if not block.stat().st_size]
    used.seek(0)
    assert used.read() == before, "another job's claim"
with (shm / "000000_locals").open("w"):  # in use, and no good
    try:
        TeacherStream(config)
    except ConfigError as error:
        print(error)
assert (shm / "000000_locals").exists()
"""


def test_a_dataset_opens_beside_leftovers_or_they_are_named(tmp_path: Path) -> None:
    from afd_scale.config.run import ProceduralSource
    from afd_scale.data.storage import teacher_data

    alone = ["unshare", "--mount", "--map-root-user", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$0" "$@"']
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no shared memory of its own to be had")
    make_procedural_shards(ProceduralSource(clips=24), tmp_path / "teacher")
    data = {"shards": f"file://{tmp_path}/teacher", "global_batch": 8, "cache": tmp_path / "cache"}
    config = RunConfig.model_validate({"method": "sft", "data": data})
    check_dataset(config)
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [*alone, sys.executable, "-c", IN_ITS_OWN_MEMORY, config.model_dump_json(), str(teacher_data(config).folder)],
        env=environment(TMPDIR=str(tmp_path / "tmp")), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("/dev/shm/000000_locals (0 bytes) must hold something")
    assert "tools/doctor.py --clean" in line
