"""AFD that is given the start of the teacher's clips, a first chunk of another length, on real ranks: a resumed run
goes on exactly, ranks that share a video do as those that do not, and what is made of the run begins as the teacher's
clips do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from afd_scale.codecs.codec import VideoForm
from afd_scale.data.storage import Location
from afd_scale.data.video import read_video
from afd_scale.evaluation.clip_sets import FolderClips, ShardClips
from tests.distributed.processes import ROOT, on_ranks
from tests.distributed.small_run import check_resuming, without_machine, write_small_run
from tests.tools import call_tool

TRAIN = ROOT / "launch" / "train.py"
STEPS = 3
START = ("data.start_frames=1", "sampler.first_chunk_frames=1", "sampler.chunk_frames=3",
         "sampler.timesteps=[1000, 500]", "train.micro_batch=1", "train.diagnose_every=2",
         "evaluation.diagnosed_prompts=2", "evaluation.diagnosed_rollouts=2")  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_run(tmp_path_factory.mktemp("start"), STEPS)


def lines(config: Path, name: str) -> list[dict[str, Any]]:
    text = (config.parent / "runs" / name / "metrics.jsonl").read_text()
    return [without_machine(json.loads(line)) for line in text.splitlines()]


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    """That was trained on two ranks, and resumed."""
    options = ("--config", config, *START, "train.save_every=1", "train.keep_checkpoints=3", "name=two")
    check_resuming(config.parent / "runs" / "two", STEPS, *options)
    return config.parent / "runs" / "two"


def test_ranks_that_share_a_video_change_nothing(config: Path, run: Path) -> None:
    result = on_ranks(2, TRAIN, "--config", config, *START, "name=shared", "parallel.sequence=2")
    assert result.returncode == 0, result.stderr[-3000:]
    for one, other in zip(lines(config, run.name), lines(config, "shared"), strict=True):
        for name in one.keys() & other.keys():
            if "student/" in name or name in ("discriminator/loss", "rollout/diversity"):
                assert one[name] == pytest.approx(other[name], abs=1e-3), (one["step"], name)


@pytest.mark.parametrize("teacher", ["shards", "folder"])
def test_what_is_evaluated_begins_as_the_teachers(config: Path, run: Path, tmp_path: Path, teacher: str) -> None:
    shards = config.parent / "shards"
    clips: Any = ShardClips(Location(str(shards), tmp_path, "teacher"), None)
    source = shards
    if teacher == "folder":
        source = tmp_path / "made"
        done = call_tool("generate", run, "--dataset", shards, "--max-prompts", 3, "--out", source)
        assert done.returncode == 0, done.stderr
        clips = FolderClips(source, "teacher")
    done = call_tool("evaluate", run, "--teacher", source, "--clips", 3, "--out", tmp_path / "out", "--seed", 7)
    assert done.returncode == 0, done.stderr
    form = VideoForm(12, 8.0, 16, 16, colour="gray")
    of_prompt = {clip.prompt: load() for clip, load in clips.loads(clips.clips, form)}
    videos = FolderClips(tmp_path / "out" / "videos", "source").clips
    assert len(videos) == 3
    for clip in videos:
        made, wanted = (
            frames.astype(int)
            for frames in (read_video(tmp_path / "out" / "videos" / clip.video, form), of_prompt[clip.prompt])
        )
        assert np.abs(made[:3] - wanted[:3]).mean() < 8
        assert np.abs(made[3:] - wanted[3:]).mean() > 8


def test_a_student_that_is_given_no_start_says_so(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    done = call_tool("generate", run, "--prompt", "a dim small ball moves leftward slowly under gentle gravity over a "
                     "clay floor", "--out", tmp_path / "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "was trained to go on from the start of a video, latent frames: 1; it is given none" in caplog.text
