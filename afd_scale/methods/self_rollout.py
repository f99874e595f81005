"""Self-Forcing's way into a student, arXiv:2506.08009: its own rollout, and a gradient through the last denoising step.

The student generates chunk by chunk, without gradient. All chunks leave the sampler at one denoising step s, random and
the same on all ranks: their clean predictions there are the video, and the context of the chunks behind them. Step s is
then run once more, with gradient and for all chunks in one teacher-forcing pass: each sees the noisy latents that the
sampler really had there, and the rollout's clean chunks before it. So it predicts the rollout itself, of which the
method has asked in between where it should go. Noising the rollout anew, as AFD does, would give another video than the
one that was asked of.

A rollout with gradient would be many forward passes to one backward, and ZeRO-3 takes one forward of a block for each
backward.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from afd_scale.flow.process import x0_from_velocity
from afd_scale.flow.randomness import Randomness
from afd_scale.flow.schedule import TIMESTEPS
from afd_scale.methods.updates import accumulate, without_gradient
from afd_scale.protocols import AveragedPolicy, Metrics, Policy, TrainedPolicy
from afd_scale.rollout.sampler import Sampler
from afd_scale.types import Prompts, Videos


@dataclass(frozen=True)
class Rollouts:
    """Videos of the student, and how they left the sampler.

    Attributes:
        videos: B.
        noisy: (B, f, C, H, W) that the last denoising step of each chunk saw, of those that are generated, the last f
            of the videos' F frames.
        sigma: (B, f) its noise levels.
    """

    videos: Videos
    noisy: Tensor
    sigma: Tensor

    @property
    def generated(self) -> Videos:
        """What comes behind the start that was given."""
        return self.videos.after(self.videos.latents.shape[1] - self.noisy.shape[1])


def roll_out(
    policy: Policy, sampler: Sampler, prompts: Prompts, like: Videos, randomness: Randomness, step: int,
    start_frames: int = 0,
) -> Rollouts:  # fmt: skip
    """A video of each prompt with a random exit, of the shape of others.

    Args:
        start_frames: latent frames of the others that are given: of as many rollouts of each.
    """
    shape, device = tuple(like.latents.shape[1:]), like.latents.device
    exit = 1 - randomness.uniform("rollout/exit", step, (0,), ()).item()  # drawn on the CPU: nothing waits

    def run(rows: slice) -> Tensor:
        given = like.start(start_frames, len(prompts) // len(like), rows)
        noise = sampler.draw(randomness, "rollout", step, prompts.keys[rows], shape, device, given=given)
        chunks = sampler.last_steps(policy, prompts.embeddings[rows], noise, exit)
        return torch.cat([torch.stack(both, dim=1) for both in chunks], dim=2)  # (B, 2, F, C, H, W)

    noisy, latents = without_gradient(policy, len(prompts), run, sampling=True).unbind(1)
    sigma = sampler.last_sigmas(exit, latents)[:, start_frames:]
    return Rollouts(Videos(prompts, latents, like.fps, like.decode), noisy[:, start_frames:], sigma)


def train_student(student: TrainedPolicy, rollouts: Rollouts, gradient: Tensor, rate: float) -> Metrics:
    """One update.

    Args:
        gradient: (B, f, C, H, W) of each rollout's own loss by the latents that it generated.
        rate: the learning rate.
    """
    videos = rollouts.generated

    def loss_of(rows: slice) -> tuple[Tensor, Metrics]:
        noisy, sigma, clean = rollouts.noisy[rows], rollouts.sigma[rows], videos.latents[rows]
        text, context = videos.prompts.embeddings[rows], videos[rows].in_context
        velocity = student(noisy, sigma * TIMESTEPS, text, **context, clean_gradient=False)
        x0 = x0_from_velocity(noisy, velocity, sigma)
        loss = (gradient[rows] * x0).flatten(1).sum(1).mean()  # by x0 its gradient is the given one
        return loss, {"student/rollout_distance": (x0 - clean).detach().abs().mean()}  # rounding alone

    metrics = accumulate(student, len(videos), student.micro_batch, loss_of)
    return {
        **metrics,
        "student/gradient_norm": student.step(rate),
        "student/learning_rate": torch.tensor(rate),
        "rollout/exit_sigma": rollouts.sigma.mean(),
    }


def follow(average: AveragedPolicy, student: TrainedPolicy, decay: float, updates: int) -> None:
    """The average follows the student after so many updates; early weights are forgotten faster than the decay says, or
    a short run would average its start."""
    average.follow(student, min(decay, updates / (updates + 10)))
