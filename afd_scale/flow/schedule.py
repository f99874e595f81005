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


def denoising_sigmas(timesteps: Sequence[int], shift: float) -> Tensor:
    """(S,) float32 warped noise levels of a few-step sampler, falling; computed in float64."""
    return warp(torch.tensor(timesteps, dtype=torch.float64) / TIMESTEPS, shift).float()
