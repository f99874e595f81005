"""Noise levels: the warp, the few denoising steps, and the draws for training."""

from collections.abc import Sequence

import torch
from torch import Tensor

from afd_scale.flow.randomness import Randomness

TIMESTEPS = 1000  # the model's timestep is 1000 sigma


def warp(sigma: Tensor, shift: float) -> Tensor:
    """sigma' = s sigma / (1 + (s - 1) sigma): moves the steps towards the noise.

    Source: SD3, arXiv:2403.03206, eq. 23.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def denoising_sigmas(timesteps: Sequence[int], shift: float) -> Tensor:
    """(S,) float32 warped noise levels of a few-step sampler, falling; computed in float64."""
    return warp(torch.tensor(timesteps, dtype=torch.float64) / TIMESTEPS, shift).float()


def draw_sigmas(
    randomness: Randomness, stream: str, step: int, samples: Sequence[int], num_chunks: int,
    *, name: str, steps: Tensor, shift: float, mean: float, deviation: float, device: torch.device,
) -> Tensor:  # fmt: skip
    """Training noise levels, one for each chunk of each sample.

    Args:
        name: `steps` (one of `steps`), `uniform`, or `logit_normal` (warped by `shift`).
    Returns:
        (B, num_chunks) in [0, 1].
    """
    if name == "logit_normal":
        normal = randomness.normal(stream, step, samples, (num_chunks,), device)
        return warp(torch.sigmoid(mean + deviation * normal), shift)
    uniform = randomness.uniform(stream, step, samples, (num_chunks,), device)
    if name == "uniform":
        return uniform
    return steps.to(device, non_blocking=True)[(uniform * len(steps)).long().clamp(max=len(steps) - 1)]
