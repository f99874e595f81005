"""What becomes of a run whose gradients are not finite."""

import logging
import math
from collections.abc import Sequence

from afd_scale.config import ConfigError

log = logging.getLogger(__name__)


class Guard:
    """Counts the steps whose updates were left out; all ranks count alike, for a gradient's norm is that of all.

    A few in a row may be chance: they are left out. More are the weights or the data: the run goes back to its newest
    checkpoint, and on from there with the data that comes next. If that ends in the same way, it is neither.

    Args:
        most: left out in a row, before the run goes back.

    Attributes:
        left_out: since this start.
        in_a_row: of them, up to the last step. Whether the weights are good is then unknown, and they are not saved: a
            step whose update was finite, and too large, is perhaps behind it.
    """

    def __init__(self, most: int):
        self.most, self.left_out = most, 0
        self.in_a_row, self._went_back_at = 0, -math.inf

    def see(self, step: int, roles: Sequence[str]) -> bool:
        """See a step that is done.

        Args:
            roles: whose updates it left out.
        Returns:
            Whether the run must go back.
        """
        if not roles:
            self.in_a_row = 0
            return False
        self.left_out += 1
        self.in_a_row += 1
        log.warning("step %d: the gradient of %s is not finite, its update is left out (%d in a row)",
                    step, ", ".join(roles), self.in_a_row)  # fmt: skip
        return self.in_a_row >= self.most

    def go_back(self, step: int, checkpoint: int, roles: Sequence[str]) -> None:
        """Let the run go back once on its way to a step.

        Args:
            checkpoint: step of the newest one; 0 where there is none.
        Raises:
            ConfigError: it did so already, or has nothing to go back to.
        """
        if not checkpoint or step <= self._went_back_at + self.most:
            tried = f", also after going back to step {checkpoint} and on with other data" if checkpoint else ""
            raise ConfigError(f"gradients of {', '.join(roles)} must be finite: those of {self.in_a_row} steps in a "
                              f"row to step {step} are not{tried}. Lower the learning rate, or look at the data; "
                              "earlier checkpoints stand")  # fmt: skip
        log.warning("step %d: going back to step %d, and on with the data that comes next", step, checkpoint)
        self.in_a_row, self._went_back_at = 0, step

    def end(self, step: int, roles: Sequence[str]) -> None:
        """Refuse a last step that was left out.

        Raises:
            ConfigError: it was.
        """
        if self.in_a_row:
            raise ConfigError(f"gradients of {', '.join(roles)} must be finite: those of the last {self.in_a_row} "
                              f"steps, to step {step}, are not, and what came of it is not saved; earlier checkpoints "
                              "stand. Lower the learning rate, or start again with more steps")  # fmt: skip
