"""What the suites of the toy worlds share: prompts are read by their words, and the teacher's clips rendered afresh."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from afd_scale.config import RunConfig
from afd_scale.data.worlds import WORLDS
from afd_scale.evaluation.suites.suite import Metric, Timing
from afd_scale.evaluation.suites.tracks import Tracks, track
from afd_scale.mp4 import FrameArray
from afd_scale.types import Prompts

REFERENCE_CLIPS = 1536
REFERENCE_SEED = 1_000_003  # of clips that no shard holds: shards are made with small seeds
TEACHER_SEED = 1_000_004

Each = dict[str, NDArray[np.float64]]


class WorldSuite:
    """A world is the same in every run: nothing of a config counts.

    Attributes:
        world: its name.
    """

    world: ClassVar[str]
    metrics: ClassVar[Mapping[str, Metric]]
    over_time: ClassVar[Mapping[str, Metric]]
    renders_teacher: ClassVar[bool] = True

    def __init__(self, config: RunConfig) -> None:
        pass

    @staticmethod
    def score(clips: FrameArray, asked: Sequence[Any], teacher: Tracks) -> dict[str, float]:
        """All metrics of N clips against what each of them should show and the teacher's tracks."""
        raise NotImplementedError

    @staticmethod
    def score_part(clips: FrameArray, asked: Sequence[Any], teacher: Tracks, start: Tracks) -> dict[str, float]:
        """All of `over_time` of a part of longer clips, against the teacher's of the same time.

        Args:
            start: the teacher's clips, from their launch.
        """
        raise NotImplementedError

    @staticmethod
    def score_each(clips: FrameArray, asked: Sequence[Any], teacher: Tracks) -> Each:
        """(N,) of each metric that one clip has; NaN where it has none."""
        raise NotImplementedError

    def check(self, prompts: Prompts) -> None:
        self._prompts(prompts)

    def teacher(self, prompts: Prompts, clips: int, lengths: int = 1) -> FrameArray:
        """Fresh clips: what a perfect student would score."""
        world = WORLDS[self.world]
        return world.render(cycled(self._prompts(prompts), clips), seed=TEACHER_SEED, frames=lengths * world.frames)

    def measure(self, clips: Mapping[str, FrameArray], prompts: Prompts, timing: Timing) -> dict[str, dict[str, float]]:
        asked, teacher = self._prompts(prompts), self._reference(prompts)
        return {name: self.score(each, cycled(asked, len(each)), teacher) for name, each in clips.items()}

    def measure_part(
        self, clips: Mapping[str, FrameArray], prompts: Prompts, timing: Timing, part: slice
    ) -> dict[str, dict[str, float]]:
        asked, start, teacher = self._prompts(prompts), self._reference(prompts), self._reference(prompts, part.start)
        return {
            name: self.score_part(each[:, part], cycled(asked, len(each)), teacher, start)
            for name, each in clips.items()
        }

    def measure_each(self, clips: FrameArray, prompts: Prompts, timing: Timing) -> Each:
        return self.score_each(clips, cycled(self._prompts(prompts), len(clips)), self._reference(prompts))

    def _prompts(self, prompts: Prompts) -> tuple[Any, ...]:
        """ValueError for the first one that is none of this world."""
        return tuple(WORLDS[self.world].prompt.parse(text) for text in prompts.texts)

    def _reference(self, prompts: Prompts, begin: int = 0) -> Tracks:
        return _kept_tracks(self.world, self._prompts(prompts), REFERENCE_SEED, begin, REFERENCE_CLIPS)


def reference_tracks(world: str, prompts: Sequence[Any], seed: int, begin: int, clips: int) -> Tracks:
    """Of so many of the teacher's clips, or of as long a part of a longer motion from frame `begin` on."""
    return track(WORLDS[world].render(cycled(prompts, clips), seed=seed, begin=begin, frames=WORLDS[world].frames))


_kept_tracks = lru_cache(maxsize=2)(reference_tracks)  # of the few sets of prompts that a run measures again and again


def cycled(prompts: Sequence[Any], clips: int) -> list[Any]:
    """What each of so many clips shows."""
    return [prompts[number % len(prompts)] for number in range(clips)]
