"""Noise levels: the warp, and the few denoising steps."""

from collections.abc import Sequence

import torch
from torch import Tensor

TIMESTEPS = 1000  # the model's timestep is 1000 sigma


def warp(sigma: Tensor, shift: float) -> Tensor:
    """sigma' = s sigma / (1 + (s - 1) sigma): moves the steps towards the noise.

    Source: SD3, arXiv:2403.03206, eq. 23.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def by_frame(sigma: Tensor, lengths: Sequence[int]) -> Tensor:
    """(B, F) levels of the frames of chunks that have so many each, from (B, number of chunks)."""
    levels = zip(sigma.split(1, dim=1), lengths, strict=True)
    return torch.cat([level.expand(-1, length) for level, length in levels], dim=1)


def denoising_sigmas(timesteps: Sequence[int], shift: float) -> Tensor:
    """(S,) float32 warped noise levels of a few-step sampler, falling; computed in float64."""
    return warp(torch.tensor(timesteps, dtype=torch.float64) / TIMESTEPS, shift).float()
