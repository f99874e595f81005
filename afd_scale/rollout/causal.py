"""Few-step causal rollout: a video chunk by chunk, each chunk denoised given the cached clean ones before it."""

import torch
from torch import Tensor

from afd_scale.flow.process import add_noise, x0_from_velocity
from afd_scale.flow.schedule import TIMESTEPS
from afd_scale.protocols import Policy


@torch.no_grad()
def rollout(policy: Policy, text: Tensor, noise: Tensor, renoise: Tensor, sigmas: Tensor) -> Tensor:
    """Generate videos.

    Each step predicts the clean chunk and re-noises it to the next level; a last pass on the clean chunk at timestep 0
    leaves its keys and values in the cache. The number of passes is the same on every rank.

    Args:
        text: (B, T, E) embeddings.
        noise: (B, F, C, H, W) initial noise.
        renoise: (S - 1, B, F, C, H, W) fresh noise after each step but the last.
        sigmas: (S,) falling noise levels.
    Returns:
        (B, F, C, H, W) clean latents.
    """
    cache = policy.new_cache(noise.shape[1])
    frames, chunk = noise.shape[1], cache.chunk_frames
    sigmas = sigmas.to(noise.device, non_blocking=True)
    levels = sigmas[:, None, None].expand(-1, noise.shape[0], chunk)  # (S, B, chunk)
    clean = torch.empty_like(noise)
    for start in range(0, frames, chunk):
        here = slice(start, start + chunk)
        x = noise[:, here]
        for step, sigma in enumerate(levels):
            velocity = policy(x, sigma * TIMESTEPS, text, cache=cache)
            x0 = x0_from_velocity(x, velocity, sigma)
            if step + 1 < len(levels):
                x = add_noise(x0, renoise[step, :, here], levels[step + 1])
        clean[:, here] = x0
        if start + chunk < frames:
            policy(x0, torch.zeros_like(levels[0]), text, cache=cache)
            cache.advance()
    return clean
