"""How a step's videos are spread: over data ranks, over the ranks of a sequence, over micro-batches."""

import math
from dataclasses import dataclass

from afd_scale.config import ConfigError, RunConfig
from afd_scale.config.methods import AfdConfig


@dataclass(frozen=True)
class Workload:
    """A rank's share of one step.

    Attributes:
        gpus: ranks, data x sequence.
        sequence: ranks that share a video's tokens.
        prompts: of a step on one data rank, each with a teacher video.
        extra_prompts: beside them, without a video.
        rollouts_per_prompt: G; 0 where the method generates nothing.
        together: student's videos in one pass.
        prompts_together: prompts in one pass of the discriminator.
        frames, chunk_frames: latent frames of a video and of a chunk.
        tokens_per_frame: of a whole latent frame.
    """

    gpus: int
    sequence: int
    prompts: int
    extra_prompts: int
    rollouts_per_prompt: int
    together: int
    prompts_together: int
    frames: int
    chunk_frames: int
    tokens_per_frame: int

    @property
    def data_ranks(self) -> int:
        return self.gpus // self.sequence

    @property
    def videos(self) -> int:
        """Videos that pass through the student in a step, on one data rank."""
        return (self.prompts + self.extra_prompts) * max(self.rollouts_per_prompt, 1)

    @property
    def paired_videos(self) -> int:
        """Rollouts that train the discriminator: of prompts with a teacher video."""
        return self.prompts * self.rollouts_per_prompt

    @property
    def micro_batches(self) -> int:
        return math.ceil(self.videos / self.together)

    @property
    def discriminator_micro_batches(self) -> int:
        return math.ceil(self.prompts / self.prompts_together)

    @property
    def local_tokens_per_frame(self) -> int:
        """Of a rank, padding included."""
        return math.ceil(self.tokens_per_frame / self.sequence)

    @property
    def video_tokens(self) -> int:
        """One rank's tokens of one video."""
        return self.frames * self.local_tokens_per_frame

    @property
    def num_chunks(self) -> int:
        return self.frames // self.chunk_frames


def workload(config: RunConfig, gpus: int) -> Workload:
    """The share of each rank.

    Raises:
        ConfigError: the ranks or the batch do not divide.
    """
    if gpus < 1:
        raise ConfigError(f"gpus ({gpus}) must be at least 1")
    sequence, data = config.parallel.sequence, config.data
    if gpus % sequence:
        valid = ", ".join(str(degree) for degree in valid_degrees(config, gpus))
        raise ConfigError(
            f"parallel.sequence ({sequence}) must divide the {gpus} GPUs: they are data x sequence ranks; it may be "
            f"{valid}"
        )
    data_ranks = gpus // sequence
    for name in ("global_batch", "prompts_per_step"):
        batch = getattr(data, name)
        if batch % data_ranks:
            larger = math.ceil(batch / data_ranks) * data_ranks
            raise ConfigError(
                f"data.{name} ({batch}) must divide among {data_ranks} data ranks ({gpus} GPUs / "
                f"parallel.sequence {sequence}): each takes as many samples; data.{name}={larger} would do"
            )
    prompts, extra = data.global_batch // data_ranks, data.prompts_per_step // data_ranks
    micro_batch = config.train.micro_batch
    method = config.method if isinstance(config.method, AfdConfig) else None
    rollouts = 0 if method is None else method.rollouts_per_prompt
    videos = (prompts + extra) * max(rollouts, 1)
    together = videos if micro_batch is None else min(micro_batch, videos)
    prompts_together = min((method and method.prompts_at_once(micro_batch)) or prompts, prompts)
    tokens = data.latent_height // config.student.patch[1] * (data.latent_width // config.student.patch[2])
    return Workload(
        gpus, sequence, prompts, extra, rollouts, together, prompts_together, data.latent_frames,
        config.student.chunk_frames, tokens,
    )  # fmt: skip


def valid_degrees(config: RunConfig, gpus: int | None = None) -> list[int]:
    """Ulysses degrees that share every network's heads evenly, and the GPUs where a number is given."""
    return [degree for degree in config.sequence_degrees() if gpus is None or gpus % degree == 0]
