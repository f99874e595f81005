"""Runs whose figures are made up, for tests of what is said of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from afd_scale.study.judged_runs import JudgedRun

Point = tuple[float, float]  # pair accuracy and trajectory distance


def made_up(name: str, points: Mapping[int, Point], regimes: Sequence[str] = ("seen",), **more: float) -> JudgedRun:
    """A run with one judge.

    Args:
        points: by step.
        more: other qualities, at each step.
    """
    return JudgedRun(name, "all", {step: {regime: at(*point, **more) for regime in regimes}
                                   for step, point in points.items()})  # fmt: skip


def at(accuracy: float, distance: float, **more: float) -> dict[str, Any]:
    """A regime of a checkpoint."""
    return {
        "student": {"trajectory_fd": distance, "dynamic_degree": 1 - distance / 100},
        "teacher": {"trajectory_fd": 1.0, "dynamic_degree": 1.0},
        "judges": {"it": {"pair_accuracy": accuracy, **more}},
    }
