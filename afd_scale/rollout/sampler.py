"""Few-step causal generation: a video chunk by chunk, each chunk denoised given the cached clean ones before it.

And the noise levels to train at, which follow the sampler's own.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_scale.config.methods.method import SigmaConfig
from afd_scale.config.sampler import SamplerConfig
from afd_scale.flow.process import add_noise, x0_from_velocity
from afd_scale.flow.randomness import Randomness
from afd_scale.flow.schedule import TIMESTEPS, denoising_sigmas, warp
from afd_scale.protocols import Policy


@dataclass(frozen=True)
class Noise:
    """What a rollout starts from and is noised with again.

    Attributes:
        initial: (B, F, C, H, W).
        again: (S - 1, B, F, C, H, W), fresh after each step but the last.
        given: (B, f, C, H, W) clean latents of the first chunks, which are not generated: an image or a video to go on
            from; None where all are generated.
    """

    initial: Tensor
    again: Tensor
    given: Tensor | None = None

    def __getitem__(self, frames: slice) -> "Noise":
        return Noise(self.initial[:, frames], self.again[:, :, frames])


class Sampler:
    """Generates with a policy.

    Attributes:
        sigmas, first_sigmas: (S,) falling noise levels of a chunk, and of the first one.
    """

    def __init__(self, config: SamplerConfig):
        self.config = config
        self.first_sigmas, self.sigmas = (
            denoising_sigmas(config.timesteps_of(chunk), config.timestep_shift) for chunk in (0, 1)
        )

    def draw(
        self, randomness: Randomness, stream: str, step: int, keys: Sequence[int], shape: tuple[int, ...],
        device: torch.device,
    ) -> Noise:  # fmt: skip
        """Noise for (F, C, H, W) videos, each of its own key."""
        again = (max(len(self.sigmas), len(self.first_sigmas)) - 1, *shape)
        return Noise(
            randomness.normal(f"{stream}/noise", step, keys, shape, device),
            randomness.normal(f"{stream}/renoise", step, keys, again, device).transpose(0, 1),
        )

    def rollout(self, policy: Policy, text: Tensor, noise: Noise) -> Tensor:
        """(B, F, C, H, W) clean latents of whole videos; arguments as of `chunks`."""
        return torch.cat(list(self.chunks(policy, text, noise)), dim=1)

    def chunks(self, policy: Policy, text: Tensor, noise: Noise) -> Iterator[Tensor]:
        """Clean chunks one after the other, (B, f, C, H, W) each, as they are generated; arguments as `last_steps`."""
        return (chunk for _, chunk in self.last_steps(policy, text, noise))

    @torch.no_grad()
    def last_steps(
        self, policy: Policy, text: Tensor, noise: Noise, exit: float = 1.0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The last denoising step of each chunk: what it saw and the clean chunk that it predicted, (B, f, C, H, W).

        A last pass on a clean chunk at timestep 0 leaves its keys and values in the cache; where that has room, the
        next chunk's first step is part of the same pass. The number of passes is the same on every rank.

        Args:
            text: (B, T, E) embeddings.
            exit: the part of a chunk's denoising steps after which it is taken as it is, in (0, 1]; rounded up.
        """
        frames, chunk_frames = noise.initial.shape[1], self.config.chunk_frames
        given = 0 if noise.given is None else noise.given.shape[1]
        assert given % chunk_frames == 0, "what is given is whole chunks"
        cache = policy.new_cache(frames)
        begun: Tensor | None = None  # velocity of a chunk's first step, where it was part of the pass before
        for start in range(0, frames, chunk_frames):
            here, after = slice(start, start + chunk_frames), slice(start + chunk_frames, start + 2 * chunk_frames)
            if noise.given is not None and start < given:
                noisy = chunk = noise.given[:, here]
            else:
                noisy, chunk = _denoise(policy, text, noise[here], self._until(exit, start), cache, begun)
            yield noisy, chunk
            if after.start == frames:
                return
            clean_time = chunk.new_zeros(chunk.shape[:2], dtype=torch.float32)
            if after.start >= given and cache.has_room_ahead:
                next_noise = noise.initial[:, after]
                next_time = torch.full_like(clean_time, (self._until(exit, after.start)[0] * TIMESTEPS).item())
                both, times = torch.cat([chunk, next_noise], dim=1), torch.cat([clean_time, next_time], dim=1)
                begun = policy(both, times, text, cache=cache)[:, chunk_frames:]
            else:
                policy(chunk, clean_time, text, cache=cache)
                begun = None
            cache.advance()

    def last_sigmas(self, exit: float, latents: Tensor) -> Tensor:
        """(B, F) noise levels of the last denoising steps of (B, F, C, H, W) videos, all of whose chunks are generated;
        `exit` as in `last_steps`."""
        levels = torch.stack([self._until(exit, frame // self.config.chunk_frames)[-1]
                              for frame in range(latents.shape[1])])  # fmt: skip
        return levels.to(latents.device, non_blocking=True).expand(len(latents), -1)

    def _until(self, exit: float, chunk: int) -> Tensor:
        """Levels of a chunk's denoising steps up to its exit; 0 is the first chunk."""
        sigmas = self.sigmas if chunk else self.first_sigmas
        return sigmas[: math.ceil(exit * len(sigmas))]

    def draw_sigma(
        self, config: SigmaConfig, randomness: Randomness, stream: str, step: int, keys: Sequence[int], latents: Tensor
    ) -> Tensor:
        """(B, F) noise levels in [0, 1] to train on (B, F, C, H, W) latents, one for each chunk of each video."""
        chunks, device = (latents.shape[1] // self.config.chunk_frames,), latents.device
        if config.name == "logit_normal":
            normal = randomness.normal(stream, step, keys, chunks, device)
            sigma = warp(torch.sigmoid(config.mean + config.deviation * normal), self.config.timestep_shift)
        else:
            sigma = randomness.uniform(stream, step, keys, chunks, device)
            if config.name == "steps":
                sigma = torch.cat([_pick(self.first_sigmas, sigma[:, :1]), _pick(self.sigmas, sigma[:, 1:])], dim=1)
        return sigma.repeat_interleave(self.config.chunk_frames, dim=1)


def _pick(sigmas: Tensor, uniform: Tensor) -> Tensor:
    """One of the levels for each number in [0, 1)."""
    index = (uniform * len(sigmas)).long().clamp(max=len(sigmas) - 1)
    return sigmas.to(uniform.device, non_blocking=True)[index]


def _denoise(
    policy: Policy, text: Tensor, noise: Noise, sigmas: Tensor, cache: object, begun: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the last step saw, and the clean chunk: each step predicts it, and noises that to the next level.

    Args:
        begun: velocity of the first step, where there is one already.
    """
    x = noise.initial
    levels = sigmas.to(x.device, non_blocking=True)[:, None, None].expand(-1, *x.shape[:2])  # (S, B, f)
    for step, sigma in enumerate(levels):
        velocity = policy(x, sigma * TIMESTEPS, text, cache=cache) if step or begun is None else begun
        x0 = x0_from_velocity(x, velocity, sigma)
        if step + 1 < len(levels):
            x = add_noise(x0, noise.again[step], levels[step + 1])
    return x, x0
