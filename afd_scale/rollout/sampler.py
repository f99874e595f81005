"""Few-step causal generation: a video chunk by chunk, each chunk denoised given the cached clean ones before it.

And the noise levels to train at, which follow the sampler's own.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise

import torch
from torch import Tensor

from afd_scale.chunks import Chunks
from afd_scale.config.methods.method import SigmaConfig
from afd_scale.config.sampler import SamplerConfig
from afd_scale.flow.process import add_noise, x0_from_velocity
from afd_scale.flow.randomness import Randomness
from afd_scale.flow.schedule import TIMESTEPS, by_frame, denoising_sigmas, warp
from afd_scale.protocols import Policy

Text = Tensor | Callable[[int], Tensor]
"""(B, T, E) embeddings of all chunks, or what gives those of a chunk by its number, the first is 0.

It is asked for each chunk once, in order, when that is about to begin; while the text stays it gives the same object.
"""


def scheduled(texts: Sequence[tuple[int, Tensor]]) -> Text:
    """The texts of a schedule.

    Args:
        texts: the chunk at which each begins, rising from 0, and its (B, T, E) embeddings.
    Raises:
        ValueError: the chunks do not rise from 0.
    """
    starts = [start for start, _ in texts]
    if starts[:1] != [0] or any(later <= earlier for earlier, later in pairwise(starts)):
        raise ValueError(f"starts ({starts}) must rise from 0: each text begins at a chunk after the one before it")
    return lambda chunk: texts[bisect_right(starts, chunk) - 1][1]


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

    @property
    def frames(self) -> int:
        """Latent frames of the videos."""
        return self.initial.shape[1]

    def until(self, frames: int) -> "Noise":
        """Of the beginnings of the videos, so many latent frames."""
        return replace(self, initial=self.initial[:, :frames], again=self.again[:, :, :frames])

    def of_chunk(self, chunk: int, chunks: Chunks) -> "Noise":
        frames = slice(chunks.start(chunk), chunks.start(chunk + 1))
        return Noise(self.initial[:, frames], self.again[:, :, frames])


@dataclass(frozen=True)
class NoiseStream:
    """The same for videos that may go on without an end: the noise of a chunk is drawn when that is about to begin.

    Attributes:
        draw: from the number of a chunk to its noise; it is asked for each once.
        frames: latent frames of the videos; None has no end.
        given: as of `Noise`.
    """

    draw: Callable[[int], Noise]
    frames: int | None = None
    given: Tensor | None = None

    def of_chunk(self, chunk: int, chunks: Chunks) -> Noise:
        return self.draw(chunk)


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
        device: torch.device, *, given: Tensor | None = None,
    ) -> Noise:  # fmt: skip
        """Noise for (F, C, H, W) videos, each of its own key; `given` as of `Noise`."""
        again = (max(len(self.sigmas), len(self.first_sigmas)) - 1, *shape)
        return Noise(
            randomness.normal(f"{stream}/noise", step, keys, shape, device),
            randomness.normal(f"{stream}/renoise", step, keys, again, device).transpose(0, 1), given,
        )  # fmt: skip

    def stream(
        self, randomness: Randomness, stream: str, step: int, keys: Sequence[int], shape: tuple[int, ...],
        device: torch.device, *, frames: int | None = None, given: Tensor | None = None,
    ) -> NoiseStream:  # fmt: skip
        """Noise for videos of (C, H, W) latent frames, drawn chunk by chunk: other numbers than `draw` gives, and the
        same however long the video becomes.

        Args:
            frames: of the videos; None has no end.
            given: as of `Noise`.
        Raises:
            ValueError: it has no end, and no window.
        """
        if frames is None and self.config.window_frames is None:
            raise ValueError("frames (None) must be given without sampler.window_frames: a chunk sees all before it")

        def draw(chunk: int) -> Noise:
            chunk_shape = (len(self.config.chunks.frames(chunk)), *shape)
            return self.draw(randomness, f"{stream}/chunk {chunk}", step, keys, chunk_shape, device)

        return NoiseStream(draw, frames, given)

    def rollout(self, policy: Policy, text: Text, noise: Noise) -> Tensor:
        """(B, F, C, H, W) clean latents of whole videos; arguments as of `chunks`."""
        return torch.cat(list(self.chunks(policy, text, noise)), dim=1)

    def chunks(self, policy: Policy, text: Text, noise: Noise | NoiseStream) -> Iterator[Tensor]:
        """Clean chunks one after the other, (B, f, C, H, W) each, as they are generated; arguments as `last_steps`."""
        return (chunk for _, chunk in self.last_steps(policy, text, noise))

    @torch.no_grad()
    def last_steps(
        self, policy: Policy, text: Text, noise: Noise | NoiseStream, exit: float = 1.0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The last denoising step of each chunk: what it saw and the clean chunk that it predicted, (B, f, C, H, W).

        A last pass on a clean chunk at timestep 0 leaves its keys and values in the cache; where that has room, the
        next chunk's first step is part of the same pass. The number of passes is the same on every rank.

        Between two chunks nothing runs: what a live source says when it is asked for the next chunk's text is what that
        chunk is made of. Memory does not grow with the length of a video that has a window.

        Args:
            text: of all chunks, or of each; where it changes, `sampler.at_prompt_change` says what is cached.
            exit: the part of a chunk's denoising steps after which it is taken as it is, in (0, 1]; rounded up.
        """
        chunks = self.config.chunks
        given = 0 if noise.given is None else noise.given.shape[1]
        assert chunks.are_whole(given), "what is given is whole chunks"
        text_of = (lambda _: text) if isinstance(text, Tensor) else text
        cache, kept = policy.new_cache(noise.frames), dict[int, Tensor]()
        reading, drawn = text_of(0), noise.of_chunk(0, chunks)
        begun: Tensor | None = None  # velocity of a chunk's first step, where it was part of the pass before
        for number in count():
            after, stop = number + 1, chunks.start(number + 1)
            if noise.given is not None and stop <= given:
                noisy = chunk = noise.given[:, chunks.start(number) : stop]
            else:
                noisy, chunk = _denoise(policy, reading, drawn, self._until(exit, number), cache, begun)
            yield noisy, chunk
            if stop == noise.frames:
                return
            read, reading, drawn, begun = reading, text_of(after), noise.of_chunk(after, chunks), None
            if not isinstance(text, Tensor):  # what the next chunk sees may have to be encoded again
                kept[number] = chunk
                kept = {past: kept[past] for past in self.config.past_of(after)}
            if reading is not read and self.config.at_prompt_change == "recompute":
                cache.restart(next(iter(kept), after))
                for past, following in pairwise([*kept, after]):
                    policy(kept[past], _time_of(kept[past], 0.0), reading, cache=cache)
                    cache.advance(to=following)
                continue
            if reading is read and stop >= given and cache.has_room_ahead:
                next_time = (self._until(exit, after)[0] * TIMESTEPS).item()
                both = torch.cat([chunk, drawn.initial], dim=1)
                times = torch.cat([_time_of(chunk, 0.0), _time_of(drawn.initial, next_time)], dim=1)
                begun = policy(both, times, read, cache=cache)[:, chunk.shape[1] :]
            else:
                policy(chunk, _time_of(chunk, 0.0), read, cache=cache)
            if reading is not read:
                cache.forget_text()
            cache.advance()

    def last_sigmas(self, exit: float, latents: Tensor) -> Tensor:
        """(B, F) noise levels of the last denoising steps of (B, F, C, H, W) videos, all of whose chunks are generated;
        `exit` as in `last_steps`."""
        levels = torch.stack([self._until(exit, self.config.chunks.count(frame))[-1]
                              for frame in range(latents.shape[1])])  # fmt: skip
        return levels.to(latents.device, non_blocking=True).expand(len(latents), -1)

    def _until(self, exit: float, chunk: int) -> Tensor:
        """Levels of a chunk's denoising steps up to its exit; 0 is the first chunk."""
        sigmas = self.sigmas if chunk else self.first_sigmas
        return sigmas[: math.ceil(exit * len(sigmas))]

    def draw_sigma(
        self, config: SigmaConfig, randomness: Randomness, stream: str, step: int, keys: Sequence[int], latents: Tensor,
        begun: Sequence[bool] | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, F) noise levels in [0, 1] to train on (B, F, C, H, W) latents, one for each chunk of each video.

        Args:
            begun: B, whether the first chunk is a later one of a longer video; None is of none.
        """
        begin = self.config.chunks.start(1) if begun is not None and all(begun) else 0
        lengths = self.config.chunks.lengths(begin + latents.shape[1], begin)
        count, device = (len(lengths),), latents.device
        if config.name == "logit_normal":
            normal = randomness.normal(stream, step, keys, count, device)
            sigma = warp(torch.sigmoid(config.mean + config.deviation * normal), self.config.timestep_shift)
        else:
            sigma = randomness.uniform(stream, step, keys, count, device)
            if config.name == "steps":
                first = _pick(self.first_sigmas, sigma[:, :1])
                if begun is not None:
                    is_later = torch.tensor(begun).to(device, non_blocking=True)[:, None]
                    first = torch.where(is_later, _pick(self.sigmas, sigma[:, :1]), first)
                sigma = torch.cat([first, _pick(self.sigmas, sigma[:, 1:])], dim=1)
        return by_frame(sigma, lengths)


def _time_of(latents: Tensor, timestep: float) -> Tensor:
    """(B, F) of latents of one level."""
    return latents.new_full(latents.shape[:2], timestep, dtype=torch.float32)


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
