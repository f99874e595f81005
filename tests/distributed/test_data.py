"""Whole runs on data from elsewhere: shards on S3, a folder of mp4, prompts without videos."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from afd_scale.benchmarks.object_storage import object_storage, upload
from afd_scale.config import load_config
from afd_scale.data.check import check_files, ensure_dataset
from afd_scale.data.storage import Location
from afd_scale.data.teachers.procedural import ProceduralTeacher
from tests.distributed.processes import ROOT, on_ranks, run, torchrun
from tests.distributed.small_run import CLIPS, write_small_run
from tests.toy_datasets import read_videos
from tests.videos import write_video

TRAIN, MAKE_SHARDS = ROOT / "launch" / "train.py", ROOT / "tools" / "make_shards.py"
STEPS = 3
OF_THE_MACHINE = {"system/step_seconds", "system/data_wait_share", "time"}


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    """What the steps behind the warm-up log."""
    lines = (json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines())
    lines = (line for line in lines if line["step"] > 0)
    return [{name: value for name, value in line.items() if name not in OF_THE_MACHINE} for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With afd.yaml and its dataset."""
    folder = tmp_path_factory.mktemp("runs")
    ensure_dataset(load_config(write_small_run(folder, STEPS)).data)
    return folder


@pytest.fixture(scope="module")
def embedded(folder: Path) -> list[dict[str, Any]]:
    """What the run logs on the shards that it renders."""
    done = run(sys.executable, TRAIN, "--config", folder / "afd.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(folder / "runs" / "afd")


def test_shards_on_s3(folder: Path, embedded: list[dict[str, Any]]) -> None:
    with object_storage() as environment:
        url = upload(environment, folder / "shards", "toy")
        done = run(sys.executable, TRAIN, "--config", folder / "afd.yaml", "name=s3", f"data.shards={url}",
                   **environment)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics(folder / "runs" / "s3") == embedded


def test_teacher_that_is_a_folder_of_mp4(folder: Path, embedded: list[dict[str, Any]]) -> None:
    source = load_config(folder / "afd.yaml").data.source
    assert source is not None
    teacher, rows = ProceduralTeacher(source), []
    for clip in teacher.clips():
        path = write_video(
            folder / "videos" / f"{clip.video}.mp4", teacher.frames(clip, teacher.form)[..., 0], pix_fmt="gray"
        )
        rows.append({"video": path.name, "prompt": clip.prompt, "prompt_id": clip.prompt_id})
    prompts = folder / "videos" / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    form = ("--codec", "identity", "--size", "16x16", "--frames", "12", "--fps", "8")
    shards = folder / "from_mp4"
    done = run(sys.executable, MAKE_SHARDS, "--teacher", "folder", "--source", folder / "videos",
               "--prompts", prompts, "--out", shards, *form)  # fmt: skip
    assert done.returncode == 0, done.stderr
    locations = [Location(str(data), folder / "cache", "shards") for data in (folder / "shards", shards)]
    for location in locations:
        check_files(location)
    rendered, decoded = (read_videos(location, range(CLIPS), 16) for location in locations)
    assert rendered.latents.equal(decoded.latents)
    assert rendered.prompts.embeddings.equal(decoded.prompts.embeddings)
    overrides = (f"data.shards={shards}", "data.source=null", "name=mp4")
    done = run(sys.executable, TRAIN, "--config", folder / "afd.yaml", *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    found = metrics(folder / "runs" / "mp4")
    assert [line["step"] for line in found] == [line["step"] for line in embedded]
    # The same samples from other shards are shuffled otherwise.
    assert found[0]["student/loss"] == pytest.approx(embedded[0]["student/loss"], rel=0.1)


def test_prompts_without_videos_are_rolled_out_too(folder: Path, embedded: list[dict[str, Any]]) -> None:
    prompts = folder / "more.jsonl"
    rows = (folder / "shards" / "prompts.jsonl").read_text().splitlines()
    listed = [{"prompt": json.loads(row)["prompt"], "split": "even" if n % 2 else "odd"} for n, row in enumerate(rows)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in listed))
    shards = folder / "more"
    done = run(sys.executable, MAKE_SHARDS, "--teacher", "none", "--prompts", prompts, "--out", shards)
    assert done.returncode == 0, done.stderr
    overrides = (f"data.prompts={shards}", "data.prompts_per_step=2", "name=more", "train.save_every=1",
                 f"evaluation.prompts={shards}", "evaluation.split=even")  # fmt: skip
    command = (TRAIN, "--config", folder / "afd.yaml", *overrides)
    done = on_ranks(2, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    found, run_folder = metrics(folder / "runs" / "more"), folder / "runs" / "more"
    assert len(found) == STEPS
    difference = abs(found[0]["student/loss"] - embedded[0]["student/loss"])
    assert difference > 1e-4, "they take part in the student's update"
    last = run_folder / "checkpoints" / f"step_{STEPS:08d}"
    state = json.loads((last / "state.json").read_text())
    assert state["data"]["extra_prompts"]["step_in_epoch"] == STEPS + 2, "warm-up draws two"
    shutil.rmtree(last)
    (run_folder / "summary.json").unlink()
    done = run(sys.executable, *command)  # resumed on one rank
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(metrics(run_folder), found, strict=True):
        assert one["student/loss"] == pytest.approx(two["student/loss"], abs=1e-4)
    bad = run(sys.executable, *command, "evaluation.split=none", "name=bad")
    assert bad.returncode == 2
    assert "evaluation.split (none) must be one of ['even', 'odd']" in bad.stderr


def test_remote_shard_that_is_damaged_ends_the_run_in_one_line(folder: Path) -> None:
    damaged = folder / "damaged"
    shutil.copytree(folder / "shards", damaged)
    for shard in damaged.glob("shard.*.mds"):
        shard.unlink()
    (shard,) = damaged.glob("shard.*.zstd")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    overrides = (f"data.shards=file://{damaged}", "evaluation.metrics=none", "name=lost")
    command = (TRAIN, "--config", folder / "afd.yaml", *overrides)
    alone, pair = run(sys.executable, *command), torchrun(2, *command)
    assert (alone.returncode, pair.returncode) == (2, 1), "torchrun makes its own code"
    for done in (alone, pair):  # a rank that meets it says so; one that is stopped before, that
        (line,) = {line for line in done.stderr.splitlines() if line.startswith("error: ") and ": rank" not in line}
        assert line.startswith(f"error: data.shards (file://{damaged}) must have its shard shard.00000.mds as it was")
    assert "Traceback" not in alone.stderr
