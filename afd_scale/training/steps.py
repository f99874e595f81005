"""A step as the trainer sees it from outside: it may be given up, and some of its updates may not be finite."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from afd_scale.checkpoint.run_state import Checkpointed
from afd_scale.engines.resharding import Shards
from afd_scale.training.preemption import StopRequest


@dataclass(frozen=True)
class _Before:
    """A network as it was before the step."""

    shards: Shards

    def snapshot(self, folder: Path) -> Shards:
        return self.shards

    def load(self, folder: Path) -> None:
        raise AssertionError("it is only saved")


class StepWatch:
    """Keeps what a step began with, so that a step that is given up leaves no trace in what is saved.

    Networks are copied to host memory before their first update in a step, but for one: its first update is where the
    step can no longer be given up. So the copies are of the judges, most often, and what is repeated ends with them.

    Args:
        stop: at which the engines look between micro-batches.
        networks: that steps change, by role.
        last: role of the one that is not copied.
        memory: of the method.

    Attributes:
        skipped: roles whose updates in this step, or the last one, were left out: their gradients were not finite.
    """

    def __init__(self, stop: StopRequest, networks: Mapping[str, Checkpointed], last: str, memory: dict[str, Tensor]):
        self._stop, self._networks, self._last, self._memory = stop, networks, last, memory
        self._before: dict[str, _Before] = {}
        self._remembered: dict[str, Tensor] = {}
        self._is_kept = False
        self.skipped: list[str] = []

    def between(self) -> None:
        self._stop.between()

    def updating(self, engine: Any) -> None:
        role = self._role(engine)
        if not self._is_kept or self._stop.holds or role in self._before:
            return
        if role == self._last or engine.on_nvme:
            self._stop.hold()
        else:
            self._before[role] = _Before(engine.snapshot(Path()))

    def skipping(self, engine: Any) -> None:
        self.skipped.append(self._role(engine))

    @contextmanager
    def step(self, kept: bool) -> Iterator[None]:
        """A step, which forgets what it kept when it ends well, and what the method took from numbers that are not
        finite.

        Args:
            kept: something is saved where it is given up; in a warm-up nothing is.
        """
        self._remembered, self.skipped, self._is_kept = dict(self._memory), [], kept
        with self._stop.step():
            yield
        if self.skipped:
            self._remember()
        self._before, self._remembered = {}, dict(self._memory)

    def given_up(self) -> Mapping[str, Checkpointed]:
        """The networks as they were before the step that was given up; the method's memory is as it was, too."""
        self._remember()
        return {**self._networks, **self._before}

    def _remember(self) -> None:
        self._memory.clear()
        self._memory.update(self._remembered)

    def _role(self, engine: Any) -> str:
        return next(role for role, network in self._networks.items() if network is engine)
