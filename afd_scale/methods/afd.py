"""On-Policy Adversarial Flow Distillation, arXiv:2605.26105. One step, in order:

1. Rollout. The sampling policy v_old generates G videos x_S for each prompt y, few-step, chunk by chunk.
2. Discriminator. D(video, y) -> logit learns to prefer the teacher's video of the same prompt (Bradley-Terry).
3. Advantage. The logit of a rollout, centred on its group, becomes a weight w in [0, 1].
4. Forward process. x_S is noised; the student's velocity is drawn towards what made good samples and pushed away from
   what made bad ones (DiffusionNFT, arXiv:2509.16117). No teacher scores, latents or trajectories.
5. Old policy. v_old follows the student.

P prompts of this rank, G rollouts each, S noised states of a rollout: rows stand as (P, G, S).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from afd_scale.config.methods import AfdConfig
from afd_scale.config.models import StudentConfig
from afd_scale.flow import losses
from afd_scale.flow.advantage import centre, divide_by_spread, weight_from_advantage
from afd_scale.flow.process import add_noise
from afd_scale.flow.randomness import Randomness
from afd_scale.flow.schedule import TIMESTEPS, denoising_sigmas
from afd_scale.methods.accumulate import accumulate, pieces
from afd_scale.methods.learning_rate import learning_rate
from afd_scale.methods.sigma import sigma_draw
from afd_scale.protocols import AveragedPolicy, Metrics, Policy, TrainedPolicy, TrainedScorer
from afd_scale.rollout.causal import rollout
from afd_scale.types import Batch, RankMean


@dataclass(frozen=True)
class Rollouts:
    """Videos of the sampling policy, rows (P, G).

    Attributes:
        keys: of a rollout's random numbers: its sample's position in the dataset and its number in the group.
        text: (P G, T, E) embeddings of their prompts.
        videos: (P G, F, C, H, W) clean latents.
    """

    keys: list[int]
    text: Tensor
    videos: Tensor

    def __getitem__(self, rows: slice) -> "Rollouts":
        return Rollouts(self.keys[rows], self.text[rows], self.videos[rows])

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Noised:
    """States of the forward process, rows (P, G, S).

    Attributes:
        latents: (P G S, F, C, H, W) noisy.
        sigma: (P G S, F) their noise levels.
    """

    latents: Tensor
    sigma: Tensor

    def __getitem__(self, rows: slice) -> "Noised":
        return Noised(self.latents[rows], self.sigma[rows])


class Afd:
    """Student against teacher through a prompt-paired discriminator.

    Args:
        micro_batch: videos that pass through a network together; None is all of a step.
    """

    def __init__(
        self, config: AfdConfig, student_config: StudentConfig, steps: int, randomness: Randomness,
        student: TrainedPolicy, old_policy: AveragedPolicy, reference: Policy | None, discriminator: TrainedScorer,
        mean_over_ranks: RankMean, micro_batch: int | None = None,
    ):  # fmt: skip
        self.config, self.student_config, self.steps, self.randomness = config, student_config, steps, randomness
        self.student, self.old_policy, self.reference = student, old_policy, reference
        self.discriminator, self.mean_over_ranks, self.micro_batch = discriminator, mean_over_ranks, micro_batch
        self.warmup_steps = config.discriminator_warmup_steps
        self.sigmas = denoising_sigmas(student_config.timesteps, student_config.timestep_shift)
        self.sigma_draw = sigma_draw(config.sigma, student_config)

    def train_step(self, batch: Batch, step: int) -> Metrics:
        rollouts = self._roll_out(batch, step)
        paired = batch.paired  # only a prompt with a teacher video teaches the discriminator; it judges all
        of_paired = rollouts[: len(paired) * self.config.rollouts_per_prompt]
        discriminator_metrics = self._train_discriminator(paired, of_paired, step)
        if step < 1:  # warm-up: the student's first step already has a judge
            return discriminator_metrics
        reward, weight = self._weigh(rollouts)
        student_metrics = self._train_student(rollouts, weight.flatten(), step)
        self.old_policy.follow(self.student, self._old_policy_decay(step))
        return {
            **discriminator_metrics,
            **student_metrics,
            "rollout/reward_mean": reward.mean(),
            "rollout/reward_group_std": reward.std(dim=1).mean() if reward.shape[1] > 1 else torch.zeros(()),
            "rollout/weight_spread": (weight - 0.5).abs().mean(),
        }

    def _roll_out(self, batch: Batch, step: int) -> Rollouts:
        group, shape, device = self.config.rollouts_per_prompt, tuple(batch.latents.shape[1:]), batch.latents.device
        keys = [sample * group + number for sample in batch.samples for number in range(group)]
        text = batch.text.repeat_interleave(group, dim=0)
        videos = []
        with self.old_policy.resident():
            for part in pieces(len(keys), self.micro_batch):
                noise = self.randomness.normal("rollout/noise", step, keys[part], shape, device)
                again = (len(self.sigmas) - 1, *shape)
                renoise = self.randomness.normal("rollout/renoise", step, keys[part], again, device)
                videos.append(rollout(self.old_policy, text[part], noise, renoise.transpose(0, 1), self.sigmas))
        return Rollouts(keys, text, torch.cat(videos))

    def _train_discriminator(self, batch: Batch, rollouts: Rollouts, step: int) -> Metrics:
        group = self.config.rollouts_per_prompt
        prompts_at_once = self.config.prompts_at_once(self.micro_batch)

        def loss_of(prompts: slice) -> tuple[Tensor, Metrics]:
            of_prompts = slice(prompts.start * group, prompts.stop * group)
            return self._discriminator_loss(batch[prompts], rollouts[of_prompts], step)

        metrics = accumulate(self.discriminator, pieces(len(batch), prompts_at_once), loss_of)
        rate = learning_rate(self.config.discriminator_optimizer, max(step, 1), self.steps)
        gradient_norm = self.discriminator.step(rate)
        return {**metrics, "discriminator/gradient_norm": gradient_norm}

    def _discriminator_loss(self, batch: Batch, rollouts: Rollouts, step: int) -> tuple[Tensor, Metrics]:
        config, prompts = self.config, len(batch)
        text = torch.cat([batch.text, rollouts.text])
        clean = torch.cat([batch.latents, rollouts.videos])
        penalised = config.r1_weight > 0 or config.r2_weight > 0
        if penalised:
            # One pass for both: ZeRO-3 takes one forward of a block for each backward.
            perturbed = clean + config.penalty_deviation * self._penalty_noise(batch, rollouts, step)
            both = self.discriminator(torch.cat([clean, perturbed]), torch.cat([text, text]))
            logits, perturbed_logits = both.chunk(2)
        else:
            logits = self.discriminator(clean, text)
        teacher, student = logits[:prompts, None], logits[prompts:].unflatten(0, (prompts, -1))  # (P, 1), (P, G)
        if config.discriminator_objective == "bradley_terry":
            loss = losses.bradley_terry_loss(teacher, student)
        else:
            loss = losses.softplus_loss(teacher, student)
        metrics = {
            "discriminator/loss": loss.detach(),
            "discriminator/accuracy": (teacher > student).float().mean(),
            "discriminator/margin": (teacher - student).mean().detach(),
        }
        if penalised:
            penalty = self._penalty(logits, perturbed_logits, prompts)
            metrics["discriminator/penalty"] = penalty.detach()
            loss = loss + penalty
        return loss, metrics

    def _penalty_noise(self, batch: Batch, rollouts: Rollouts, step: int) -> Tensor:
        """Noise on the teacher's videos and on the rollouts."""
        shape, device = tuple(batch.latents.shape[1:]), batch.latents.device
        teacher = self.randomness.normal("penalty/teacher", step, batch.samples, shape, device)
        student = self.randomness.normal("penalty/student", step, rollouts.keys, shape, device)
        return torch.cat([teacher, student])

    def _penalty(self, logits: Tensor, perturbed: Tensor, prompts: int) -> Tensor:
        """R1 on the teacher's videos (the first rows) and R2 on the rollouts."""
        r1, r2 = (
            losses.finite_difference_penalty(logits[rows], perturbed[rows], self.config.penalty_deviation)
            for rows in (slice(prompts), slice(prompts, None))
        )
        return self.config.r1_weight * r1 + self.config.r2_weight * r2

    @torch.no_grad()
    def _weigh(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """(P, G) logits of the rollouts and their weights in [0, 1]."""
        rule = self.config.advantage
        parts = [rollouts[rows] for rows in pieces(len(rollouts), self.micro_batch)]
        with self.discriminator.resident():
            logits = torch.cat([self.discriminator(part.videos, part.text) for part in parts])
        reward = logits.unflatten(0, (-1, self.config.rollouts_per_prompt))
        centred = centre(reward, rule.baseline, self.mean_over_ranks)
        advantage = divide_by_spread(centred, rule.spread, rule.spread_floor, self.mean_over_ranks)
        return reward, weight_from_advantage(advantage, rule.clip)

    def _train_student(self, rollouts: Rollouts, weight: Tensor, step: int) -> Metrics:
        noised = self._noise(rollouts, step)
        # In a phase of their own: weights may be gathered once for all, and with adapters all three are one network.
        old_velocity = self._velocity(self.old_policy, rollouts, noised)
        reference_velocity = None if self.reference is None else self._velocity(self.reference, rollouts, noised)

        def loss_of(rows: slice) -> tuple[Tensor, Metrics]:
            states = self._states(rows)
            reference = None if reference_velocity is None else reference_velocity[states]
            return self._student_loss(rollouts[rows], noised[states], weight[rows], old_velocity[states], reference)

        metrics = accumulate(self.student, pieces(len(rollouts), self.micro_batch), loss_of)
        rate = learning_rate(self.config.optimizer, step, self.steps)
        gradient_norm = self.student.step(rate)
        return {**metrics, "student/gradient_norm": gradient_norm, "student/learning_rate": torch.tensor(rate)}

    def _states(self, rows: slice) -> slice:
        """The noised states of some rollouts."""
        states = self.config.states_per_rollout
        return slice(rows.start * states, rows.stop * states)

    def _noise(self, rollouts: Rollouts, step: int) -> Noised:
        states = self.config.states_per_rollout
        keys = [key * states + state for key in rollouts.keys for state in range(states)]
        x0 = rollouts.videos.repeat_interleave(states, dim=0)
        noise = self.randomness.normal("student/noise", step, keys, tuple(x0.shape[1:]), x0.device)
        sigma = self.sigma_draw(self.randomness, "student/sigma", step, keys, x0)
        return Noised(add_noise(x0, noise, sigma), sigma)

    @torch.no_grad()
    def _velocity(self, policy: Policy, rollouts: Rollouts, noised: Noised) -> Tensor:
        """(P G S, F, C, H, W) of a frozen policy."""
        with policy.resident():
            velocities = []
            for rows in pieces(len(rollouts), self.micro_batch):
                part, states = rollouts[rows], noised[self._states(rows)]
                velocities.append(policy(states.latents, states.sigma * TIMESTEPS, part.text, clean=part.videos))
        return torch.cat(velocities)

    def _student_loss(
        self, rollouts: Rollouts, noised: Noised, weight: Tensor, old_velocity: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Metrics]:
        config, states = self.config, self.config.states_per_rollout
        velocity = self.student(
            noised.latents, noised.sigma * TIMESTEPS, rollouts.text,
            clean=rollouts.videos, clean_gradient=config.context_gradient,
        )  # fmt: skip
        loss = losses.policy_loss(
            velocity, old_velocity, noised.latents, rollouts.videos.repeat_interleave(states, dim=0), noised.sigma,
            weight.repeat_interleave(states),
            policy_mix=config.policy_mix, clip=config.advantage.clip, normalise=config.normalise,
        ).mean()  # fmt: skip
        metrics = {
            "student/loss": loss.detach(),
            "student/old_policy_distance": (velocity - old_velocity).detach().abs().mean(),
        }
        if reference is not None:
            metrics["student/reference_distance"] = (velocity - reference).detach().abs().mean()
            loss = loss + config.prior_weight * losses.prior_loss(velocity, reference).mean()
        return loss, metrics

    def _old_policy_decay(self, step: int) -> float:
        config = self.config
        if config.old_policy_warmup:
            return min(config.old_policy_warmup * step, config.old_policy_decay)
        return config.old_policy_decay
