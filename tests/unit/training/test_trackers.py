"""What TensorBoard, wandb and trackio are told of a run."""

import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from afd_scale.config import ConfigError, RunConfig
from afd_scale.evaluation.video import write_mp4
from afd_scale.training.trackers import check_trackers, open_tracker, tell


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
        tracker = open_tracker("tensorboard", config, first)
        for step in steps:
            tracker.metrics(step, {"student/loss": step / 10})
        tracker.videos(steps[-1], [video])
        tracker.close()
    events = EventAccumulator(str(config.folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    scalars = events.Scalars("student/loss")
    assert [(scalar.step, scalar.value) for scalar in scalars] == [(10, 1), (20, 2), (30, 3), (40, 4)]
    images = events.Images("samples/00_a-ball")
    assert [(image.step, image.width, image.height) for image in images] == [(40, 24, 16)]
    with Image.open(io.BytesIO(images[0].encoded_image_string)) as gif:
        assert (gif.format, getattr(gif, "n_frames", 1)) == ("GIF", 5)


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
        tracker = open_tracker("wandb", config_of(tmp_path, "wandb"), 1)
        tracker.metrics(-3, {"student/loss": 0.5})  # of a warm-up
        tracker.videos(2, [video])
        tracker.close()
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
    tracker = open_tracker("trackio", config_of(tmp_path, "trackio"), 1)
    tracker.metrics(4, {"student/loss": 0.5})
    tracker.videos(4, [video])
    tracker.close()
    (options,) = (options for name, options in stand.calls if name == "init")
    assert options["name"].startswith("run-")
    assert len(options["name"]) == 16, "runs of one name in other folders are others"
    assert [call for call in stand.calls if call[0] == "log"] == [
        ("log", ({"student/loss": 0.5}, {"step": 4})),
        ("log", ({"samples/00_a-ball": f"mp4 of {video}"}, {"step": 4})),
    ]
    assert stand.calls[-1][0] == "finish"


def test_one_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trackio" else object())
    with pytest.raises(ConfigError, match=r"train\.trackers \(trackio\) must be installed: pip install"):
        check_trackers(("tensorboard", "wandb", "trackio"))


def test_one_that_cannot_be_used_ends_the_run_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand()
    stand.init = lambda **options: 1 / 0  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "wandb", stand)
    with pytest.raises(ConfigError, match=r"train\.trackers \(wandb\) must be usable: ZeroDivisionError: division"):
        open_tracker("wandb", config_of(tmp_path, "wandb"), 1)


def test_one_that_fails_later_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    told = []

    class Good:
        def metrics(self, step: int, values: Any) -> None:
            told.append(step)

    class Bad(Good):
        def metrics(self, step: int, values: Any) -> None:
            raise OSError("no network")

    trackers: Any = [Bad(), Good()]
    for step in (1, 2):
        tell(trackers, lambda tracker, step=step: tracker.metrics(step, {}))
    assert told == [1, 2]
    assert [record.getMessage() for record in caplog.records] == ["Bad is told nothing more: no network"]


def test_gifs_are_small(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (81, 16, 1300, 3), dtype=np.uint8)
    write_mp4(frames, tmp_path / "wide.mp4", 16.0)
    config = config_of(tmp_path, "tensorboard")
    tracker = open_tracker("tensorboard", config, 1)
    tracker.videos(1, [tmp_path / "wide.mp4"])
    tracker.close()
    events = EventAccumulator(str(config.folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    (image,) = events.Images("samples/wide")
    assert image.width <= 480
    with Image.open(io.BytesIO(image.encoded_image_string)) as gif:
        assert getattr(gif, "n_frames", 1) == 17  # every fifth
