"""The toy world's suite: trajectories of generated clips, read from pixels, against fresh clips of the teacher."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from afd_scale.data.worlds.drop import ToyPrompt
from afd_scale.evaluation.suites import trajectory
from afd_scale.evaluation.suites.suite import Metric
from afd_scale.evaluation.suites.tracks import Tracks, track
from afd_scale.evaluation.suites.world import Each, WorldSuite
from afd_scale.mp4 import FrameArray


class ToySuite(WorldSuite):
    """Of the world of falling balls."""

    world: ClassVar[str] = "drop"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "trajectory_fd": Metric("Trajectory distance", "lower", "Fréchet distance of paths to the teacher's"),
        "dynamic_degree": Metric("Dynamic degree", "teacher", "mean speed over the teacher's"),
        "moving_fraction": Metric("Moving", "higher", "share of clips at 60 % or more of the speed asked for"),
        "prompt_accuracy": Metric("Prompt right", "higher", "share of clips with every attribute as asked"),
        "physics_strict": Metric("Strict physics", "higher", "share of clips on a path of the prompt's physics"),
        "all_in_one": Metric("All in one", "higher", "share of clips moving, prompt right, physics plausible"),
        "acceleration_residual": Metric("Acceleration residual", "lower", "free flight against the asked gravity"),
        "mass_error": Metric("Mass error", "lower", "relative change of the ball's summed brightness"),
        "sharpness": Metric("Sharpness", "teacher", "edge energy over the teacher's; far above is noise"),
    }
    # How far a clip follows its prompt's path is told from its launch, and its direction until a wall turns it.
    over_time: ClassVar[Mapping[str, Metric]] = {
        "trajectory_fd": Metric("Trajectory distance", "lower", "Fréchet distance of paths to the teacher's then"),
        "path_fd": Metric("Path distance", "lower", "the same in one unit at any time: the spread of its start"),
        "dynamic_degree": Metric("Dynamic degree", "teacher", "mean speed over the teacher's then"),
        "attributes_right": Metric("Attributes right", "higher", "share of clips as bright, large and quick as asked"),
        "acceleration_residual": Metric("Acceleration residual", "lower", "free flight against the asked gravity, of "
                                        "clips whose ball is seen to fly"),
        "mass_error": Metric("Mass error", "lower", "relative change of the ball's summed brightness"),
        "sharpness": Metric("Sharpness", "teacher", "edge energy over the teacher's then; far above is noise"),
    }  # fmt: skip

    @staticmethod
    def score(clips: FrameArray, asked: Sequence[ToyPrompt], teacher: Tracks) -> dict[str, float]:
        return trajectory.score(clips, asked, teacher)

    @staticmethod
    def score_part(clips: FrameArray, asked: Sequence[ToyPrompt], teacher: Tracks, start: Tracks) -> dict[str, float]:
        return trajectory.score_part(track(clips), asked, teacher, start)

    @staticmethod
    def score_each(clips: FrameArray, asked: Sequence[ToyPrompt], teacher: Tracks) -> Each:
        return trajectory.score_each(track(clips), asked, teacher)
