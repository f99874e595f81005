"""How long a run takes from being told to stop to having saved: what a scheduler must grant it before it kills."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from afd_scale.config.cast import Pass

WRITE_BYTES_PER_SECOND = 0.5e9  # of one rank's part of a checkpoint, fsync included; assumed
_LOOKS = 2  # a stop is asked for at one look and answered at the next
_MARGIN_SECONDS = 10.0  # for a launcher to pass the signal on


@dataclass(frozen=True)
class Stopping:
    """Of one rank.

    Attributes:
        stretch: seconds between two looks, a micro-batch of the longest.
        writing: seconds for its part of a checkpoint.
    """

    stretch: float
    writing: float

    @property
    def seconds(self) -> float:
        return _LOOKS * self.stretch + self.writing

    @property
    def lead(self) -> int:
        """What a scheduler should grant, in whole half minutes."""
        return 30 * -(-int(self.seconds + _MARGIN_SECONDS) // 30)


def plan_stopping(seconds: Mapping[str, float], phases: Mapping[str, Sequence[Pass]], written: int) -> Stopping:
    """A step that updates the student several times brings the rest of its updates on top.

    Args:
        seconds: of each phase of a step.
        written: bytes of a rank's part of a checkpoint.
    """
    runs = {phase: sum(each.runs / each.every for each in passes) for phase, passes in phases.items()}
    stretch = max(seconds[phase] / max(1.0, count) for phase, count in runs.items())
    return Stopping(stretch, written / WRITE_BYTES_PER_SECOND)
