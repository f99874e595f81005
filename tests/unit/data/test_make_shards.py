"""From a folder of real video files to shards: what is kept, what is rejected, and what a killed job leaves."""

import json
import math
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from afd_scale.codecs.codec import VideoForm
from afd_scale.codecs.identity import IdentityCodec
from afd_scale.codecs.wan import WanCodec
from afd_scale.config import ConfigError
from afd_scale.data.check import check_files
from afd_scale.data.clips import Clip, Frames
from afd_scale.data.make_shards import ShardJob, encode_frames, make_shards
from afd_scale.data.reader import distinct_prompts
from afd_scale.data.schema import DatasetFacts
from afd_scale.data.storage import Location
from afd_scale.data.teachers.folder import FolderTeacher
from afd_scale.data.video import read_video
from tests.distributed.processes import forking, on_ranks, run
from tests.tools import call_tool
from tests.toy_datasets import read_videos
from tests.videos import moving_bar, write_video
from tests.wan_models import save_tiny_wan

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "make_shards.py"
FORM = VideoForm(frames=12, fps=8.0, height=32, width=32, colour="gray")
FLAGS = ("--codec", "identity", "--size", "32x32", "--frames", "12", "--fps", "8")
SHAPES = ((48, 64, 8), (64, 80, 12), (90, 120, 24), (32, 32, 30))  # height, width, fps
BROKEN = {"v03.mp4": "must be a readable video", "v07.mp4": "must be", "v11.mp4": "must last 1.5 s"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 videos of 4 sizes and frame rates, 3 of them broken."""
    folder = tmp_path_factory.mktemp("videos")
    rows = []
    for number in range(20):
        height, width, rate = SHAPES[number % 4]
        path = write_video(folder / f"v{number:02d}.mp4", moving_bar(2 * rate, height, width, 100 + 5 * number), rate)
        rows.append({"video": path.name, "prompt": f"bar number {number // 2}"})
    (folder / "v03.mp4").write_bytes(b"<html>no video</html>")
    whole = (folder / "v07.mp4").read_bytes()
    (folder / "v07.mp4").write_bytes(whole[: len(whole) // 2])
    write_video(folder / "v11.mp4", moving_bar(10, 32, 32), 8)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def folder_of(source: Path) -> tuple[str, ...]:
    return ("--teacher", "folder", "--source", str(source), "--prompts", str(source / "prompts.jsonl"))


def job(source: Path, out: Path, **settings: Any) -> ShardJob:
    teacher = FolderTeacher(source, source / "prompts.jsonl")
    teacher.clips_at_once = settings.pop("clips_at_once", 4)
    return ShardJob(teacher, IdentityCodec.of_form(FORM), FORM, out, **settings)


def location(out: Path) -> Location:
    return Location(str(out), out.parent / "cache", "out")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".mds"}


def rejects(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    return {line["video"]: line["reason"] for line in lines}


def test_folder_with_broken_videos(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), *folder_of(source), "--out", str(tmp_path / "out"), *FLAGS]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "17 clips" in done.stdout
    found = rejects(tmp_path / "out")
    assert found.keys() == BROKEN.keys()
    for video, reason in BROKEN.items():
        assert found[video].startswith(reason), found[video]
    assert check_files(location(tmp_path / "out")).num_samples == 17
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"


def test_samples_are_the_videos_in_their_order(source: Path, tmp_path: Path) -> None:
    facts = make_shards(job(source, tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("shard.*"))) == 5
    check_files(location(tmp_path / "out"))
    videos = read_videos(location(tmp_path / "out"), range(facts.num_samples), 16)
    codec = IdentityCodec.of_form(FORM)
    kept = [number for number in range(20) if f"v{number:02d}.mp4" not in BROKEN]
    for row, number in enumerate(kept):
        assert videos.prompts.texts[row] == f"bar number {number // 2}"
        expected = encode_frames(codec, read_video(source / f"v{number:02d}.mp4", FORM))
        np.testing.assert_array_equal(videos.latents[row].numpy(), expected.astype(np.float32))
    assert videos.prompts.ids[0] == videos.prompts.ids[1], "two videos of one prompt"
    assert len(distinct_prompts(location(tmp_path / "out"), 16)) == 10


def test_a_finished_job_is_left_alone_and_another_is_refused(source: Path, tmp_path: Path) -> None:
    first = make_shards(job(source, tmp_path / "out"))
    before = content(tmp_path / "out")
    assert make_shards(job(source, tmp_path / "out")) == first
    assert content(tmp_path / "out") == before
    other = ShardJob(
        FolderTeacher(source, source / "prompts.jsonl"), IdentityCodec.of_form(FORM),
        VideoForm(12, 8.0, 32, 32, "pad", "gray"), tmp_path / "out",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="must not exist yet"):
        make_shards(other)


def test_killed_at_any_moment_and_started_again_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    make_shards(job(source, tmp_path / "whole"))
    code = """
import sys, time
from pathlib import Path
from tests.unit.data import test_make_shards as tests
from afd_scale.torchvision_ops import define_torchvision_ops
define_torchvision_ops()
import streaming
slow = tests.job(Path(sys.argv[1]), Path(sys.argv[2]))
read = slow.teacher.frames
def frames(clip, form):
    time.sleep(0.3)
    return read(clip, form)
slow.teacher.frames = frames
print("begin", flush=True)
tests.make_shards(slow)
"""
    out, moments = tmp_path / "out", random.Random(3)
    records = out.with_name(".out.records")
    for parts in (0, 1, 2):  # that are finished when it is killed, at least
        with forking("-c", code, source, out) as (process, printed):
            assert printed.readline() == b"begin\n"
            deadline = time.monotonic() + 60
            while len(list(records.glob("part.*.json"))) < parts:
                assert time.monotonic() < deadline, "no part is finished"
                time.sleep(0.01)
            time.sleep(moments.uniform(0.0, 0.5))
            process.kill()
        with pytest.raises(ConfigError):
            DatasetFacts.load(out, "out")
    make_shards(job(source, out))
    assert content(out) == content(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "whole", "cache", ".out.lock"}


def test_several_processes_write_the_same_bytes(source: Path, tmp_path: Path) -> None:
    make_shards(job(source, tmp_path / "whole", clips_at_once=64))
    done = on_ranks(2, TOOL, *folder_of(source), "--out", tmp_path / "out", *FLAGS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("17 clips") == 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_too_many_rejects_stop_the_job_and_a_higher_limit_goes_on(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_rejects \(1\) must be at least 2, .*v07\.mp4: must be"):
        make_shards(job(source, tmp_path / "out", max_rejects=1))
    assert not (tmp_path / "out").exists()
    done = sorted(path.name for path in (tmp_path / ".out.records").glob("part.*"))
    assert done == ["part.00000.json", "part.00001.json"]
    assert make_shards(job(source, tmp_path / "out", max_rejects=3)).num_samples == 17


def test_job_begun_otherwise_is_not_gone_on_with(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        make_shards(job(source, tmp_path / "out", max_rejects=0))
    with pytest.raises(ConfigError, match="must be finished as it was begun: compression differ; delete"):
        make_shards(job(source, tmp_path / "out", compression="none"))


def test_a_finished_dataset_is_no_other_jobs(source: Path, tmp_path: Path) -> None:
    """Same folder name, form and codec, other clips; then other models."""
    make_shards(job(source, tmp_path / "out"))
    rows = (source / "prompts.jsonl").read_text().splitlines()
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("\n".join(rows[:4]))
    with pytest.raises(ConfigError, match="must not exist yet"):
        make_shards(ShardJob(FolderTeacher(source, fewer), IdentityCodec.of_form(FORM), FORM, tmp_path / "out"))
    form = VideoForm(9, 8.0, 32, 48)
    for seed in (0, 1):
        save_tiny_wan(tmp_path / str(seed) / "wan", seed=seed)
    first, second = (WanCodec(tmp_path / str(seed) / "wan") for seed in (0, 1))
    make_shards(ShardJob(FolderTeacher(source, fewer), first, form, tmp_path / "wan"))
    make_shards(ShardJob(FolderTeacher(source, fewer), first, form, tmp_path / "wan"))
    with pytest.raises(ConfigError, match="must not exist yet"):
        make_shards(ShardJob(FolderTeacher(source, fewer), second, form, tmp_path / "wan"))


def test_what_has_changed_since_a_job_was_stopped_is_made_again(source: Path, tmp_path: Path) -> None:
    """A repaired video, a row that is gone and a changed prompt: the bytes are those of a job never interrupted."""
    videos = tmp_path / "videos"
    shutil.copytree(source, videos)
    with pytest.raises(ConfigError, match="max_rejects"):
        make_shards(job(videos, tmp_path / "out", max_rejects=2))
    assert len(list((tmp_path / ".out.records").glob("part.*"))) == 3
    write_video(videos / "v03.mp4", moving_bar(24, 48, 64), 8)
    rows = [json.loads(line) for line in (videos / "prompts.jsonl").read_text().splitlines()]
    rows[5] |= {"prompt": "another bar"}
    (videos / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:11]))
    make_shards(job(videos, tmp_path / "out", max_rejects=2))
    make_shards(job(videos, tmp_path / "whole"))
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert rejects(tmp_path / "out").keys() == {"v07.mp4"}


def test_an_error_of_one_process_ends_all(source: Path, tmp_path: Path) -> None:
    """The second of two processes meets a disk that is full."""
    code = """
import os, sys
from tests.tools import load_tool
tool = load_tool("make_shards")
if os.environ["RANK"] == "1":
    import afd_scale.data.make_shards as jobs
    def refuse(*arguments):
        raise OSError(28, "No space left on device")
    jobs.write_shard = refuse
tool.FolderTeacher.clips_at_once = 2
sys.exit(tool.main(sys.argv[1:]))
"""
    (tmp_path / "run.py").write_text(code)
    command = (tmp_path / "run.py", *folder_of(source), "--out", tmp_path / "out", *FLAGS)
    done = on_ranks(2, *command, timeout=120)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: out ({tmp_path / 'out'}) must have room: No space left on device")
    assert len(list((tmp_path / ".out.records").glob("part.*"))) == 1, "the first heard of it after its first part"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "s3://bucket/x"], "out (s3:/bucket/x) must be a local folder"),
        (["--text-length", "0"], "argument --text-length: (0) must be at least 1"),
        (["--text-length", "-3"], "argument --text-length: (-3) must be at least 1"),
        (["--teacher", "http", "--url", "teacher:8000"], "url (teacher:8000) must be one such as"),
        (["--teacher", "http", "--url", "http://me:pw@host/v1"], "url (of host) must hold no user and no password"),
        (["--teacher", "http", "--request", "day=!!set {1}"], "request (day=!!set {1}) must have a value as JSON"),
        (["--teacher", "http", "--attempts", "0"], "argument --attempts: (0) must be at least 1"),
    ],
)
def test_bad_flags_are_one_line(source: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    http = ("--url", "http://127.0.0.1:9/v1", "--model", "m")
    done = call_tool("make_shards", *folder_of(source), "--out", tmp_path / "out", *FLAGS, *http, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_nothing_usable(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_text("a ball")
    nothing = ShardJob(FolderTeacher(tmp_path, None), IdentityCodec.of_form(FORM), FORM, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"must have a clip that can be used: all 1 were rejected, the first, a\.mp4"):
        make_shards(nothing)


def test_rows_that_lead_nowhere_are_rejected(source: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.csv"
    long = " ".join(str(word) for word in range(17))
    prompts.write_text(f"video,prompt\nv00.mp4,a bar\nabsent.mp4,b\n../x.mp4,c\n,d\nv01.mp4,{long}\nv00.mp4,e\n")
    teacher = FolderTeacher(source, prompts)
    make_shards(ShardJob(teacher, IdentityCodec.of_form(FORM), FORM, tmp_path / "out"))
    reasons = list(rejects(tmp_path / "out").values())
    expected = ("must be a readable file", "video must lie below", "video must be given", "prompt must have at",
                "video must occur once")  # fmt: skip
    assert len(reasons) == 5
    for reason in expected:
        assert any(found.startswith(reason) for found in reasons), reason


def test_latents_that_are_not_finite_are_rejected(source: Path, tmp_path: Path) -> None:
    class Sick(IdentityCodec):
        def encode(self, pixels: Tensor) -> Tensor:
            latents = super().encode(pixels)
            if pixels.max() > 0.5:
                latents[0, 0, 0, 0, 0] = math.nan
            return latents

    make_shards(ShardJob(job(source, tmp_path / "out").teacher, Sick(), FORM, tmp_path / "out"))
    sick = [reason for reason in rejects(tmp_path / "out").values() if reason.startswith("latents must be finite")]
    assert sick
    assert len(sick) < 17


def test_full_disk(source: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the full disk: the kernel refuses the write in the same way."""
    code = """
import resource, sys
from pathlib import Path
from tests.unit.data import test_make_shards as tests
limited = tests.job(Path(sys.argv[1]), Path(sys.argv[2]), compression="none")
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    tests.make_shards(limited)
except tests.ConfigError as error:
    sys.exit(str(error))
"""
    out = tmp_path / "out"
    done = run(sys.executable, "-c", code, source, out)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"out ({out}) must have room: File too large")
    assert not out.exists()
    assert make_shards(job(source, out, compression="none")).num_samples == 17


def test_one_job_at_a_time(source: Path, tmp_path: Path) -> None:
    inner: list[str] = []

    class Nested(FolderTeacher):
        def frames(self, clip: Clip, form: VideoForm) -> Frames:
            if not inner:
                with pytest.raises(ConfigError, match="one job at a time") as caught:
                    make_shards(job(source, tmp_path / "out"))
                inner.append(str(caught.value))
            return super().frames(clip, form)

    teacher = Nested(source, source / "prompts.jsonl")
    make_shards(ShardJob(teacher, IdentityCodec.of_form(FORM), FORM, tmp_path / "out", decoders=1))
    assert inner


def test_prompts_alone_keep_their_splits(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"ball {n}", "split": split} for n, split in enumerate(("seen", "seen", "unseen", "longer"))]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0], {"prompt": ""}]))
    done = call_tool("make_shards", "--teacher", "none", "--prompts", prompts, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "4 prompts" in done.stdout
    assert len(rejects(tmp_path / "out")) == 2
    where = location(tmp_path / "out")
    check_files(where)
    seen = distinct_prompts(where, 16, "seen")
    assert sorted(seen.texts) == ["ball 0", "ball 1"]
    assert seen.embeddings.shape == (2, 16, 32)
    assert seen.embeddings[:, :2].abs().sum() == 2 * 2 * 32, "two words each"
    assert len(distinct_prompts(where, 16)) == 4
    with pytest.raises(ConfigError, match=r"evaluation\.split \(other\) must be one of \['longer', 'seen', 'unseen'\]"):
        distinct_prompts(where, 16, "other")


def test_videos_keep_the_splits_of_their_prompts(source: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (source / "prompts.jsonl").read_text().splitlines()]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({**row, "split": "seen"} if n < 4 else row) + "\n" for n, row in enumerate(rows))
    )
    teacher = FolderTeacher(source, prompts)
    make_shards(ShardJob(teacher, IdentityCodec.of_form(FORM), FORM, tmp_path / "out"))
    check_files(location(tmp_path / "out"))
    assert sorted(distinct_prompts(location(tmp_path / "out"), 16, "seen").texts) == ["bar number 0", "bar number 1"]


def test_wan_codec_from_end_to_end(source: Path, tmp_path: Path) -> None:
    save_tiny_wan(tmp_path / "wan")
    out = tmp_path / "out"
    form = ("--size", "32x48", "--frames", "9", "--fps", "8")
    done = call_tool(
        "make_shards", *folder_of(source), "--out", out, "--codec", "wan", "--models", tmp_path / "wan", *form
    )
    assert done.returncode == 0, done.stderr
    facts = check_files(location(out))
    codec = WanCodec(tmp_path / "wan")
    form = VideoForm(9, 8.0, 32, 48)
    assert facts.latent_shape == codec.latent_shape(form)
    assert facts.text_shape == codec.text_shape
    video = read_videos(location(out), [0], facts.text_shape[0])
    (text,), embedding = video.prompts.embeddings, codec.embed("bar number 0")
    np.testing.assert_array_equal(text[: len(embedding)].numpy(), embedding.astype(np.float32))
    assert not text[len(embedding) :].any()
    expected = encode_frames(codec, read_video(source / "v00.mp4", form))
    np.testing.assert_allclose(video.latents[0].numpy(), expected.astype(np.float32), atol=2e-3)


def test_wan_codec_takes_1_plus_4k_frames(source: Path, tmp_path: Path) -> None:
    save_tiny_wan(tmp_path / "wan")
    arguments = (*FLAGS, "--codec", "wan", "--models", tmp_path / "wan")
    done = call_tool("make_shards", *folder_of(source), "--out", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: frames (12) must be 1 + a multiple of 4")
    assert not list(tmp_path.glob("*out*"))
