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
    """Supervised fine-tuning; a micro-batch takes as many seconds more as the file `hold` says, while it exists."""

    step = "tests.launchers.held:Held"
    name: Literal["tests.launchers.held:HeldConfig"] = NAME  # type: ignore[assignment]
    hold: Path


class Held(Sft):
    """The steps of it."""

    def _loss(self, videos: Videos, step: int) -> tuple[Tensor, Metrics]:
        assert isinstance(self.config, HeldConfig)
        began = time.monotonic()
        while time.monotonic() < began + seconds_in(self.config.hold):
            time.sleep(0.05)
        return super()._loss(videos, step)


def seconds_in(hold: Path) -> float:
    """0 where there is no such file."""
    try:
        return float(hold.read_text())
    except FileNotFoundError:
        return 0.0
