"""The toy world's suite: trajectories of generated clips, read from pixels, against fresh clips of the teacher."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from afd_scale.config import RunConfig
from afd_scale.data.toy_world import ToyPrompt, parse_prompt, render_clips
from afd_scale.evaluation.suites.suite import Metric, Timing
from afd_scale.evaluation.suites.trajectory import Tracks, score, score_each, track
from afd_scale.mp4 import FrameArray
from afd_scale.types import Prompts

REFERENCE_CLIPS = 1536
REFERENCE_SEED = 1_000_003  # of clips that no shard holds: shards are made with small seeds
TEACHER_SEED = 1_000_004


class ToySuite:
    """The toy world is the same in every run."""

    renders_teacher: ClassVar[bool] = True
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

    def __init__(self, config: RunConfig) -> None:
        pass

    def check(self, prompts: Prompts) -> None:
        for text in prompts.texts:
            parse_prompt(text)

    def teacher(self, prompts: Prompts, clips: int) -> FrameArray:
        """Fresh clips: what a perfect student would score."""
        return _rendered(prompts.texts, clips, TEACHER_SEED)

    def measure(self, clips: Mapping[str, FrameArray], prompts: Prompts, timing: Timing) -> dict[str, dict[str, float]]:
        reference = _reference(prompts.texts)
        return {name: score(frames, _asked(prompts.texts, len(frames)), reference) for name, frames in clips.items()}

    def measure_each(self, clips: FrameArray, prompts: Prompts, timing: Timing) -> dict[str, NDArray[np.float64]]:
        return score_each(track(clips), _asked(prompts.texts, len(clips)), _reference(prompts.texts))


@lru_cache(maxsize=2)  # of the few sets of prompts that a run measures again and again
def _reference(texts: tuple[str, ...]) -> Tracks:
    return track(_rendered(texts, REFERENCE_CLIPS, REFERENCE_SEED))


def _rendered(texts: Sequence[str], clips: int, seed: int) -> FrameArray:
    return render_clips(_asked(texts, clips), seed=seed, physics="teacher")


def _asked(texts: Sequence[str], clips: int) -> list[ToyPrompt]:
    """What each of so many clips shows."""
    asked = [parse_prompt(text) for text in texts]
    return [asked[i % len(asked)] for i in range(clips)]
