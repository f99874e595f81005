"""What the evaluator asks of a suite. Clips are uint8, (N, T, H, W) or (N, T, H, W, 3), clip i of prompt i modulo P."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from afd_scale.config import RunConfig
from afd_scale.mp4 import FrameArray
from afd_scale.types import Prompts

Better = Literal["lower", "higher", "teacher"]


@dataclass(frozen=True)
class Metric:
    """How to read one metric."""

    label: str
    better: Better | None
    """`teacher`: the closer to the teacher's value, the better; None where that is not known."""
    meaning: str


@dataclass(frozen=True)
class Timing:
    """When the frames of clips are shown and made.

    Attributes:
        fps: frames a second.
        borders: the first frame of every chunk but the first.
    """

    fps: float
    borders: tuple[int, ...]


def parts_of(frames: int, lengths: int) -> list[slice]:
    """The frames of each part of a clip that is `lengths` times as long as the teacher's of so many frames."""
    return [slice(number * frames, (number + 1) * frames) for number in range(lengths)]


class Suite(Protocol):
    """Measures what policies made of the same prompts.

    Attributes:
        metrics: what it may measure, in the order of the report.
        over_time: what it may measure of any part of a video longer than the teacher's; each means the same in all.
        renders_teacher: the teacher's clips are the suite's; otherwise they are the data's.
    """

    metrics: ClassVar[Mapping[str, Metric]]
    over_time: ClassVar[Mapping[str, Metric]]
    renders_teacher: ClassVar[bool]

    def __init__(self, config: RunConfig) -> None: ...

    def check(self, prompts: Prompts) -> None:
        """Raises ValueError for the first prompt that it cannot read."""
        ...

    def teacher(self, prompts: Prompts, clips: int, lengths: int = 1) -> FrameArray:
        """So many clips, to be shown and measured beside the policies'; where it renders them.

        Args:
            lengths: how often as long as the data's; their start is the same.
        """
        ...

    def measure(self, clips: Mapping[str, FrameArray], prompts: Prompts, timing: Timing) -> dict[str, dict[str, float]]:
        """Metrics of each policy's clips, by policy."""
        ...

    def measure_part(
        self, clips: Mapping[str, FrameArray], prompts: Prompts, timing: Timing, part: slice
    ) -> dict[str, dict[str, float]]:
        """Those of `over_time` of a part of each policy's long clips, by policy; NaN where none can be measured.

        Args:
            timing: of the whole clips.
            part: its frames, as many as the teacher's clips have.
        """
        ...

    def measure_each(self, clips: FrameArray, prompts: Prompts, timing: Timing) -> dict[str, NDArray[np.float64]]:
        """By metric, (N,) of each clip; their means, without NaN, are those of `measure`.

        Metrics of a set as a whole are not in it. NaN stands where a clip cannot be measured.
        """
        ...
