"""tools/evaluate.py from videos to its page, and what it refuses."""

import errno
import json
import resource
import sys

import numpy as np
import pytest

from afd_scale.config.run import ProceduralSource
from afd_scale.data.worlds.drop import ToyPrompt, render_clips
from afd_scale.evaluation.video import write_mp4
from afd_scale.generation import evaluation_job
from tests.judges import save_tiny_judge
from tests.students import TOY, save_student
from tests.tools import call_tool
from tests.toy_datasets import make_procedural_shards
from tests.videos import moving_bar, write_video
from tests.wan_models import save_tiny_wan

PROMPTS = ToyPrompt.every()[::11]


def toy_videos(folder, physics, table=False, split=None):
    """A folder of the toy world's clips, with prompts in the titles or in a table."""
    for number, (prompt, clip) in enumerate(zip(PROMPTS, render_clips(PROMPTS, seed=3, physics=physics), strict=True)):
        write_mp4(clip, folder / f"{number}.mp4", 8, title="" if table else prompt.sentence)
    if table:
        rows = [
            {"video": f"{number}.mp4", "prompt": prompt.sentence, "split": split and getattr(prompt, split)}
            for number, prompt in enumerate(PROMPTS)
        ]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluate(source, teacher, out, *more):
    return call_tool("evaluate", source, "--teacher", teacher, "--out", out, "--workers", "1", *more)


def refused(done, out):
    """Its one line; nothing is left."""
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not out.exists()
    assert not [path for path in out.parent.glob(".*") if out.name in path.name]
    return done.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return toy_videos(folder / "student", "wrong"), toy_videos(folder / "teacher", "teacher", table=True, split="speed")


def test_a_folder_against_a_folder(folders, tmp_path):
    done = evaluate(*folders, tmp_path / "out", "--chunk-frames", "3", "--samples", "2")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(result["splits"]) == ["all", "quickly", "slowly"]
    found = result["splits"]["all"]["metrics"]
    assert set(found) == set(result["metrics"])
    assert found["motion"]["source"] < found["motion"]["teacher"]
    assert found["jerkiness"]["source"] > found["jerkiness"]["teacher"]
    assert len(found["motion"]["by_time"]) == 4
    assert (result["same_prompts"], result["chunk_borders"], result["form"]["fps"]) == (True, [3, 6, 9], 8)
    assert [clip["split"] for clip in result["source"]["clips"]] == [prompt.speed for prompt in PROMPTS]
    assert "opencv-python-headless" in result["provenance"]
    assert "| Motion | teacher |" in done.stdout == (tmp_path / "out" / "table.md").read_text()
    html = (tmp_path / "out" / "evaluation.html").read_text()
    assert html.count("<video") == len(list((tmp_path / "out" / "samples").glob("*.mp4"))) == 2
    assert html.count("<svg") > 10
    assert "http" not in html.replace("http-equiv", "")


def test_what_goes_bad_beyond_the_teachers_length(folders, tmp_path):
    clips = render_clips(PROMPTS, seed=3, frames=50)
    clips[:, 24:48] //= 8
    for number, (prompt, clip) in enumerate(zip(PROMPTS, clips, strict=True)):
        write_mp4(clip, tmp_path / "long" / f"{number}.mp4", 8, title=prompt.sentence)
    options = ("--chunk-frames", "3", "--samples", "1", "--lengths", "4")
    done = evaluate(tmp_path / "long", folders[1], tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    found = result["splits"]["all"]["metrics"]
    assert (result["lengths"], result["form"]["frames"]) == (4, 12)
    for name in ("brightness", "brightness_drift"):
        assert list(found[name]["by_length"]) == ["0-1x", "1-2x", "2-4x"]
    drift = {span: each["source"] for span, each in found["brightness_drift"]["by_length"].items()}
    assert drift["0-1x"] == pytest.approx(found["brightness_drift"]["source"])
    assert drift["1-2x"] < 1.5
    assert drift["2-4x"] > drift["1-2x"] + 0.5
    assert found["brightness"]["by_length"]["2-4x"]["distance"] > found["brightness"]["by_length"]["2-4x"]["chance"]
    assert found["border_jump"]["by_length"].keys() == drift.keys()
    assert [len(clip["by_length"]) for side in ("source", "teacher") for clip in result[side]["clips"][:1]] == [4, 0]
    assert result["chunk_borders"][-1] == 45
    assert "| metric | better | teacher | 0-1x | 1-2x | 2-4x |" in done.stdout
    assert "Beyond the teacher's length" in (tmp_path / "out" / "evaluation.html").read_text()


@pytest.mark.parametrize("option", [("--lengths", "3"), ("--frames", "36")])
def test_a_student_makes_longer_videos(folders, tmp_path, option):
    save_student(tmp_path / "student", TOY)
    done = evaluate(tmp_path / "student", folders[1], tmp_path / "out", "--clips", "2", "--json", *option)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["source"]["own_form"]["frames"], result["form"]["frames"], result["lengths"]) == (36, 12, 3)
    assert list(result["splits"]["all"]["metrics"]["motion"]["by_length"]) == ["0-1x", "1-2x", "2-3x"]


def test_lengths_that_cannot_be_are_refused(folders, tmp_path, monkeypatch):
    save_student(tmp_path / "student", TOY)
    monkeypatch.setattr(evaluation_job, "generate", lambda *arguments: pytest.fail("it took hours"))
    out = tmp_path / "out"
    for source, option, said in (
        (folders[0], ("--lengths", "2"), "lengths (2) must be at most 1: the source's first video has 12 frames"),
        (tmp_path / "student", ("--frames", "23"), "frames (23) must be at least 24"),
        (tmp_path / "student", ("--frames", "24", "--lengths", "2"), "frames (24) must not come with lengths"),
    ):
        assert f"error: {said}" in refused(evaluate(source, folders[1], out, *option), out)


def test_a_folder_against_shards(folders, tmp_path):
    make_procedural_shards(ProceduralSource(clips=96, seed=1), tmp_path / "shards")
    done = evaluate(folders[0], tmp_path / "shards", tmp_path / "out", "--json", "--samples", "0")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {clip["prompt"] for clip in result["teacher"]["clips"]} == {prompt.sentence for prompt in PROMPTS}
    assert (result["form"]["height"], result["form"]["colour"], result["chunk_borders"]) == (16, "gray", None)
    assert result["splits"]["all"]["metrics"]["motion"]["teacher"] > 0.3


def test_shards_of_wans_codec_are_decoded_with_its_vae(tmp_path):
    save_tiny_wan(tmp_path / "wan")
    write_video(tmp_path / "teacher" / "a.mp4", moving_bar(9, 32, 48), 8)
    (tmp_path / "teacher" / "a.txt").write_text("a red ball")
    form = ("--codec", "wan", "--size", "32x48", "--frames", "9", "--fps", "8", "--text-length", "16")
    models = ("--models", tmp_path / "wan")
    made = call_tool("make_shards", "--teacher", "folder", "--source", tmp_path / "teacher", "--out",
                     tmp_path / "shards", *form, *models)  # fmt: skip
    assert made.returncode == 0, made.stderr
    write_video(tmp_path / "source" / "a red ball.mp4", moving_bar(9, 64, 96), 8)
    sides, out = (tmp_path / "source", tmp_path / "shards"), tmp_path / "out"
    assert "models must be given" in refused(evaluate(*sides, out), out)
    done = evaluate(*sides, out, "--json", *models)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [result["form"][name] for name in ("height", "width", "frames", "colour")] == [32, 48, 9, "rgb24"]
    assert (result["same_prompts"], len(result["teacher"]["clips"])) == (True, 1)


def test_a_reward_model_judges_both_sides(folders, tmp_path):
    judge = save_tiny_judge(tmp_path / "judge")
    done = evaluate(*folders, tmp_path / "out", "--json", "--clips", "2", "--samples", "0", "--reward-model", judge)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    found = result["splits"]["all"]["metrics"]["reward"]
    assert found["source"] != found["teacher"]
    assert found["by_time"] == []
    assert "| Reward | higher |" in (tmp_path / "out" / "table.md").read_text()
    out = tmp_path / "other"
    assert refused(evaluate(*folders, out, "--reward-model", tmp_path), out).startswith("error: reward_model (")


VBENCH = """
import json, os
from pathlib import Path
__version__ = "0.1.5"
class VBench:
    def __init__(self, device, full_info, out):
        self.out = out
    def evaluate(self, videos_path, name, prompt_list, dimension_list, mode):
        files = sorted(os.listdir(videos_path))
        assert all(os.path.getsize(f"{videos_path}/{file}") for file in files)
        if mode == "vbench_standard":
            assert (prompt_list, dimension_list) == ([], None)
            prompts = [file.rpartition("-")[0] for file in files]
        else:
            assert list(prompt_list) == files
            prompts = list(prompt_list.values())
        found = [
            {"video_path": f"{videos_path}/{file}", "video_results": 0.25 if "slowly" in prompt else 0.75}
            for file, prompt in zip(files, prompts)
        ]
        results = {"imaging_quality": [0.5, found]}
        Path(self.out, f"{name}_eval_results.json").write_text(json.dumps(results))
"""


@pytest.mark.parametrize("standard", [False, True])
def test_vbench_judges_in_its_own_process(folders, tmp_path, monkeypatch, standard):
    (tmp_path / "vbench").mkdir()
    (tmp_path / "vbench" / "__init__.py").write_text(VBENCH)
    own = [{"prompt_en": prompt.sentence} for prompt in PROMPTS] if standard else []
    (tmp_path / "vbench" / "VBench_full_info.json").write_text(json.dumps(own))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = evaluate(*folders, tmp_path / "out", "--json", "--samples", "0", "--clips", "4", "--vbench", sys.executable)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["vbench"]["source"] == {"standard": standard, "dimensions": {"imaging_quality": 0.5}}
    slowly = result["splits"]["slowly"]["metrics"]["vbench_imaging_quality"]
    assert (slowly["source"], slowly["teacher"], slowly["distance"]) == (0.25, 0.25, 0)


def test_without_vbench_one_line_says_so(folders, tmp_path):
    for python in (sys.executable, str(tmp_path / "absent")):
        said = refused(evaluate(*folders, tmp_path / "out", "--vbench", python), tmp_path / "out")
        assert said.startswith(f"error: vbench ({python}) must be a Python")


def test_several_processes_measure_the_same(folders, tmp_path):
    results = []
    for workers in ("1", "2"):
        out = tmp_path / workers
        done = evaluate(*folders, out, "--workers", workers, "--clips", "2", "--samples", "0")
        assert done.returncode == 0, done.stderr
        results.append(json.loads((out / "evaluation.json").read_text())["source"]["clips"])
    assert results[0] == results[1]


def test_both_sides_get_the_lesser_form(tmp_path):
    write_video(tmp_path / "source" / "a prompt.mp4", moving_bar(24, 32, 64), 16)
    write_video(tmp_path / "teacher" / "a prompt.mp4", moving_bar(10, 64, 96), 8)
    (tmp_path / "source" / "broken.mp4").write_bytes(b"no video")
    done = evaluate(tmp_path / "source", tmp_path / "teacher", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    form = [result["form"][name] for name in ("height", "width", "frames", "fps")]
    assert form == [32, 64, 10, 8]
    assert [reject["video"] for reject in result["source"]["rejects"]] == ["broken.mp4"]
    assert [clip["prompt"] for clip in result["source"]["clips"]] == ["a prompt"], "its name stands in for a title"
    assert "broken.mp4" in (tmp_path / "out" / "evaluation.html").read_text()


@pytest.mark.parametrize("teacher", ["shards", "folder"])
def test_a_student_makes_its_videos_first(folders, tmp_path, teacher):
    save_student(tmp_path / "student", TOY)
    if teacher == "shards":
        make_procedural_shards(ProceduralSource(clips=40), tmp_path / "shards")
    place = tmp_path / "shards" if teacher == "shards" else folders[1]
    done = evaluate(tmp_path / "student", place, tmp_path / "out", "--clips", "5", "--samples", "2")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["source"]["name"] == "student"
    assert len(result["source"]["clips"]) == len(list((tmp_path / "out" / "videos").glob("*.mp4"))) == 5
    assert result["chunk_borders"] == [3, 6, 9]
    assert result["same_prompts"]
    assert not list(tmp_path.glob(".*"))


def test_bad_input_is_refused_in_one_line(folders, tmp_path):
    source, teacher = folders
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    write_video(tmp_path / "short" / "a.mp4", moving_bar(2, 16, 16), 8)
    for place, said in (
        (tmp_path / "absent", "source"),
        (tmp_path / "empty", "must hold videos"),
        (tmp_path / "run", "must hold weights: there is no file that ends in"),
        (tmp_path / "short", "must share 3 frames"),
    ):
        assert said in refused(evaluate(place, teacher, out), out)
    for place in (tmp_path / "absent", tmp_path / "empty"):
        assert refused(evaluate(source, place, out), out).startswith("error: teacher (")
    for option, said in (
        (("--first-chunk-frames", "3"), "first_chunk_frames (3) must not be given without chunk_frames"),
        (("--seed", "3"), "seed (3) must not be given for a folder"),
        (("--models", "m"), "models (m) must not be given for folders"),
    ):
        assert said in refused(evaluate(source, teacher, out, *option), out)
    assert "teacher (short) must have clips of 3 frames" in refused(evaluate(source, tmp_path / "short", out), out)
    for option in (("--clips", "0"), ("--samples", "-1")):
        assert "at least 1" in refused(evaluate(source, teacher, out, *option), out)


def test_an_output_that_is_there_is_left_alone(folders, tmp_path):
    done = evaluate(*folders, tmp_path)
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert "must not exist" in done.stderr


def test_chunks_of_a_changed_rate_are_refused(folders, tmp_path):
    write_video(tmp_path / "source" / "a.mp4", np.zeros((24, 16, 16, 3), np.uint8), 16)
    done = evaluate(tmp_path / "source", folders[1], tmp_path / "out", "--chunk-frames", "4")
    assert "16 frames a second are made 8" in refused(done, tmp_path / "out")


def test_nothing_is_generated_for_options_that_cannot_be(folders, tmp_path, monkeypatch):
    save_student(tmp_path / "student", TOY)
    monkeypatch.setattr(evaluation_job, "generate", lambda *arguments: pytest.fail("it took hours"))
    out = tmp_path / "out"
    for option, said in (
        (("--reward-model", tmp_path / "absent"), "reward_model"),
        (("--reward-model", tmp_path / "student"), "reward_model"),
        (("--vbench", sys.executable), "vbench"),
        (("--first-chunk-frames", "3"), "first_chunk_frames (3) must not be given without"),
        (("--chunk-frames", "3"), "chunk_frames (3) must not be given for a student"),
    ):
        assert f"error: {said}" in refused(evaluate(tmp_path / "student", folders[1], out, *option), out)
    (tmp_path / "out.videos").mkdir()
    assert "must not have" in refused(evaluate(tmp_path / "student", folders[1], out), out)


def test_what_was_generated_outlives_a_later_failure(folders, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    save_student(tmp_path / "student", TOY)
    out, videos = tmp_path / "out", tmp_path / "out.videos"
    with monkeypatch.context() as patched:
        patched.setattr(evaluation_job, "write_evaluation", full)
        said = refused(evaluate(tmp_path / "student", folders[1], out, "--clips", "2"), out)
    assert "No space left on device" in said
    more = ("--chunk-frames", "3", "--first-chunk-frames", "3")
    assert f"the videos that were made are in {videos}, to be given as the source, with {' '.join(more)}" in said
    done = evaluate(videos, folders[1], out, *more)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "evaluation.json").read_text())
    assert (len(result["source"]["clips"]), result["chunk_borders"], result["same_prompts"]) == (2, [3, 6, 9], True)


def test_a_disk_that_is_full_when_videos_are_made_is_one_line(folders, tmp_path, monkeypatch):
    save_student(tmp_path / "student", TOY)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        said = refused(evaluate(tmp_path / "student", folders[1], tmp_path / "out"), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "no video is finished" in said
    assert not (tmp_path / "out.videos").exists()
