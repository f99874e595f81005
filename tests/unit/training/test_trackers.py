"""What TensorBoard, wandb and trackio are told of a run."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from afd_scale.config import ConfigError, RunConfig
from afd_scale.evaluation.video import write_mp4
from afd_scale.training.trackers import check_trackers, tracking


def config_of(folder: Path, *trackers: str) -> RunConfig:
    config = RunConfig.model_validate({"method": "sft", "out": folder / "runs", "train": {"trackers": trackers}})
    if trackers:
        config.folder.mkdir(parents=True, exist_ok=True)
    return config


@pytest.fixture
def video(tmp_path: Path) -> Path:
    frames = np.random.default_rng(0).integers(0, 255, (5, 16, 24, 3), dtype=np.uint8)
    write_mp4(frames, tmp_path / "00_a-ball.mp4", 8.0)
    return tmp_path / "00_a-ball.mp4"


def test_tensorboard_has_each_step_once_and_moving_pictures(tmp_path: Path, video: Path) -> None:
    config = config_of(tmp_path, "tensorboard")
    for first, steps in ((1, (10, 20, 30)), (21, (30, 40))):
        with tracking(config, first, is_main=True) as (tracker,):
            for step in steps:
                tracker.metrics(step, {"student/loss": step / 10})
            tracker.videos(steps[-1], [video])
    events = EventAccumulator(str(config.folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    scalars = events.Scalars("student/loss")
    assert [(scalar.step, scalar.value) for scalar in scalars] == [(10, 1), (20, 2), (30, 3), (40, 4)]
    images = events.Images("samples/00_a-ball")
    assert [(image.step, image.width, image.height) for image in images] == [(40, 24, 16)]
    gif = images[0].encoded_image_string
    assert gif.startswith(b"GIF89a")
    assert gif.count(b"\x21\xf9\x04") == 5  # a control block a frame


class Stand:
    """In the place of a library that is not installed; remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def init(self, **options: Any) -> "Stand":
        self.calls.append(("init", options))
        return self

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: self.calls.append((name, (*arguments, options)))


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand()
    stand.Video = lambda file, format: f"{format} of {file}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stand)
    for _ in range(2):
        with tracking(config_of(tmp_path, "wandb"), 1, is_main=True) as (tracker,):
            tracker.metrics(-3, {"student/loss": 0.5})  # of a warm-up
            tracker.videos(2, [video])
    first, second = (options for name, options in stand.calls if name == "init")
    assert first == second
    assert (first["resume"], first["name"], len(first["id"])) == ("allow", "run", 12)
    json.dumps(first["config"])
    assert [logged for name, (logged, *_) in stand.calls if name == "log"][:2] == [
        {"step": -3, "student/loss": 0.5},
        {"step": 2, "samples/00_a-ball": f"mp4 of {video}"},
    ]
    assert [name for name, _ in stand.calls].count("finish") == 2


def test_trackio(tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand()
    stand.Video = lambda file, format: f"{format} of {file}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", stand)
    with tracking(config_of(tmp_path, "trackio"), 1, is_main=True) as (tracker,):
        tracker.metrics(4, {"student/loss": 0.5})
        tracker.videos(4, [video])
    assert [call for call in stand.calls if call[0] == "log"] == [
        ("log", ({"student/loss": 0.5}, {"step": 4})),
        ("log", ({"samples/00_a-ball": f"mp4 of {video}"}, {"step": 4})),
    ]
    assert stand.calls[-1][0] == "finish"


def test_one_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trackio" else object())
    with pytest.raises(ConfigError, match=r"train\.trackers \(trackio\) must be installed: pip install"):
        check_trackers(("tensorboard", "wandb", "trackio"))


def test_none_is_an_answer(tmp_path: Path) -> None:
    for config, is_main in ((config_of(tmp_path), True), (config_of(tmp_path, "tensorboard"), False)):
        with tracking(config, 1, is_main=is_main) as trackers:
            assert trackers == []
    assert not list((tmp_path / "runs/run").iterdir())
