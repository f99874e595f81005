"""Size, length and frames a second of what is generated: as the student was trained, whatever it is compared with."""

import json
from fractions import Fraction
from pathlib import Path

import av
import pytest

from afd_scale.config.run import ProceduralSource
from afd_scale.data.storage import Location
from afd_scale.data.video import own_form, read_video
from afd_scale.data.worlds.drop import ToyPrompt
from afd_scale.evaluation.clip_sets import ShardClips
from tests.students import TOY, save_run, save_student
from tests.tools import call_tool
from tests.toy_datasets import make_procedural_shards
from tests.videos import moving_bar, write_video

NTSC = Fraction(30000, 1001)
TEXTS = [prompt.sentence for prompt in ToyPrompt.every()[:2]]


def write_folder(folder: Path, fps: Fraction | int, frames: int, height: int = 16, width: int = 16) -> Path:
    """Videos with a table of their prompts."""
    for number in range(len(TEXTS)):
        write_video(folder / f"{number}.mp4", moving_bar(frames, height, width, 120 + 60 * number), fps)
    rows = [{"video": f"{number}.mp4", "prompt": text} for number, text in enumerate(TEXTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_shards(folder: Path, fps: Fraction | int) -> Path:
    """A dataset of the toy's codec, 12 frames of 16 x 16, at any rate."""
    source = write_folder(folder / "source", fps, 12)
    done = call_tool("make_shards", "--teacher", "folder", "--source", source, "--prompts", source / "prompts.jsonl",
                     "--size", "16x16", "--frames", "12", "--fps", str(float(fps)), "--out", folder / "shards",
                     )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "shards"


def form_of(folder: Path) -> tuple[int, int, int]:
    """Frames, height and width of its videos."""
    (form,) = {(form.frames, form.height, form.width) for form in map(own_form, folder.glob("*.mp4"))}
    return form


def rate_of(folder: Path) -> Fraction:
    rates = set()
    for path in folder.glob("*.mp4"):
        with av.open(path) as container:
            rates.add(container.streams.video[0].average_rate)
    (rate,) = rates
    return rate


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "student"
    save_student(folder, TOY)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """It learned from videos of 16 frames a second."""
    folder = tmp_path_factory.mktemp("run")
    return save_run(folder / "run", make_shards(folder, 16))


@pytest.mark.parametrize("fps", [24, NTSC])
def test_a_dataset_says_the_rate_of_what_is_asked_for_with_it(student, tmp_path, fps):
    done = call_tool("generate", student, "--dataset", make_shards(tmp_path, fps), "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert rate_of(tmp_path / "out") == fps
    assert form_of(tmp_path / "out") == (12, 16, 16)


def test_a_run_says_its_own(run, tmp_path):
    other = make_shards(tmp_path, 24)
    for name, more, rate, frames in (
        ("alone", ("--prompt", TEXTS[0]), 16, 12),
        ("dataset", ("--dataset", other), 16, 12),
        ("seconds", ("--prompt", TEXTS[0], "--seconds", "1.2"), 16, 20),
        ("option", ("--prompt", TEXTS[0], "--fps", "10", "--seconds", "1.2"), 10, 12),
    ):
        done = call_tool("generate", run, *more, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert (rate_of(tmp_path / name), form_of(tmp_path / name)[0]) == (rate, frames), name


def test_a_run_that_cannot_say_it_is_named(tmp_path, caplog):
    run = save_run(tmp_path / "run", tmp_path / "absent")
    done = call_tool("generate", run, "--prompt", TEXTS[0], "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert rate_of(tmp_path / "out") == 8
    assert f"trained on: data.shards ({tmp_path}/absent)" in caplog.text
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("latent_frames: 4", "latent_frames: many"))
    done = call_tool("generate", run, "--prompt", TEXTS[0], "--out", tmp_path / "other")
    assert done.returncode == 0, done.stderr
    assert f"{config} does not say what its student was trained on: data.latent_frames" in caplog.text


def test_frames_that_are_no_whole_chunks_are_cut(student, tmp_path):
    for frames in (2, 13):
        done = call_tool("generate", student, "--prompt", TEXTS[0], "--frames", frames, "--out", tmp_path / str(frames))
        assert done.returncode == 0, done.stderr
        assert form_of(tmp_path / str(frames)) == (frames, 16, 16)
    both = [read_video(next((tmp_path / name).glob("*.mp4")), own_form(next((tmp_path / name).glob("*.mp4"))))
            for name in ("2", "13")]  # fmt: skip
    assert abs(both[0].astype(int)[0] - both[1][0]).mean() < 40


@pytest.mark.parametrize(
    ("fps", "frames", "size", "form", "borders"),
    [
        (24, 18, (16, 16), (12, 16, 16, 16), [3, 6, 9]),  # its 0.75 s
        (24, 18, (54, 96), (12, 16, 16, 16), [3, 6, 9]),  # no whole tokens
        (8, 6, (16, 16), (6, 8, 16, 16), None),
        (NTSC, 30, (16, 16), (16, 16, 16, 16), [3, 6, 9, 12, 15]),
    ],
)
def test_a_run_is_measured_at_its_own_speed(run, tmp_path, fps, frames, size, form, borders):
    teacher = write_folder(tmp_path / "teacher", fps, frames, *size)
    done = call_tool("evaluate", run, "--teacher", teacher, "--out", tmp_path / "out", "--workers", "1")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert rate_of(tmp_path / "out" / "videos") == 16
    assert [result["form"][name] for name in ("frames", "fps", "height", "width")] == list(form)
    assert result["chunk_borders"] == borders


def test_a_run_is_measured_against_faster_shards(run, tmp_path):
    done = call_tool("evaluate", run, "--teacher", make_shards(tmp_path, 24), "--out", tmp_path / "out",
                     "--workers", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert rate_of(tmp_path / "out" / "videos") == 16
    assert (result["form"]["frames"], result["form"]["fps"], result["chunk_borders"]) == (8, 16, [3, 6])


def test_a_run_of_ntsc_against_its_own_shards(tmp_path):
    shards = make_shards(tmp_path, NTSC)
    done = call_tool("evaluate", save_run(tmp_path / "run", shards), "--teacher", shards, "--out", tmp_path / "out",
                     "--workers", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert rate_of(tmp_path / "out" / "videos") == NTSC
    assert (result["form"]["frames"], result["chunk_borders"]) == (12, [3, 6, 9])


def test_shards_are_made_slower_by_leaving_frames_out(tmp_path):
    make_procedural_shards(ProceduralSource(clips=2), tmp_path / "shards")
    clips = ShardClips(Location(str(tmp_path / "shards"), tmp_path, "teacher"), None)
    whole, slow = clips.form, clips.form.__class__(5, 3.5, 16, 16, colour="gray")
    (_, all_frames), *_ = clips.loads(clips.clips, whole)
    (_, some), *_ = clips.loads(clips.clips, slow)
    assert (some() == all_frames()[[0, 2, 4, 6, 9]]).all()  # those shown at k / 3.5 seconds
