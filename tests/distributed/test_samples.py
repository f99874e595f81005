"""A run of Wan's kind, from mp4s of a teacher to sample videos: its latents are decoded by a VAE, on two ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from afd_scale.codecs.codec import VideoForm
from afd_scale.data.video import read_video
from afd_scale.evaluation.video import read_title
from tests.distributed.processes import ROOT, on_ranks
from tests.tools import call_tool
from tests.videos import write_video
from tests.wan_models import CHANNELS, TEXT_DIM, save_tiny_wan

TEXTS = ("a red ball falls", "a blue ball falls", "the cat on the moon", "water under the moon")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With models/, shards/ and wan.yaml: a student with adapters over latents of a tiny VAE."""
    folder = tmp_path_factory.mktemp("wan")
    save_tiny_wan(folder / "models")
    (folder / "videos").mkdir()
    rows = []
    for number, text in enumerate(TEXTS):
        frames = np.random.default_rng(number).integers(0, 255, (13, 4, 4, 3), dtype=np.uint8)
        write_video(folder / "videos" / f"{number}.mp4", frames.repeat(8, axis=1).repeat(8, axis=2), 16)
        rows.append({"video": f"{number}.mp4", "prompt": text})
    (folder / "videos" / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = call_tool("make_shards", "--teacher", "folder", "--source", folder / "videos", "--prompts",
                     folder / "videos" / "prompts.jsonl", "--codec", "wan", "--models", folder / "models",
                     "--size", "32x32", "--frames", 13, "--fps", 16, "--text-length", 12,
                     "--out", folder / "shards")  # fmt: skip
    assert done.returncode == 0, done.stderr
    network: dict[str, Any] = {"architecture": "toy", "dim": 32, "num_heads": 4, "ffn_dim": 48, "num_layers": 2,
                               "latent_channels": CHANNELS, "text_dim": TEXT_DIM, "text_length": 12,
                               "prediction": "velocity", "lora": {"rank": 2, "alpha": 2}}  # fmt: skip
    tree = {
        "name": "wan", "out": str(folder / "runs"),
        "student": network, "sampler": {"chunk_frames": 2, "timesteps": [1000, 500]},
        "data": {"shards": str(folder / "shards"), "latent_frames": 4, "latent_height": 4, "latent_width": 4,
                 "global_batch": 2},
        "codec": {"name": "wan", "models": str(folder / "models")},
        "train": {"steps": 4, "log_every": 1, "sample_every": 2},
        "evaluation": {"metrics": "none", "samples": 3, "batch": 1},
        "method": {"name": "afd", "rollouts_per_prompt": 2, "optimizer": {"learning_rate": 0.01},
                   "discriminator": {**network, "name": "latent", "num_layers": 1},
                   "discriminator_optimizer": {"learning_rate": 0.001}},
    }  # fmt: skip
    (folder / "wan.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The run's folder."""
    done = on_ranks(2, ROOT / "launch" / "train.py", "--config", folder / "wan.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs" / "wan"


def test_every_run_leaves_videos(trained: Path) -> None:
    samples = trained / "samples"
    assert sorted(path.name for path in samples.glob("step_*")) == ["step_00000002", "step_00000004"]
    for step in samples.glob("step_*"):
        files = sorted(step.glob("*.mp4"))
        assert len({read_title(file) for file in files} & set(TEXTS)) == 3
        assert (step / "grid.png").is_file()
    summary = json.loads((trained / "summary.json").read_text())
    assert {"sample", "train", "evaluate"} <= summary["seconds"].keys()
    report = (trained / "report.html").read_text()
    assert report.count("data:video/mp4") == 3


def test_its_student_makes_videos_longer_than_trained(folder: Path, trained: Path) -> None:
    done = call_tool("generate", trained, "--prompt", TEXTS[0], "--models", folder / "models", "--frames", 29,
                     "--out", folder / "made", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = json.loads(done.stdout.splitlines()[-1])["files"]
    video = read_video(Path(file), VideoForm(29, 16.0, 32, 32))
    assert video.shape == (29, 32, 32, 3)
    assert np.isfinite(video).all()


def test_models_that_cannot_decode_end_the_run_in_one_line(folder: Path, tmp_path: Path) -> None:
    for codec, line in (
        ({"name": "wan", "models": str(tmp_path)}, "it has no vae/config.json"),
        ({"name": "identity"}, None),
    ):
        done = on_ranks(2, ROOT / "launch" / "train.py", "--config", folder / "wan.yaml", "name=bad", "train.steps=1",
                        f"codec={json.dumps(codec)}")  # fmt: skip
        if line is None:
            assert done.returncode == 0, done.stderr[-3000:]
            assert "no videos are shown: latents of wan:4x8x8" in done.stderr
            assert not (folder / "runs" / "bad" / "samples").exists()
        else:
            assert done.returncode == 2
            assert line in done.stderr
            assert not (folder / "runs" / "bad").exists()
