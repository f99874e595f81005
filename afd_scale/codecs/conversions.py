"""Between what is stored and what is computed with: uint8 frames and pixels in [-1, 1], float16 and float32."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afd_scale.codecs.codec import RejectedError


def to_unit(frames: NDArray[np.uint8]) -> Tensor:
    """(..., H, W, C) frames to (..., C, H, W) float32 pixels in [-1, 1]."""
    # A copy: arrays over a decoder's or a shard's bytes are read-only, and torch does not share those.
    return (torch.tensor(frames).to(torch.float32) / 127.5 - 1.0).movedim(-1, -3)


def to_uint8(pixels: Tensor) -> NDArray[np.uint8]:
    """(..., C, H, W) pixels in [-1, 1] to (..., H, W, C) frames, clamped and rounded."""
    frames = ((pixels.to(torch.float32) + 1.0) * 127.5).round().clamp(0.0, 255.0).to(torch.uint8)
    return frames.movedim(-3, -1).cpu().numpy()


def to_float16(values: Tensor, what: str) -> NDArray[np.float16]:
    """Convert what float16 can hold.

    Raises:
        RejectedError: a value is not finite, or too large.
    """
    values = values.float()
    largest = values.abs().max().item()
    if not math.isfinite(largest):  # abs and max keep NaN
        raise RejectedError(f"{what} must be finite: it has NaN or infinity")
    if largest > torch.finfo(torch.float16).max:
        raise RejectedError(f"{what} must fit float16: its largest value is {largest:.3g}")
    return values.to(torch.float16).contiguous().cpu().numpy()
