"""The shortest runs that a launcher can start."""

import json
from pathlib import Path

import yaml

from tests.distributed.small_run import write_small_run
from tests.launchers import held


def shortest_run(folder: Path, steps: int, **train: object) -> Path:
    """The config of a run without an evaluation and with few clips.

    Args:
        train: further fields of its `train` section.
    """
    path = write_small_run(folder, steps)
    tree = yaml.safe_load(path.read_text())
    tree["evaluation"] = {"metrics": "none"}
    tree["data"]["source"]["clips"] = 16
    tree["student"]["weights"] = None  # a start is held against nothing then
    tree["train"] |= {"trackers": []} | train
    path.write_text(yaml.safe_dump(tree))
    return path


def held_run(folder: Path, steps: int, batch: int, **train: object) -> tuple[Path, Path]:
    """The same of a run whose micro-batches take as many seconds as a file says; the config and the file.

    Args:
        batch: videos of a step.
    """
    path, hold = shortest_run(folder, steps, **train), folder / "hold"
    tree = yaml.safe_load(path.read_text())
    tree["data"]["global_batch"] = batch
    tree["data"]["source"]["clips"] = 4 * batch
    tree["method"] = {"name": held.NAME, "hold": str(hold)}
    path.write_text(yaml.safe_dump(tree))
    return path, hold


def write_hold(hold: Path, seconds: float) -> None:
    """A micro-batch takes so long from here on, the one in progress included; readers see all of it or the old one."""
    partial = hold.with_suffix(".partial")
    partial.write_text(str(seconds))
    partial.replace(hold)


def summary(folder: Path) -> tuple[int, int]:
    """Ranks and steps of the run, which is complete."""
    read = json.loads((folder / "runs" / "afd" / "summary.json").read_text())
    return read["ranks"], read["steps"]
