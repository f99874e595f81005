"""How a step's videos are spread: over data ranks, over the ranks of a sequence, over micro-batches."""

import math
from dataclasses import dataclass

from afd_scale.config import ConfigError, RunConfig
from afd_scale.config.cast import Load, Pass
from afd_scale.config.judges import JudgeConfig
from afd_scale.config.sampler import SamplerConfig


@dataclass(frozen=True)
class Window:
    """Part of a longer video.

    Attributes:
        first_frame, end: its latent frames.
        gap: frames before it that are not there.
        context: frames before it that are.
    """

    first_frame: int
    end: int
    gap: tuple[int, int]
    context: int


@dataclass(frozen=True)
class Workload:
    """A rank's share of one step.

    Attributes:
        gpus: ranks, data x sequence.
        sequence: ranks that share a video's tokens.
        prompts: of a step on one data rank, each with a teacher video.
        passes: of the method, over a data rank's videos.
        frames: latent frames of a teacher's video.
        sampler: which frames see which.
        tokens_per_frame: of a whole latent frame.
    """

    gpus: int
    sequence: int
    prompts: int
    passes: tuple[Pass, ...]
    frames: int
    sampler: SamplerConfig
    tokens_per_frame: int

    @property
    def data_ranks(self) -> int:
        return self.gpus // self.sequence

    @property
    def chunk_frames(self) -> int:
        """Latent frames of a chunk, but for the first."""
        return self.sampler.chunk_frames

    @property
    def rollout_frames(self) -> int:
        """Latent frames of the longest rollouts."""
        return max((self.frames_of(each) for each in self.passes if each.kind == "rollout"), default=self.frames)

    @property
    def frames_at_once(self) -> int:
        """Latent frames of a rollout in its longest pass: of two chunks, where the cache has room for them."""
        chunks = self.sampler.chunks
        slots = chunks.count(self.sampler.cached_frames(self.rollout_frames))
        return max(chunks.start(end) - chunks.start(max(0, end - 2)) for end in range(1, slots + 1))

    def frames_of(self, each: Pass) -> int:
        """Latent frames of a video that a pass generates, scores or gives the velocities of."""
        return (each.frames or self.frames) - (each.given if each.kind == "velocity" else 0)

    def calls_of(self, each: Pass) -> int:
        """Of the network in a rollout."""
        return self.sampler.calls(self.frames_of(each), each.given)

    def window_of(self, each: Pass) -> "Window":
        """Of a pass on windows, the one with the most context; of others their videos behind what is given."""
        frames = self.frames_of(each)
        first = each.within - frames if each.within else each.given
        sink, recent = self.sampler.context(first, each.context or each.given)
        return Window(first, first + frames, (sink.stop, recent.start), len(sink) + len(recent))

    @property
    def phases(self) -> dict[str, list[Pass]]:
        """The passes of each phase, in the order of the step."""
        phases: dict[str, list[Pass]] = {}
        for each in self.passes:
            phases.setdefault(each.phase, []).append(each)
        return phases

    @property
    def videos(self) -> int:
        """Videos that pass through policies in a step, on one data rank."""
        return max(each.videos for each in self.passes if each.kind != "score")

    @property
    def together(self) -> int:
        """Of them, in one pass."""
        return max(each.at_once for each in self.passes if each.kind != "score")

    def videos_of_rank(self, each: Pass, shares_tokens: bool) -> float:
        """That a rank of a sequence runs in a pass, or their tokens' worth.

        Args:
            shares_tokens: the ranks share each video's tokens; others share the videos of each micro-batch.
        """
        if shares_tokens:
            return each.videos / self.sequence
        return each.runs * math.ceil(each.at_once / self.sequence)

    def pixels_seen(self, config: RunConfig) -> dict[str, int]:
        """Videos of a data rank that are decoded by the end of each phase, for judges who see pixels; they are let go
        of behind the last judge.

        Every judge sees all rollouts, one that is trained the teacher's videos too; copies of a video share its pixels.
        """
        seen, by_phase = 0, {}
        for phase, passes in self.phases.items():
            judged = [each for each in passes if _sees_pixels(config, each)]
            if judged:
                seen = max(seen, self.videos + any(each.trains for each in judged) * self.prompts)
            by_phase[phase] = seen if all(each.kind == "score" for each in passes) else 0
        return by_phase

    @property
    def local_tokens_per_frame(self) -> int:
        """Of a rank, padding included."""
        return math.ceil(self.tokens_per_frame / self.sequence)

    @property
    def video_tokens(self) -> int:
        """One rank's tokens of one video."""
        return self.frames * self.local_tokens_per_frame


def _sees_pixels(config: RunConfig, each: Pass) -> bool:
    network = config.role(each.role).network
    return isinstance(network, JudgeConfig) and network.sees_pixels


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
            f"parallel.sequence ({sequence}) must divide the number of ranks ({gpus}), one a GPU: they are data x "
            f"sequence; it may be {valid}"
        )
    data_ranks = gpus // sequence
    for name in ("global_batch", "prompts_per_step"):
        batch = getattr(data, name)
        if batch % data_ranks:
            larger = math.ceil(batch / data_ranks) * data_ranks
            raise ConfigError(
                f"data.{name} ({batch}) must divide among {data_ranks} data ranks ({gpus} ranks / "
                f"parallel.sequence {sequence}): each takes as many samples; data.{name}={larger} would do"
            )
    prompts = data.global_batch // data_ranks
    judges = [role for role in config.cast if isinstance(role.network, JudgeConfig) and role.network.mismatch_weight]
    if judges and prompts < 2:
        raise ConfigError(f"data.global_batch ({data.global_batch}) must give each of {data_ranks} data ranks two "
                          f"prompts with {judges[0].section}.mismatch_weight: a video is shown under another one's"
                          )  # fmt: skip
    load = Load(prompts, data.prompts_per_step // data_ranks, config.train.micro_batch, data.start_frames)
    patch = config.student.patch
    return Workload(
        gpus, sequence, prompts, config.method.passes(load), data.latent_frames, config.sampler,
        tokens_per_frame=data.latent_height // patch[1] * (data.latent_width // patch[2]),
    )  # fmt: skip


def sample_pass(config: RunConfig, load: Workload) -> Pass | None:
    """What a data rank generates for the sample videos of one time; None where no VAE decodes any."""
    samples = config.evaluation.samples
    if config.codec.name != "wan" or not samples:
        return None
    videos = math.ceil(samples / load.data_ranks)
    at_once, given = min(videos, config.evaluation.batch), config.data.start_frames
    return Pass("samples", config.method.exported, "rollout", videos, at_once, given=given)


def valid_degrees(config: RunConfig, gpus: int) -> list[int]:
    """Ulysses degrees that share every network's heads evenly, and the GPUs."""
    return [degree for degree in config.sequence_degrees() if gpus % degree == 0]
