"""What makes videos for whoever asks: a student, its codec and the form of its videos, on one device."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from afd_scale.codecs.cleaning import clean_prompt
from afd_scale.codecs.codec import Codec, VideoForm
from afd_scale.codecs.identity import NAME as IDENTITY
from afd_scale.config import ConfigError
from afd_scale.data.worlds.drop import ToyPrompt
from afd_scale.engines.plain import PlainNetwork
from afd_scale.flow.randomness import Randomness
from afd_scale.generation.generate import Clock, Form, Generator, Request
from afd_scale.generation.job import Job, find_codec, latent_form, pixel_form
from afd_scale.generation.requests import embedded, whole_chunks
from afd_scale.generation.student import Student, load_student, sampling
from afd_scale.mp4 import FrameArray
from afd_scale.parallel.ranks import alone
from afd_scale.rollout.sampler import Sampler

Check = Callable[[], None]  # raises where nobody waits any more


@dataclass(frozen=True)
class Figures:
    """How fast a stream is made, so far.

    Attributes:
        denoising, with_decoding: frames a second of the time that the student took, and with the decoder's.
        first_chunk: seconds to the first chunk of frames, from when it was begun.
        memory_bytes: most of the GPU's so far, or of this process.
        memory_of: GPU or process.
    """

    denoising: float
    with_decoding: float
    first_chunk: float
    memory_bytes: int
    memory_of: str


class _Checked:
    """Passes of a network that look before each whether anybody waits for them."""

    def __init__(self, calls: Any, check: Check):
        self._calls, self._check = calls, check

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        self._check()
        prediction: Tensor = self._calls(*arguments, **options)
        return prediction

    def __getattr__(self, name: str) -> Any:
        return getattr(self._calls, name)


class Studio:
    """Makes videos, one at a time: its methods that take a `check` are for one thread.

    Args:
        job: says the source, the form of its videos and its sampler. A student that has no window sees, from there
            on, as many latent frames as the videos that it learned from have: a stream is longer than any cache.
    Attributes:
        name: of the student.
        pixels: form of a video that nothing else is asked of.
    Raises:
        ValueError, OSError: the source cannot be read, or has not these forms.
    """

    def __init__(self, job: Job, name: str):
        ranks = alone()
        self.name, self.job, self.device = name, job, ranks.device
        precision = job.precision or ("bf16" if self.device.type == "cuda" else "fp32")
        self.student: Student = load_student(job.source, ranks, precision=precision, architecture=job.architecture,
                                             family=job.family)  # fmt: skip
        self.codec: Codec = find_codec(job, self.student, None, self.device)
        self.pixels: VideoForm = pixel_form(job, self.student, None, self.codec)
        sampler = self.student.policy.sampler
        learned = whole_chunks(self.pixels.frames, self.codec, sampler.chunks)
        sink = 0 if sampler.chunks.are_alike else sampler.chunks.start(1)  # a first chunk of another length stays
        window = {"window_frames": sampler.window_frames or learned, "sink_frames": sampler.sink_frames or sink}
        self.student = sampling(self.student, **window | job.sampler)
        self.sampler = Sampler(self.student.policy.sampler)
        self.form(self.pixels.frames)  # what is wrong with it is said before anybody asks

    @property
    def chunk_frames(self) -> int:
        """Frames of a chunk that is not the first."""
        first, both = map(self.codec.frames, map(self.sampler.config.chunks.start, (1, 2)))
        return both - first

    @cached_property
    def examples(self) -> list[str]:
        """Prompts to begin with, for a student of the toy world."""
        return [prompt.sentence for prompt in ToyPrompt.every()[7::26]] if self.codec.name.startswith(IDENTITY) else []

    @cached_property
    def device_name(self) -> str:
        """Where it is made."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' if threads > 1 else ''}"

    def form(self, frames: int) -> Form:
        """Of a video of so many frames.

        Raises:
            ConfigError: the student makes none of this form.
        """
        return latent_form(self.job, self.student, self.codec, replace(self.pixels, frames=frames))

    def frames_of(self, seconds: float) -> int:
        """Frames of a video so long, one at least."""
        return max(1, round(seconds * self.pixels.fps))

    def embed(self, prompt: str) -> Tensor:
        """(1, T, E) of a prompt, on the device.

        Raises:
            ConfigError: it cannot be embedded.
        """
        if not clean_prompt(prompt):
            raise ConfigError("prompt must say something: it is empty")
        return embedded([prompt], self.codec, self.student.policy.student).embeddings.to(self.device)

    def write(self, prompt: str, seed: int, frames: int, path: Path, check: Check) -> Iterator[int]:
        """Make one video, what `tools/generate.py --prompt PROMPT --seed SEED` makes, and write its mp4.

        Yields:
            Percent of it that is made, after each chunk.
        Raises:
            ConfigError: the prompt cannot be embedded.
        """
        form, generator = self.form(frames), self._generator(frames, seed, check)
        prompts = embedded([prompt], self.codec, self.student.policy.student)
        chunks = self.sampler.config.chunks.count(form.latent_shape[0])
        for made, _ in enumerate(generator.write(prompts, [Request(0, 0, path)]), 1):
            yield 100 * made // chunks
            check()

    def _generator(self, frames: int, seed: int, check: Check) -> Generator:
        note = {"source": str(self.job.source), "seed": seed}
        return Generator(self._policy(check), self.sampler, self.form(frames), self.device, seed=seed,
                         decoder=self.codec.decoder, note=note)  # fmt: skip

    def _policy(self, check: Check) -> PlainNetwork:
        network = self.student.network
        return PlainNetwork(network.network, calls=_Checked(network.calls, check))

    def figures(self, clock: Clock, frames: int) -> Figures:
        """Of a stream that has so many frames."""
        both = clock.denoising + clock.decoding
        on_gpu = self.device.type == "cuda"
        memory = torch.cuda.max_memory_reserved(self.device) if on_gpu else psutil.Process().memory_info().rss
        return Figures(frames / max(clock.denoising, 1e-9), frames / max(both, 1e-9), clock.first_chunk, memory,
                       "GPU" if on_gpu else "process")  # fmt: skip

    def stream(
        self, text: Callable[[int], Tensor], seed: int, frames: int, clock: Clock, check: Check
    ) -> Iterator[FrameArray]:
        """Make a video chunk by chunk, (t, H, W, C) frames each; memory does not grow with its length.

        Args:
            text: from the number of a chunk to its prompt's (1, T, E), asked when that is about to begin.
            frames: that it has at most.
            clock: that takes its time.
        """
        shape = self.form(self.pixels.frames).latent_shape[1:]
        noise = self.sampler.stream(Randomness(seed), "live", 0, [0], shape, self.device)
        latents = self.sampler.chunks(self._policy(check), text, noise)
        for (chunk,) in clock.frames(latents, self.codec.decoder()):
            yield chunk[:frames]
            frames -= len(chunk)
            if frames <= 0:
                return
