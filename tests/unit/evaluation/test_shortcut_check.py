"""tools/inspect_shards.py --against: a dataset's videos against a folder's and against a run's base."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from afd_scale.codecs.codec import VideoForm
from afd_scale.codecs.identity import IdentityCodec
from afd_scale.config import RunConfig
from afd_scale.config.run import ProceduralSource
from afd_scale.data.worlds.drop import ToyPrompt, render_clips
from afd_scale.evaluation.kept_clips import write_clips
from afd_scale.evaluation.run_clips import BASE, RunClips
from afd_scale.evaluation.video import write_mp4
from afd_scale.parallel.ranks import Ranks
from afd_scale.training.evaluator import Evaluator
from afd_scale.training.run_folder import write_config
from tests.students import TOY, save_student
from tests.tools import Done, call_tool
from tests.toy_datasets import make_procedural_shards
from tests.toy_evaluation import make_policy
from tests.videos import moving_bar, write_video
from tests.wan_models import save_tiny_wan

# streaming 0.13 opens shards that it unpacks and lets the garbage collector close them.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

CLIPS = 40
PROMPTS = ToyPrompt.every()[::2]
SPECKLE = np.pad(np.full((2, 2), 200, np.uint8), ((1, 13), (13, 1)))


def against(dataset: Path, other: Path, *more: str) -> Done:
    return call_tool("inspect_shards", dataset, "--against", other, *more)


def found_against(dataset: Path, other: Path, *more: str) -> dict[str, Any]:
    done = against(dataset, other, "--json", *more)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["against"]
    return found


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    return {finding["name"]: finding["verdict"] for finding in found["findings"]}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "teacher"
    make_procedural_shards(ProceduralSource(clips=96, seed=1), folder)
    return folder


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same teacher's videos of other seeds, with a bright spot at the upper right."""
    folder = tmp_path_factory.mktemp("videos") / "marked"
    for number, (prompt, clip) in enumerate(zip(PROMPTS, render_clips(PROMPTS, seed=5), strict=True)):
        write_mp4(np.maximum(clip, SPECKLE), folder / f"{number}.mp4", 8, title=prompt.sentence)
    return folder


def test_a_folder_of_marked_videos_is_told_apart_by_the_mark(dataset: Path, marked: Path) -> None:
    found = found_against(dataset, marked, "--clips", str(CLIPS))
    assert (found["clips"], found["same_prompts"]) == ([CLIPS, CLIPS], True)
    assert verdicts(found)["watermark"] == "gives away"
    assert verdicts(found)["timing"] == "no"
    remedy = next(finding["remedy"] for finding in found["findings"] if finding["name"] == "watermark")
    assert remedy.startswith("100 % of the other side's clips have a pattern that stands still at rows ")
    assert "(top right)" in remedy
    assert any("compressed files" in note for note in found["notes"])


def test_it_reads_well(dataset: Path, marked: Path) -> None:
    done = against(dataset, marked, "--clips", str(CLIPS))
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert f"{CLIPS} clips of procedural:teacher against {CLIPS} of marked, at 12 frames of 16x16, 8 a second" in lines
    row = next(line for line in lines if line.startswith("watermark "))
    assert row.split()[1:] == ["gives", "away", "100%", "+-", "2%", "up", "to", row.split()[-1]]
    assert sum(line.startswith("watermark: ") for line in lines) == 1


def test_other_forms_are_brought_to_one_and_said(dataset: Path, tmp_path: Path) -> None:
    for number in range(3):
        write_video(tmp_path / f"{number}.mp4", moving_bar(30, 32, 48), 16)
    found = found_against(dataset, tmp_path)
    assert [found["form"][name] for name in ("frames", "height", "width", "fps")] == [12, 16, 16, 8]
    said = found["findings"][0]
    assert (said["name"], said["verdict"]) == ("form", "differs")
    assert "frames 12 against 30, size 16x16 against 32x48, fps 8.0 against 16.0" in said["remedy"]
    assert set(verdicts(found).values()) == {"differs", "cannot tell"}
    assert found["same_prompts"] is False
    assert any("of other prompts" in note for note in found["notes"])


def test_latents_of_wan_are_decoded_with_its_vae(tmp_path: Path) -> None:
    save_tiny_wan(tmp_path / "wan")
    for number in range(2):
        write_video(tmp_path / "videos" / f"{number}.mp4", moving_bar(9, 32, 48, 100 + 50 * number), 8)
        (tmp_path / "videos" / f"{number}.txt").write_text(f"a red ball {number}")
    form = ("--codec", "wan", "--size", "32x48", "--frames", "9", "--fps", "8", "--text-length", "16")
    made = call_tool("make_shards", "--teacher", "folder", "--source", tmp_path / "videos", "--out",
                     tmp_path / "shards", *form, "--models", tmp_path / "wan")  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "models must be given" in against(tmp_path / "shards", tmp_path / "videos").stderr
    found = found_against(tmp_path / "shards", tmp_path / "videos", "--models", str(tmp_path / "wan"))
    assert (found["clips"], found["form"]["colour"]) == ([2, 2], "rgb24")


@pytest.fixture(scope="module")
def alone() -> Iterator[Ranks]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, 0, 1, torch.device("cpu"))
    dist.destroy_process_group()


def run_config(folder: Path, dataset: Path, **evaluation: Any) -> RunConfig:
    config = RunConfig.model_validate({
        "method": "sft", "out": folder, "name": "small", "evaluation": evaluation, "data": {"shards": str(dataset)},
        "student": {"dim": 16, "ffn_dim": 24, "num_heads": 2, "num_layers": 1},
    })  # fmt: skip
    write_config(config, 1)
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, dataset: Path, alone: Ranks) -> Path:
    """What a run leaves after it kept the clips of a student that starts at random."""
    start = tmp_path_factory.mktemp("start")
    config = run_config(tmp_path_factory.mktemp("runs"), dataset, clips=24, batch=12)
    config = config.model_copy(update={"student": config.student.model_copy(update={"weights": start})})
    Evaluator(config, alone, IdentityCodec()).keep_base(make_policy(config))
    assert (config.folder / BASE).is_file()
    return config.folder


def test_a_run_is_told_apart_by_its_bases_clips(dataset: Path, run: Path) -> None:
    found = found_against(dataset, run)
    assert (found["names"], found["clips"]) == (["procedural:teacher", "the base of small"], [24, 24])
    assert (found["same_prompts"], found["notes"]) == (True, [])
    assert verdicts(found)["noise"] == "gives away"
    assert "form" not in verdicts(found)


def test_a_runs_clips_are_of_the_prompts_that_it_was_asked_for(dataset: Path, run: Path, alone: Ranks) -> None:
    config = run_config(run.parent.parent, dataset, clips=24)
    texts = Evaluator(config, alone, IdentityCodec()).prompts.texts
    clips = RunClips(run, 8.0, run, "against")
    assert [clip.prompt for clip in clips.clips] == list(texts[:24])
    loaded = [load() for _, load in clips.loads(clips.clips[3:5], VideoForm(6, 4.0, 16, 16, colour="gray"))]
    whole = [load() for _, load in clips.loads(clips.clips[3:5], clips.form)]
    assert all(np.array_equal(few, frames[::2]) for few, frames in zip(loaded, whole, strict=True))


def test_shown_clips_keep_their_prompts(dataset: Path, tmp_path: Path) -> None:
    config = run_config(tmp_path, dataset)
    write_clips(np.zeros((3, 12, 16, 16), np.uint8), config.folder / BASE, {"clips": "[7, 2, 98]"})
    prompts = RunClips(config.folder, 8.0, tmp_path, "against").clips
    rows = map(json.loads, (dataset / "prompts.jsonl").read_text().splitlines())
    texts = [row["prompt"] for row in sorted(rows, key=lambda row: row["prompt_id"])]
    assert [clip.prompt for clip in prompts] == [texts[7], texts[2], texts[2]]


def test_a_run_whose_data_is_gone_is_read_all_the_same(dataset: Path, tmp_path: Path) -> None:
    config = run_config(tmp_path, tmp_path / "gone")
    frames = render_clips(PROMPTS[:20], seed=3)
    write_clips(frames, config.folder / BASE, {"clips": "range(0, 20)"})
    found = found_against(dataset, config.folder)
    assert found["clips"] == [64, 20]
    assert found["notes"][0].startswith("the prompts of the other side are not known: ")


@pytest.mark.parametrize("what", ["absent", "empty", "kept none", "damaged", "samples", "clips"])
def test_what_cannot_be_held_against_is_one_line(dataset: Path, tmp_path: Path, what: str) -> None:
    other, more = tmp_path / "other", ()
    if what not in ("absent", "clips"):
        other = run_config(tmp_path, dataset).folder
    (tmp_path / "empty").mkdir()
    if what == "empty":
        other = tmp_path / "empty"
    if what == "damaged":
        (other / "samples").mkdir()
        (other / BASE).write_bytes(b"no tensors")
    if what == "samples":
        (other / "checkpoints").mkdir()
        write_mp4(np.zeros((3, 16, 48), np.uint8), other / "samples" / "step_00000001" / "00_a.mp4", 8)
        other = other / "samples"
    if what == "clips":
        other, more = tmp_path / "empty", ("--clips", "0")
    done = against(dataset, other, *more)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    said = {"absent": "there is none", "empty": "must hold videos", "kept none": "tools/generate.py",
            "damaged": "must be clips that a run kept", "samples": "of one side", "clips": "clips (0)"}  # fmt: skip
    assert said[what] in done.stderr


def test_an_export_is_no_folder_of_videos(dataset: Path, tmp_path: Path) -> None:
    save_student(tmp_path / "export", TOY)
    done = against(dataset, tmp_path / "export")
    assert done.returncode == 2
    assert "must hold videos" in done.stderr


def test_a_dataset_without_videos_is_one_line(tmp_path: Path, marked: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a ball\n")
    made = call_tool("make_shards", "--teacher", "none", "--prompts", prompts, "--out", tmp_path / "out", "--codec",
                     "identity", "--size", "16x16", "--frames", "12", "--fps", "8")  # fmt: skip
    assert made.returncode == 0, made.stderr
    done = against(tmp_path / "out", marked)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "prompts alone" in done.stderr
