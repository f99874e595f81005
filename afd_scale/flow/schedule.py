"""Noise levels: the warp, the few denoising steps, and the draws for training."""

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class SigmaDraw:
    """Draws training noise levels, one for each chunk of each sample.

    Attributes:
        name: `steps` (one of `steps`), `uniform`, or `logit_normal` (mean and deviation; warped by `shift`).
        steps, first_steps: (S,) noise levels of the sampler, and those of its first chunk.
    """

    name: str
    steps: Tensor
    first_steps: Tensor
    shift: float
    mean: float
    deviation: float
    chunk_frames: int

    def __call__(
        self, randomness: Randomness, stream: str, step: int, samples: Sequence[int], latents: Tensor
    ) -> Tensor:
        """(B, F) levels in [0, 1] for (B, F, C, H, W) latents, equal inside a chunk."""
        chunks, device = (latents.shape[1] // self.chunk_frames,), latents.device
        if self.name == "logit_normal":
            normal = randomness.normal(stream, step, samples, chunks, device)
            sigma = warp(torch.sigmoid(self.mean + self.deviation * normal), self.shift)
        else:
            sigma = randomness.uniform(stream, step, samples, chunks, device)
            if self.name == "steps":
                sigma = torch.cat([_pick(self.first_steps, sigma[:, :1]), _pick(self.steps, sigma[:, 1:])], dim=1)
        return sigma.repeat_interleave(self.chunk_frames, dim=1)


def _pick(steps: Tensor, uniform: Tensor) -> Tensor:
    """One of the levels for each number in [0, 1)."""
    index = (uniform * len(steps)).long().clamp(max=len(steps) - 1)
    return steps.to(uniform.device, non_blocking=True)[index]
