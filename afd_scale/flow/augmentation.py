"""Changes of a video's pixels that leave its physics as it is, for judges to look past what is trivial."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BRIGHTNESS = (0.8, 1.25)  # of light, a factor
SHIFT = 1 / 8  # of a frame's height and width, to either side


@dataclass(frozen=True)
class Change:
    """One of them.

    Attributes:
        mirror: left and right are swapped.
        brightness: factor of light.
        rows, columns: that the picture moves by, as shares of its height and width; its border is repeated behind it.
    """

    mirror: bool = False
    brightness: float = 1.0
    rows: float = 0.0
    columns: float = 0.0

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, T, C, H, W) in [-1, 1], and so is what comes back."""
        if self.mirror:
            pixels = pixels.flip(-1)
        for axis, share in ((-2, self.rows), (-1, self.columns)):
            size = pixels.shape[axis]
            if moved := round(share * size):
                source = (torch.arange(size, device=pixels.device) - moved).clamp(0, size - 1)
                pixels = pixels.index_select(axis, source)
        return pixels if self.brightness == 1 else ((pixels + 1) * self.brightness - 1).clamp(-1, 1)


def change_of(kinds: Sequence[str], uniform: Sequence[float]) -> Change:
    """The change that four uniform numbers on [0, 1) stand for.

    Args:
        kinds: of `mirror`, `brightness`, `shift`; the others are left out.
    """
    mirror, light, down, right = uniform
    dark, bright = BRIGHTNESS
    return Change(
        mirror="mirror" in kinds and mirror < 0.5,
        brightness=dark * (bright / dark) ** light if "brightness" in kinds else 1.0,
        rows=SHIFT * (2 * down - 1) if "shift" in kinds else 0.0,
        columns=SHIFT * (2 * right - 1) if "shift" in kinds else 0.0,
    )
