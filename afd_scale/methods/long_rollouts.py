"""Rollouts longer than the teacher's videos: a window of each is judged, and the student learns from it.

A judge needs clean videos and nothing else, so it can hold any part of a long rollout against the teacher's short
videos. All rollouts of a prompt show the same part: their rewards are of one time, and what that is worth goes with the
group's mean. The student learns from the window given what the sampler saw before it: clean chunks of the sink and of
the sampler's window, at their places in the video.

Of a rollout nothing else is kept, so memory does not grow with its length.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_scale.config.methods import AfdConfig
from afd_scale.config.methods.long_rollouts import LongRolloutsConfig
from afd_scale.flow.randomness import Randomness
from afd_scale.methods.updates import watched_pieces
from afd_scale.protocols import Policy
from afd_scale.rollout.sampler import Sampler
from afd_scale.types import Place, Prompts, RankMean, Videos


@torch.no_grad()
def roll_out(
    policy: Policy, sampler: Sampler, config: AfdConfig, prompts: Prompts, like: Videos, randomness: Randomness,
    step: int,
) -> Videos:  # fmt: skip
    """A window of each of G long rollouts of each prompt, with what stands before it.

    Args:
        like: the teacher's videos, whole.
    """
    section, chunk_frames = config.long_rollouts, sampler.config.chunk_frames
    assert section is not None, "who rolls out long has its section"
    group, seen = config.rollouts_per_prompt, config.judged_frames or like.latents.shape[1]
    rows = prompts.repeat(group)
    length = drawn_length(section, randomness, step, chunk_frames, seen)
    starts = drawn_starts(section.early_share, randomness, step, rows.keys[::group], (length - seen) // chunk_frames)
    cuts = [_Cut(chunk_frames * start, seen, sampler, section.context_frames) for start in starts for _ in range(group)]
    with policy.resident(sampling=True):
        for part in watched_pieces(policy, len(rows), policy.micro_batch):
            noise = sampler.stream(
                randomness, "rollout", step, rows.keys[part], tuple(like.latents.shape[2:]), like.latents.device,
                frames=length,
            )  # fmt: skip
            for number, chunk in enumerate(sampler.chunks(policy, rows.embeddings[part], noise)):
                for cut, latents in zip(cuts[part], chunk, strict=True):
                    cut.see(number * chunk_frames, latents)
    windows = torch.stack([cut.window for cut in cuts])
    return Videos(rows, windows, like.fps, like.decode, places=tuple(cut.place for cut in cuts))


def drawn_length(section: LongRolloutsConfig, randomness: Randomness, step: int, chunk_frames: int, least: int) -> int:
    """Latent frames of a step's rollouts, the same on all ranks."""
    lengths = section.lengths(step, chunk_frames, least)
    drawn = randomness.uniform("rollout/frames", step, (0,), ()).item()  # on the CPU: nothing waits
    return lengths[int(drawn * len(lengths))]


def drawn_starts(
    early_share: float, randomness: Randomness, step: int, keys: Sequence[int], last: int
) -> list[int]:  # fmt: skip
    """The chunk that each prompt's window begins with: in 0 .. last, and 0 with this probability beside its share."""
    drawn = randomness.uniform("rollout/window", step, keys, (2,)).tolist()
    return [0 if early < early_share else int(place * (last + 1)) for early, place in drawn]


def teacher_windows(teacher: Videos, rollouts: Videos, randomness: Randomness, step: int, chunk_frames: int) -> Videos:
    """Of the teacher's videos windows as long as the rollouts', where they are longer.

    How a video begins tells it from any later part (a VAE's first latent frame is unlike the others). So the first
    window of a rollout meets the teacher's first, and any later one meets any later one.

    Args:
        rollouts: windows of as many for each video of the teacher's.
    """
    assert rollouts.places is not None, "they are windows"
    group, seen = len(rollouts) // max(len(teacher), 1), rollouts.latents.shape[1]
    last = (teacher.latents.shape[1] - seen) // chunk_frames
    if not last:
        return teacher
    drawn = randomness.uniform("judge/window", step, rollouts.prompts.keys[::group], ()).tolist()
    places = zip(rollouts.places[::group], drawn, strict=True)
    starts = [1 + int(later * last) if place.first_frame else 0 for place, later in places]
    return teacher.windows([chunk_frames * start for start in starts], seen)


class Times:
    """Means by the time of a rollout: of windows whose middle is within the first length of the teacher's videos (1x),
    between that and twice as much (2x), between twice and four times (4x), and so on.

    Args:
        section: None where no rollout is long, and nothing has a time.
        frames: latent frames of the teacher's videos.
    """

    def __init__(self, section: LongRolloutsConfig | None, frames: int, mean_over_ranks: RankMean):
        self.frames, self.mean_over_ranks = frames, mean_over_ranks
        self.count = 1 + self._of(section.frames) if section else 0

    def means(self, name: str, values: Tensor, rollouts: Videos) -> dict[str, Tensor]:
        """`NAME/1x` and so on, those that some rank has windows of in this step; on all ranks together.

        Args:
            values: (P,) of the prompts.
            rollouts: windows of as many for each.
        """
        if rollouts.places is None:
            return {}
        middles = [place.first_frame + rollouts.latents.shape[1] / 2 for place in rollouts.places]
        times = torch.tensor([self._of(middle) for middle in middles[:: len(middles) // len(values)]])
        shares = F.one_hot(times, self.count).to(values)  # (P, times)
        counts, sums = self.mean_over_ranks(torch.stack([shares.sum(0), values @ shares]))
        return {
            f"{name}/{2**time}x": sums[time] / counts[time] for time, there in enumerate(counts.tolist()) if there
        }  # fmt: skip

    def _of(self, middle: float) -> int:
        return max(0, math.ceil(math.log2(middle / self.frames)))


class _Cut:
    """Takes a rollout's chunks as they come, and keeps a window and the clean frames before it that it sees."""

    def __init__(self, first_frame: int, frames: int, sampler: Sampler, context_frames: int | None):
        self.first_frame, self.frames = first_frame, frames
        self._context = sampler.config.context(first_frame, context_frames)
        self._before: list[Tensor] = []
        self._window: list[Tensor] = []

    def see(self, start: int, chunk: Tensor) -> None:
        """(f, C, H, W) latents that begin at a frame."""
        # Copies: all of the batch would stay else.
        if any(start in frames for frames in self._context):
            self._before.append(chunk.clone())
        elif self.first_frame <= start < self.first_frame + self.frames:
            self._window.append(chunk.clone())

    @property
    def window(self) -> Tensor:
        return torch.cat(self._window)

    @property
    def place(self) -> Place:
        context = torch.cat(self._before) if self._before else self._window[0][:0]
        return Place(self.first_frame, context)
