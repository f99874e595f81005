"""The shortest runs that a launcher can start."""

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
    tree["train"] |= train
    path.write_text(yaml.safe_dump(tree))
    return path


def held_run(folder: Path, steps: int, seconds: float, **train: object) -> tuple[Path, Path]:
    """The same of a run whose micro-batches take so many seconds each while a file exists; the config and the file."""
    path, hold = shortest_run(folder, steps, **train), folder / "hold"
    tree = yaml.safe_load(path.read_text())
    tree["method"] = {"name": held.NAME, "hold": str(hold), "seconds": seconds}
    path.write_text(yaml.safe_dump(tree))
    hold.touch()
    return path, hold
