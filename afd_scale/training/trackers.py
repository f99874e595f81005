"""Where a run is watched from: TensorBoard, and where they are chosen wandb and trackio."""

import importlib.util
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from afd_scale.config import ConfigError, RunConfig, one_line
from afd_scale.evaluation.video import read_mp4
from afd_scale.files import write_text

PROJECT = "afd_scale"
RUN_ID = "tracker_run"  # file in a run's folder
GIF_FRAMES, GIF_WIDTH = 20, 480  # at most

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes what the main rank has to show."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Of a step; a warm-up's are numbered up to 0."""
        ...

    def videos(self, step: int, files: Sequence[Path]) -> None:
        """Sample videos, mp4; a file's name is the same at every step."""
        ...

    def close(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for the first that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.trackers ({name}) must be installed: pip install 'afd-scale[{name}]'")


def open_tracker(name: str, config: RunConfig, first_step: int) -> Tracker:
    """One of a run's trackers, on its main rank.

    Args:
        first_step: that is to be done; what an earlier attempt told of it and later ones is dropped where that can be.
    Raises:
        ConfigError: it cannot be used.
    """
    try:
        tracker: Tracker = _TRACKERS[name](config, first_step)
    except Exception as error:  # every library has its own
        raise ConfigError(f"train.trackers ({name}) must be usable: {one_line(f'{type(error).__name__}: {error}')}"
                          ) from error  # fmt: skip
    return tracker


def tell(trackers: list[Tracker], what: Callable[[Tracker], None]) -> None:
    """Tell each something; one that fails is dropped, with a warning: the run goes on."""
    for tracker in list(trackers):
        try:
            what(tracker)
        except Exception as error:  # every library has its own
            trackers.remove(tracker)
            log.warning("%s is told nothing more: %s", type(tracker).__name__, one_line(error))


def run_id(config: RunConfig) -> str:
    """Of a run, the same at each of its starts, until it is started anew."""
    path = config.folder / RUN_ID
    if not path.exists():
        write_text(path, uuid4().hex[:12])
    return path.read_text()


class TensorBoard:
    """Events in `<run>/tensorboard`."""

    def __init__(self, config: RunConfig, first_step: int):
        from torch.utils.tensorboard import SummaryWriter  # loads slowly

        self._events: Any = SummaryWriter(str(config.folder / "tensorboard"), purge_step=first_step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def videos(self, step: int, files: Sequence[Path]) -> None:
        """As animated GIFs, which is how TensorBoard shows videos, small ones: they are large for what they hold."""
        from PIL import Image as Picture
        from tensorboard.compat.proto.summary_pb2 import Summary

        for file in files:
            frames, fps = read_mp4(file)
            every, shrink = -(-len(frames) // GIF_FRAMES), -(-frames.shape[2] // GIF_WIDTH)
            first, *others = (Picture.fromarray(frame).reduce(shrink) for frame in frames[::every])
            gif = io.BytesIO()
            first.save(gif, format="GIF", save_all=True, append_images=others, duration=1000 * every / fps, loop=0)
            image = Summary.Image(height=first.height, width=first.width, colorspace=3,
                                  encoded_image_string=gif.getvalue())  # fmt: skip
            summary = Summary(value=[Summary.Value(tag=f"samples/{file.stem}", image=image)])
            self._events.file_writer.add_summary(summary, step)

    def close(self) -> None:
        self._events.close()


class WandB:
    """A run of Weights & Biases; where there is no network, WANDB_MODE=offline keeps it in `<run>/wandb`."""

    def __init__(self, config: RunConfig, first_step: int):
        import wandb

        self._wandb = wandb
        self._run = wandb.init(project=PROJECT, name=config.name, id=run_id(config), resume="allow",
                               dir=str(config.folder), config=config.model_dump(mode="json"))  # fmt: skip
        # Its own steps begin at 0 and never go back.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def videos(self, step: int, files: Sequence[Path]) -> None:
        shown = {f"samples/{file.stem}": self._wandb.Video(str(file), format="mp4") for file in files}
        self._run.log({"step": step, **shown})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio: local files of its own, TRACKIO_DIR, and `trackio show`."""

    def __init__(self, config: RunConfig, first_step: int):
        import trackio

        self._trackio = trackio
        name = f"{config.name}-{run_id(config)}"  # it knows runs by their names
        self._run = trackio.init(project=PROJECT, name=name, resume="allow", embed=False,
                                 config=config.model_dump(mode="json"))  # fmt: skip

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def videos(self, step: int, files: Sequence[Path]) -> None:
        self._run.log(
            {f"samples/{file.stem}": self._trackio.Video(str(file), format="mp4") for file in files}, step=step
        )

    def close(self) -> None:
        self._run.finish()


_TRACKERS: Mapping[str, type[Any]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}
