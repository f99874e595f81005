"""Distribution matching distillation on the student's own rollouts: DMD2, arXiv:2405.14867, as in Self-Forcing,
arXiv:2506.08009. One step, in order:

1. Rollout. The student generates G videos for each prompt, and leaves the sampler at a random step (self_rollout.py).
2. Fake score. Flow matching on the rollouts. With a GAN term the discriminator learns too.
3. Scores. The rollouts are noised; what the fake score makes of them minus what the real one does, guided, says for
   each rollout where it is likelier among the student's videos than among those that are wanted.
4. Student. The difference goes on from there, as a gradient, through its last denoising step.

Steps 3 and 4 wait for the student's turn. A causal score is given the rollout's clean chunks before each noised one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from afd_scale.config import RunConfig
from afd_scale.config.methods import DmdConfig
from afd_scale.flow import losses
from afd_scale.flow.process import add_noise, x0_from_velocity
from afd_scale.flow.randomness import Randomness
from afd_scale.flow.schedule import TIMESTEPS, by_frame, warp
from afd_scale.methods.judges import Lesson, judge_rollouts, train_judge
from afd_scale.methods.self_rollout import follow, roll_out, train_student
from afd_scale.methods.updates import accumulate, learning_rate, without_gradient
from afd_scale.protocols import AveragedPolicy, Metrics, Policy, TrainedPolicy, TrainedScorer
from afd_scale.rollout.sampler import Sampler
from afd_scale.types import Batch, RankMean, Videos


class Dmd:
    """Student between a real and a fake score.

    Args:
        engines: by role, as `DmdConfig.cast` names them.
    """

    config: DmdConfig

    def __init__(self, run: RunConfig, engines: Mapping[str, Any], mean_over_ranks: RankMean):
        assert isinstance(run.method, DmdConfig)
        self.config, self.steps, self.randomness = run.method, run.train.steps, Randomness(run.seed)
        self.student: TrainedPolicy = engines["student"]
        self.average: AveragedPolicy | None = engines.get("average")
        self.fake_score: TrainedPolicy = engines["fake_score"]
        self.real_score: Policy = engines["real_score"]
        self.discriminator: TrainedScorer | None = engines.get("discriminator")
        self.warmup_steps, self.memory = self.config.warm_up, dict[str, Tensor]()
        self.sampler, self.start_frames = Sampler(run.sampler), run.data.start_frames
        self.negative = _negative(self.config, run.student.text_dim)

    def train_step(self, batch: Batch, step: int) -> Metrics:
        config, teacher = self.config, batch.teacher
        prompts = batch.prompts.repeat(config.rollouts_per_prompt)
        rollouts = roll_out(self.student, self.sampler, prompts, teacher, self.randomness, step, self.start_frames)
        metrics = dict(self._train_fake_score(rollouts.videos, step))
        paired = rollouts.videos[: len(teacher) * config.rollouts_per_prompt]
        if self.discriminator is not None:
            lesson = Lesson(teacher, paired, self.randomness, step, self.steps)
            metrics |= self._train_discriminator(self.discriminator, lesson)
        if step < 1 or step % config.student_every:
            return metrics
        gradient = self._match(rollouts.videos, step)
        metrics["student/loss"] = 0.5 * gradient.square().mean()
        gradient /= gradient[0].numel()  # of the mean over what is generated of a video
        if self.discriminator is not None:
            section = config.all_judges["discriminator"]
            metrics["student/gan_loss"], push = judge_rollouts(self.discriminator, section, teacher, paired)
            gradient[: len(paired)] += config.gan_weight * push[:, self.start_frames :]
        rate = learning_rate(config.optimizer, step, self.steps)
        metrics |= train_student(self.student, rollouts, gradient, rate)
        if self.average is not None:
            follow(self.average, self.student, config.ema_decay, step // config.student_every)
        return metrics

    def _train_fake_score(self, rollouts: Videos, step: int) -> Metrics:
        fake, network = self.fake_score, self.config.fake_score

        def loss_of(rows: slice) -> tuple[Tensor, Metrics]:
            videos = rollouts[rows]
            x0, text = videos.latents, videos.prompts.embeddings
            noise, sigma = self._noise("fake_score", videos, network.causal, step)
            velocity = self._velocity(fake, network.causal, add_noise(x0, noise, sigma), sigma, text, videos)
            ours = [whole[:, self.start_frames :] for whole in (x0, noise, sigma)]
            loss = losses.flow_matching_loss(velocity, *ours, space=network.prediction).mean()
            return loss, {"fake_score/loss": loss.detach()}

        metrics = accumulate(fake, len(rollouts), fake.micro_batch, loss_of)
        rate = learning_rate(self.config.fake_score_optimizer, max(step, 1), self.steps)
        return {**metrics, "fake_score/gradient_norm": fake.step(rate)}

    def _train_discriminator(self, judge: TrainedScorer, lesson: Lesson) -> Metrics:
        section = self.config.all_judges["discriminator"]
        if lesson.step < 1 - section.warmup_steps:
            return {}
        at_once = self.config.prompts_at_once(section, lesson.group, judge.micro_batch)
        return train_judge("discriminator", judge, section, lesson, at_once)[0]

    def _match(self, rollouts: Videos, step: int) -> Tensor:
        """(B, f, C, H, W) the gradient of distribution matching for what each rollout generated."""
        config, count = self.config, len(rollouts)
        fake_is_causal, real_is_causal = config.fake_score.causal, (config.real_score or config.fake_score).causal
        # A level for each chunk only where both are causal: a bidirectional score knows videos of one level.
        noise, sigma = self._noise("scores", rollouts, fake_is_causal and real_is_causal, step)
        noisy, clean, text = add_noise(rollouts.latents, noise, sigma), rollouts.latents, rollouts.prompts.embeddings

        def fake(rows: slice) -> Tensor:
            return self._velocity(self.fake_score, fake_is_causal, noisy[rows], sigma[rows], text[rows], rollouts[rows])

        def real(rows: slice) -> Tensor:
            state = (self.real_score, real_is_causal, noisy[rows], sigma[rows])
            velocity = self._velocity(*state, text[rows], rollouts[rows])
            if not config.is_guided:
                return velocity
            away = self._velocity(*state, self.negative.to(clean).expand(len(velocity), -1, -1), rollouts[rows])
            return away + config.guidance_scale * (velocity - away)

        ours = slice(self.start_frames, None)
        real_x0, fake_x0 = (
            x0_from_velocity(noisy[:, ours], without_gradient(score, count, run), sigma[:, ours])
            for score, run in ((self.real_score, real), (self.fake_score, fake))
        )
        return losses.distribution_matching_gradient(clean[:, ours], real_x0, fake_x0)

    def _velocity(
        self, score: Policy, causal: bool, noisy: Tensor, sigma: Tensor, text: Tensor, rollouts: Videos
    ) -> Tensor:  # fmt: skip
        """(B, f, C, H, W) of what rollouts generated. A causal score is given their start clean; the other knows videos
        of one level alone, and sees it noised as all of them."""
        ours = slice(self.start_frames, None)
        if not causal:
            return score(noisy, sigma * TIMESTEPS, text)[:, ours]
        context = rollouts.after(self.start_frames).in_context
        return score(noisy[:, ours], sigma[:, ours] * TIMESTEPS, text, **context)

    def _noise(self, stream: str, videos: Videos, by_chunk: bool, step: int) -> tuple[Tensor, Tensor]:
        """Noise of videos' shape and (B, F) levels, one for each chunk or for each video."""
        frames, device = videos.latents.shape[1], videos.latents.device
        lengths = self.sampler.config.chunks.lengths(frames) if by_chunk else [frames]
        keys, shape = videos.prompts.keys, tuple(videos.latents.shape[1:])
        uniform = self.randomness.uniform(f"{stream}/sigma", step, keys, (len(lengths),), device)
        sigma = warp(uniform, self.sampler.config.timestep_shift).clamp(*self.config.sigma_range)
        noise = self.randomness.normal(f"{stream}/noise", step, keys, shape, device)
        return noise, by_frame(sigma, lengths)


def _negative(config: DmdConfig, text_dim: int) -> Tensor:
    """(1, T, E) what guidance leads away from; zero rows are what all texts are padded with.

    Raises:
        ValueError: the file is absent, or of another kind or width.
    """
    if config.negative is None:
        return torch.zeros(1, 1, text_dim)
    try:
        embedding = load_file(config.negative)["embedding"]
    except (OSError, KeyError) as error:
        raise ValueError(f"method.negative ({config.negative}) must be a .safetensors file with `embedding`: {error!r}"
                         ) from error  # fmt: skip
    if embedding.dim() != 2 or embedding.shape[1] != text_dim:
        raise ValueError(f"method.negative ({config.negative}) must hold rows of student.text_dim ({text_dim}): its "
                         f"embedding is {tuple(embedding.shape)}")  # fmt: skip
    return embedding.float()[None]
