"""A method whose steps last as long as a test wants: supervised fine-tuning that waits before each micro-batch."""

import time
from pathlib import Path
from typing import Literal

from torch import Tensor

from afd_scale.config.methods import SftConfig
from afd_scale.methods.sft import Sft
from afd_scale.protocols import Metrics
from afd_scale.types import Videos

NAME = "tests.launchers.held:HeldConfig"


class HeldConfig(SftConfig):
    """Supervised fine-tuning; while the file `hold` exists, a micro-batch takes so many seconds more."""

    step = "tests.launchers.held:Held"
    name: Literal["tests.launchers.held:HeldConfig"] = NAME  # type: ignore[assignment]
    hold: Path
    seconds: float


class Held(Sft):
    """The steps of it."""

    def _loss(self, videos: Videos, step: int) -> tuple[Tensor, Metrics]:
        assert isinstance(self.config, HeldConfig)
        until = time.monotonic() + self.config.seconds
        while self.config.hold.exists() and time.monotonic() < until:
            time.sleep(0.05)
        return super()._loss(videos, step)
