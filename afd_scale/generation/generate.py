"""Generate videos chunk by chunk, and write each as it grows."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afd_scale.codecs.codec import ChunkDecoder
from afd_scale.codecs.conversions import to_uint8
from afd_scale.evaluation.video import writing_mp4
from afd_scale.flow.randomness import Randomness
from afd_scale.mp4 import FrameArray
from afd_scale.protocols import Policy
from afd_scale.rollout.sampler import Noise, Sampler, Text, scheduled
from afd_scale.types import Prompts, pieces


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
        prompt: its row among the prompts, that names it.
        key: of its noise.
        path: of its mp4.
        texts: the chunk at which each of its prompts begins, the first at 0, and their rows; none is `prompt` alone.
        start: (f, C, H, W) clean latents of its first chunks, given; None generates them too. All requests of a job
            have as many, or none has any.
    """

    prompt: int
    key: int
    path: Path
    texts: tuple[tuple[int, int], ...] = ()
    start: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def schedule(self) -> tuple[tuple[int, int], ...]:
        """All prompts that it is made of."""
        return self.texts or ((0, self.prompt),)

    @property
    def starts(self) -> tuple[int, ...]:
        """The chunks at which a prompt begins: videos that are made together have the same."""
        return tuple(start for start, _ in self.schedule)


def batches(requests: Sequence[Request], at_once: int) -> list[list[Request]]:
    """Requests that are made together, at most so many; those whose prompts change elsewhere are not."""
    groups = [list(group) for _, group in groupby(requests, lambda request: request.starts)]
    return [group[part] for group in groups for part in pieces(len(group), at_once)]


@dataclass(frozen=True)
class Form:
    """What every video has.

    Attributes:
        latent_shape: (F, C, H, W), whole chunks.
        frames: of the mp4; what the last chunk has beyond them is cut.
        fps: frames a second.
    """

    latent_shape: tuple[int, int, int, int]
    frames: int
    fps: float


class Generator:
    """Makes videos with a policy.

    Args:
        decoder: makes a decoder for a batch of videos, `Codec.decoder`; None on a rank that only helps with tokens.
        note: kept in every file, as JSON, beside its prompt.
    """

    def __init__(
        self, policy: Policy, sampler: Sampler, form: Form, device: torch.device, *, seed: int,
        decoder: Callable[[], ChunkDecoder] | None, note: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        self.policy, self.sampler, self.decoder, self.form = policy, sampler, decoder, form
        self.device, self.randomness, self.note = device, Randomness(seed), note or {}
        self.clock = Clock(device)

    def write(self, prompts: Prompts, requests: Sequence[Request]) -> Iterator[None]:
        """Make a batch of videos and write them; yields after each chunk. A file appears when it is whole.

        Args:
            prompts: that requests are of.
            requests: whose prompts begin at the same chunks.
        """
        noise = self.noise(requests)
        chunks = self.sampler.chunks(self.policy, self._text(prompts, requests), noise)
        if self.decoder is None:
            yield from (None for _ in chunks)
            return
        left = self.form.frames
        with ExitStack() as stack:
            writers = [
                stack.enter_context(
                    writing_mp4(
                        request.path,
                        self.form.fps,
                        title=prompts.texts[request.prompt],
                        comment=json.dumps(self._note(prompts, request)),
                    )
                )
                for request in requests
            ]
            for frames in self.clock.frames(chunks, self.decoder()):
                for write, video in zip(writers, frames, strict=True):
                    write(video[:left])
                left -= frames.shape[1]
                yield

    def _text(self, prompts: Prompts, requests: Sequence[Request]) -> Text:
        (starts,) = {request.starts for request in requests}
        schedules = zip(*(request.schedule for request in requests), strict=True)  # by start, of all videos
        texts = [prompts.embeddings[[row for _, row in begun]].to(self.device) for begun in schedules]
        return texts[0] if len(texts) == 1 else scheduled(list(zip(starts, texts, strict=True)))

    def _note(self, prompts: Prompts, request: Request) -> Mapping[str, Any]:
        """What a file says of itself: of several prompts, also those and the chunks at which they begin."""
        if not request.texts:
            return self.note
        return {**self.note, "chunks": [[start, prompts.texts[row]] for start, row in request.texts]}

    def noise(self, requests: Sequence[Request]) -> Noise:
        """What videos start from."""
        keys, starts = [request.key for request in requests], [request.start for request in requests]
        given = [start for start in starts if start is not None]
        return self.sampler.draw(
            self.randomness, "generation", 0, keys, self.form.latent_shape, self.device,
            given=torch.stack(given).to(self.device) if given else None,
        )  # fmt: skip
