"""The whole path on tiny random models: mp4s of a teacher, shards, AFD of adapters on two ranks with sample videos and
measures, videos longer than trained, and a pipeline that streams where this package is not."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from afd_scale.codecs.codec import VideoForm
from afd_scale.data.video import read_video
from afd_scale.evaluation.video import read_title
from tests.distributed.processes import ROOT, on_ranks
from tests.tools import call_tool
from tests.videos import TEACHER_PROMPTS, write_teacher
from tests.wan_models import save_tiny_student, save_tiny_wan

CONFIG = ROOT / "configs" / "toy" / "wan_shaped.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With models/, shards/ and wan.yaml, which is configs/toy/wan_shaped.yaml at this place."""
    folder = tmp_path_factory.mktemp("wan")
    save_tiny_wan(folder / "models")
    save_tiny_student(folder / "start", CONFIG)
    write_teacher(folder / "videos")
    done = call_tool("make_shards", "--teacher", "folder", "--source", folder / "videos", "--prompts",
                     folder / "videos" / "prompts.jsonl", "--codec", "wan", "--models", folder / "models",
                     "--size", "32x32", "--frames", 13, "--fps", 16, "--text-length", 12,
                     "--out", folder / "shards")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "wan.yaml").write_text(CONFIG.read_text().replace("runs/wan-shaped", str(folder)))
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The run's folder."""
    done = on_ranks(2, ROOT / "launch" / "train.py", "--config", folder / "wan.yaml", f"out={folder}", "name=run")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def test_every_run_leaves_videos(trained: Path) -> None:
    samples = trained / "samples"
    assert sorted(path.name for path in samples.glob("step_*")) == ["step_00000004", "step_00000008"]
    for step in samples.glob("step_*"):
        files = sorted(step.glob("*.mp4"))
        assert len({read_title(file) for file in files} & set(TEACHER_PROMPTS)) == 3
        assert (step / "grid.png").is_file()
    summary = json.loads((trained / "summary.json").read_text())
    assert {"sample", "train", "evaluate"} <= summary["seconds"].keys()
    assert summary["suite"] == "video"
    assert list(summary["metrics"]) == ["base", "student", "teacher"]
    assert {"motion", "flicker", "border_jump"} <= summary["metrics"]["student"].keys()
    report = (trained / "report.html").read_text()
    assert report.count("data:video/mp4") == 3
    assert "Jump at chunk borders" in report


def test_its_student_makes_videos_longer_than_trained(folder: Path, trained: Path) -> None:
    done = call_tool("generate", trained, "--prompt", TEACHER_PROMPTS[0], "--models", folder / "models", "--frames", 29,
                     "--out", folder / "made", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = json.loads(done.stdout.splitlines()[-1])["files"]
    video = read_video(Path(file), VideoForm(29, 16.0, 32, 32))
    assert video.shape == (29, 32, 32, 3)
    assert np.isfinite(video).all()


ALONE = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "afd_scale":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
for name in ("nms", "qnms"):  # of a torchvision that is built for CUDA
    torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
import numpy as np
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
chunks = pipe.stream("a red ball falls", num_frames=29, height=32, width=32, output_type="np")
print([np.asarray(chunk).shape for chunk in chunks])
try:
    import afd_scale
except ImportError:
    print("alone")
"""


def test_its_pipeline_streams_where_this_package_is_not(folder: Path, trained: Path, tmp_path: Path) -> None:
    done = call_tool("convert_checkpoint", trained, tmp_path / "exported", "--to", "pipeline",
                     "--models", folder / "models", "--license", "apache-2.0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    alone = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "exported")], cwd=tmp_path, text=True, capture_output=True,
        check=False,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr[-3000:]
    shapes = [(1, frames, 32, 32, 3) for frames in (5, 8, 8, 8)]
    assert alone.stdout.splitlines()[-2:] == [str(shapes), "alone"]


def test_models_that_cannot_decode_end_the_run_in_one_line(folder: Path, tmp_path: Path) -> None:
    for codec, line in (
        ({"name": "wan", "models": str(tmp_path)}, "it has no vae/config.json"),
        ({"name": "identity"}, None),
    ):
        overrides = (
            f"out={folder}",
            "name=bad",
            "train.steps=1",
            f"codec={json.dumps(codec)}",
            "evaluation.metrics=none",
        )
        done = on_ranks(2, ROOT / "launch" / "train.py", "--config", folder / "wan.yaml", *overrides)
        if line is None:
            assert done.returncode == 0, done.stderr[-3000:]
            assert "no videos are shown: latents of wan:4x8x8" in done.stderr
            assert not (folder / "bad" / "samples").exists()
        else:
            assert done.returncode == 2
            assert line in done.stderr
            assert not (folder / "bad").exists()
