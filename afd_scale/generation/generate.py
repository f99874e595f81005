"""Generate videos chunk by chunk, and write each as it grows."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from afd_scale.codecs.codec import ChunkDecoder
from afd_scale.codecs.conversions import to_uint8
from afd_scale.evaluation.video import writing_mp4
from afd_scale.flow.randomness import Randomness
from afd_scale.mp4 import FrameArray
from afd_scale.protocols import Policy
from afd_scale.rollout.sampler import Noise, Sampler
from afd_scale.types import Prompts


@dataclass
class Clock:
    """Where the time goes; waits for the device, so that a second counts where it is spent.

    Attributes:
        denoising, decoding: seconds so far.
        first_chunk: seconds from the start of the first video to its first decoded chunk; 0 before.
    """

    device: torch.device
    denoising: float = 0.0
    decoding: float = 0.0
    first_chunk: float = 0.0
    _began: float = field(default=0.0, init=False)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def frames(self, chunks: Iterable[Tensor], decode: ChunkDecoder) -> Iterator[FrameArray]:
        """Chunks of latents as (B, t, H, W, C) uint8 frames, both timed."""
        began = self.now()
        for chunk in chunks:
            denoised = self.now()
            frames = to_uint8(decode(chunk))
            decoded = self.now()
            self.denoising += denoised - began
            self.decoding += decoded - denoised
            self.first_chunk = self.first_chunk or decoded - began
            yield frames
            began = self.now()


@dataclass(frozen=True)
class Request:
    """One video to make.

    Attributes:
        prompt: its row among the prompts.
        key: of its noise.
        path: of its mp4.
    """

    prompt: int
    key: int
    path: Path


@dataclass(frozen=True)
class Form:
    """What every video has.

    Attributes:
        latent_shape: (F, C, H, W), whole chunks.
        frames: of the mp4; what the last chunk has beyond them is cut.
        fps: frames a second.
        start: (1, f, C, H, W) clean latents of the first chunks, given; None generates them too.
    """

    latent_shape: tuple[int, int, int, int]
    frames: int
    fps: float
    start: Tensor | None = None


class Generator:
    """Makes videos with a policy.

    Args:
        decoder: makes a decoder for a batch of videos, `Codec.decoder`; None on a rank that only helps with tokens.
        note: kept in every file beside its prompt.
    """

    def __init__(
        self, policy: Policy, sampler: Sampler, form: Form, device: torch.device, *, seed: int,
        decoder: Callable[[], ChunkDecoder] | None, note: str = "",
    ):  # fmt: skip
        self.policy, self.sampler, self.decoder, self.form = policy, sampler, decoder, form
        self.device, self.randomness, self.note = device, Randomness(seed), note
        self.clock = Clock(device)

    def write(self, prompts: Prompts, requests: Sequence[Request]) -> Iterator[None]:
        """Make a batch of videos and write them; yields after each chunk. A file appears when it is whole.

        Args:
            prompts: that requests are of.
        """
        asked = prompts.take([request.prompt for request in requests], [request.key for request in requests])
        chunks = self.sampler.chunks(self.policy, asked.embeddings.to(self.device), self.noise(asked.keys))
        if self.decoder is None:
            yield from (None for _ in chunks)
            return
        left = self.form.frames
        with ExitStack() as stack:
            writers = [
                stack.enter_context(writing_mp4(request.path, self.form.fps, title=text, comment=self.note))
                for request, text in zip(requests, asked.texts, strict=True)
            ]
            for frames in self.clock.frames(chunks, self.decoder()):
                for write, video in zip(writers, frames, strict=True):
                    write(video[:left])
                left -= frames.shape[1]
                yield

    def noise(self, keys: Sequence[int]) -> Noise:
        """What so many videos start from."""
        noise = self.sampler.draw(self.randomness, "generation", 0, keys, self.form.latent_shape, self.device)
        start = self.form.start
        return (
            noise if start is None else replace(noise, given=start.to(self.device).expand(len(keys), *start.shape[1:]))
        )
