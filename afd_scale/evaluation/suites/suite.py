"""What the evaluator asks of a suite. Clips are uint8, (N, T, H, W) or (N, T, H, W, 3), clip i of prompt i modulo P."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from afd_scale.config import RunConfig
from afd_scale.evaluation.video import FrameArray
from afd_scale.types import Prompts

Better = Literal["lower", "higher", "teacher"]


@dataclass(frozen=True)
class Metric:
    """How to read one metric."""

    label: str
    better: Better | None
    """`teacher`: the closer to the teacher's value, the better; None where that is not known."""
    meaning: str


class Suite(Protocol):
    """Measures what policies made of the same prompts.

    Attributes:
        metrics: what it may measure, in the order of the report.
    """

    metrics: ClassVar[Mapping[str, Metric]]

    def __init__(self, config: RunConfig) -> None: ...

    def check(self, prompts: Prompts) -> None:
        """Raises ValueError for the first prompt that it cannot read."""
        ...

    def teacher(self, prompts: Prompts, clips: int) -> FrameArray | None:
        """The teacher's clips, to be shown and measured beside the policies'; None where there are none."""
        ...

    def measure(self, clips: Mapping[str, FrameArray], prompts: Prompts) -> dict[str, dict[str, float]]:
        """Metrics of each policy's clips, by policy."""
        ...
