"""On-Policy Adversarial Flow Distillation, arXiv:2605.26105. One step, in order:

1. Rollout. The sampling policy v_old generates G videos x_S for each prompt y, few-step, chunk by chunk.
2. Discriminator. D(video, y) -> logit learns to prefer the teacher's video of the same prompt (Bradley-Terry). There
   may be several judges, and fixed ones among them (jury.py).
3. Advantage. The reward of a rollout, its logit, centred on its group, becomes a weight w in [0, 1].
4. Forward process. x_S is noised; the student's velocity is drawn towards what made good samples and pushed away from
   what made bad ones (DiffusionNFT, arXiv:2509.16117). No teacher scores, latents or trajectories.
5. Old policy. v_old follows the student.

P prompts of this rank, G rollouts each, S noised states of a rollout: rows stand as (P, G, S), see types.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from afd_scale.config import RunConfig
from afd_scale.config.methods import AfdConfig
from afd_scale.flow import losses
from afd_scale.flow.advantage import (
    by_chunk,
    centre,
    divide_by_spread,
    most_telling,
    over_mean,
    resampled,
    weight_from_advantage,
    window_starts,
)
from afd_scale.flow.process import add_noise
from afd_scale.flow.randomness import Randomness
from afd_scale.flow.schedule import TIMESTEPS
from afd_scale.methods.jury import Jury
from afd_scale.methods.long_rollouts import roll_out
from afd_scale.methods.updates import accumulate, learning_rate, steered, without_gradient
from afd_scale.protocols import AveragedPolicy, Metrics, Policy, TrainedPolicy
from afd_scale.rollout.sampler import Sampler
from afd_scale.types import Batch, Prompts, RankMean, Videos, repeat_keys


@dataclass(frozen=True)
class States:
    """Noised states of the forward process, S of each video.

    Attributes:
        count: S.
        latents: (B S, F, C, H, W) noisy.
        sigma: (B S, F) their noise levels.
        velocities: (B S, F, C, H, W) of frozen policies, by role.
    """

    count: int
    latents: Tensor
    sigma: Tensor
    velocities: Mapping[str, Tensor]

    def __getitem__(self, videos: slice) -> "States":
        rows = slice(videos.start * self.count, videos.stop * self.count)
        velocities = {role: velocity[rows] for role, velocity in self.velocities.items()}
        return States(self.count, self.latents[rows], self.sigma[rows], velocities)

    def velocity(self, policy: Policy, videos: Videos, **options: Any) -> Tensor:
        """Of a policy, each chunk given the clean ones before it; windows are of one place."""
        text = videos.prompts.embeddings
        return policy(self.latents, self.sigma * TIMESTEPS, text, **videos.in_context, **options)


class Afd:
    """Student against teacher through a prompt-paired discriminator.

    Args:
        engines: by role, as `AfdConfig.cast` names them.
    """

    config: AfdConfig

    def __init__(self, run: RunConfig, engines: Mapping[str, Any], mean_over_ranks: RankMean):
        assert isinstance(run.method, AfdConfig)
        self.config, self.steps, self.randomness = run.method, run.train.steps, Randomness(run.seed)
        self.student: TrainedPolicy = engines["student"]
        self.old_policy: AveragedPolicy = engines["old_policy"]
        self.reference: Policy | None = engines.get("reference")
        self.mean_over_ranks = mean_over_ranks
        self.jury = Jury(run, self.config, engines, mean_over_ranks)
        self.warmup_steps, self.memory = self.config.warm_up, self.jury.memory
        self.sampler, self.start_frames = Sampler(run.sampler), run.data.start_frames

    def train_step(self, batch: Batch, step: int) -> Metrics:
        rollouts = self._roll_out(batch.prompts, batch.teacher, step)
        judge_metrics, logits = self.jury.hear(batch.teacher, rollouts, self.randomness, step, self.steps)
        if step < 1:  # warm-up: the student's first step already has a judge
            return judge_metrics
        reward = self.jury.reward(logits)
        weight = self._weigh(reward, rollouts.latents.shape[1])
        generated = rollouts.after(self.start_frames)  # what was given is right already
        taught, its_weight = self._choose(generated, reward, weight, step)
        for update in range(self.config.inner_updates):
            student_metrics = self._train_student(taught, its_weight, step, update)
        steering = self._steer(student_metrics["student/old_policy_distance"])
        self.old_policy.follow(self.student, self._old_policy_decay(step))
        return {
            **judge_metrics,
            **student_metrics,
            **steering,
            "rollout/reward_mean": reward.mean(),
            "rollout/reward_group_std": reward.std(dim=1).mean() if reward.shape[1] > 1 else torch.zeros(()),
            "rollout/weight_spread": (weight - 0.5).abs().mean(),
            "rollout/diversity": self._diversity(generated),
            **self.jury.times.means("rollout/reward_mean", reward.mean(1), rollouts),
        }

    def _roll_out(self, prompts: Prompts, like: Videos, step: int) -> Videos:
        """G videos of each prompt by the sampling policy, of the shape of others, with their starts; of long ones the
        windows."""
        if self.config.long_rollouts is not None:
            return roll_out(self.old_policy, self.sampler, self.config, prompts, like, self.randomness, step)
        prompts = prompts.repeat(self.config.rollouts_per_prompt)
        shape, device = tuple(like.latents.shape[1:]), like.latents.device

        def run(rows: slice) -> Tensor:
            given = like.start(self.start_frames, self.config.rollouts_per_prompt, rows)
            noise = self.sampler.draw(self.randomness, "rollout", step, prompts.keys[rows], shape, device, given=given)
            return self.sampler.rollout(self.old_policy, prompts.embeddings[rows], noise)

        latents = without_gradient(self.old_policy, len(prompts), run, sampling=True)
        return Videos(prompts, latents, like.fps, like.decode)

    def _weigh(self, reward: Tensor, frames: int) -> Tensor:
        """(P, G, F) weights in [0, 1] of the generated frames of rollouts with these rewards; (P, G, 1) where all have
        one."""
        config, rule, size = self.config, self.config.advantage, self.sampler.config.chunk_frames
        centred = centre(reward, rule.baseline, self.mean_over_ranks)
        advantage = divide_by_spread(centred, rule.spread, rule.spread_floor, self.mean_over_ranks)
        weight = weight_from_advantage(advantage, rule.clip)
        if config.judged_windows == 1:
            return weight[..., None]
        seen = (config.judged_frames or frames) // size
        starts = window_starts(frames // size, seen, config.judged_windows)
        return by_chunk(weight, starts, seen).repeat_interleave(size, dim=2)[..., self.start_frames :]

    def _choose(self, rollouts: Videos, reward: Tensor, weight: Tensor, step: int) -> tuple[Videos, Tensor]:
        """Those that the student learns from, and the weights of their frames in its loss, (B, F) or (B, 1)."""
        group = weight.shape[1]
        count = self.config.student_rollouts or group
        if self.config.taught == "resampled":
            # Of windows: by their mean.
            reward = reward.unflatten(0, (len(weight), -1)).mean(1)
            taught, weight = self._resample(rollouts, reward, count, step), weight.new_ones(len(weight) * count, 1)
        elif count == group:
            taught, weight = rollouts, weight.flatten(0, 1)
        else:
            chosen = most_telling(weight.mean(2), count)
            taught = rollouts.take(_rows(chosen, group))
            weight = weight.take_along_dim(chosen[..., None], dim=1).flatten(0, 1)
        return taught, over_mean(weight, self.mean_over_ranks) if self.config.credit == "regression" else weight

    def _resample(self, rollouts: Videos, reward: Tensor, count: int, step: int) -> Videos:
        """So many of each prompt's, drawn by their rewards; each has a key of its own, for noise of its own."""
        config, keys, group = self.config, rollouts.prompts.keys, reward.shape[1]
        begin = self.randomness.uniform("student/resample", step, keys[::group], ()).to(reward)
        chosen = resampled(reward, count, begin, config.resample_temperature, config.advantage.spread_floor)
        drawn = rollouts.take(_rows(chosen, group))
        first_ones = _rows(torch.arange(count, device=chosen.device).expand_as(chosen), group)
        return drawn.under(replace(drawn.prompts, keys=tuple(keys[row] for row in first_ones)))

    def _diversity(self, rollouts: Videos) -> Tensor:
        """Standard deviation of a latent's values over the rollouts of a prompt."""
        groups = rollouts.latents.unflatten(0, (-1, self.config.rollouts_per_prompt))
        return groups.std(dim=1).mean() if groups.shape[1] > 1 else torch.zeros(())

    def _train_student(self, rollouts: Videos, weight: Tensor, step: int, update: int) -> Metrics:
        noised, student = self._noise(rollouts, step, update), self.student
        # In phases of their own: weights may be gathered once for all, and with adapters all three are one network.
        frozen: dict[str, Policy] = {"old_policy": self.old_policy}
        if self.reference is not None and step % self.config.prior_every == 0:
            frozen["reference"] = self.reference
        velocities = {role: self._frozen_velocity(policy, rollouts, noised) for role, policy in frozen.items()}
        states = replace(noised, velocities=velocities)

        def loss_of(rows: slice) -> tuple[Tensor, Metrics]:
            return self._student_loss(rollouts[rows], states[rows], weight[rows])

        metrics = accumulate(student, len(rollouts), student.micro_batch, loss_of, self._together)
        rate = float(self._rate_factor) * learning_rate(self.config.optimizer, step, self.steps)
        return {**metrics, "student/gradient_norm": student.step(rate), "student/learning_rate": torch.tensor(rate)}

    @property
    def _together(self) -> int | None:
        """Those of a prompt, whose windows are of one place; None where all are."""
        config = self.config
        return None if config.long_rollouts is None else config.student_rollouts or config.rollouts_per_prompt

    @property
    def _rate_factor(self) -> Tensor:
        """Of the student's learning rate; on the CPU, alike on all ranks."""
        return self.memory.get("rate_factor", torch.ones(()))

    def _steer(self, distance: Tensor) -> Metrics:
        """Set the factor of the next step's learning rate by the student's distance from the old policy in this one."""
        factor, target = self._rate_factor, self.config.step_target
        if target is None:
            return {}
        self.memory["rate_factor"] = steered(factor, target, self.mean_over_ranks(distance).cpu())
        return {"student/rate_factor": factor}

    def _noise(self, rollouts: Videos, step: int, update: int) -> States:
        """New states for each update by the same rollouts."""
        count, again = self.config.states_per_rollout, f"/{update}" if update else ""
        keys = repeat_keys(rollouts.prompts.keys, count)
        x0 = rollouts.latents.repeat_interleave(count, dim=0)
        noise = self.randomness.normal(f"student/noise{again}", step, keys, tuple(x0.shape[1:]), x0.device)
        begun = None if rollouts.begun is None else [row for row in rollouts.begun for _ in range(count)]
        sigma = self.sampler.draw_sigma(
            self.config.sigma, self.randomness, f"student/sigma{again}", step, keys, x0, begun
        )  # fmt: skip
        return States(count, add_noise(x0, noise, sigma), sigma, {})

    def _frozen_velocity(self, policy: Policy, rollouts: Videos, states: States) -> Tensor:
        return without_gradient(
            policy, len(rollouts), lambda rows: states[rows].velocity(policy, rollouts[rows]),
            group=self._together,
        )  # fmt: skip

    def _student_loss(self, rollouts: Videos, states: States, weight: Tensor) -> tuple[Tensor, Metrics]:
        config, old_velocity = self.config, states.velocities["old_policy"]
        velocity = states.velocity(self.student, rollouts, clean_gradient=config.context_gradient)
        x0, weight = (each.repeat_interleave(states.count, dim=0) for each in (rollouts.latents, weight))
        if config.credit == "forward":
            loss = losses.policy_loss(
                velocity, old_velocity, states.latents, x0, states.sigma, weight,
                policy_mix=config.policy_mix, clip=config.advantage.clip, normalise=config.normalise,
            ).mean()  # fmt: skip
        else:
            loss = losses.regression_loss(
                velocity, states.latents, x0, states.sigma, weight, normalise=config.normalise
            ).mean()
        metrics = {
            "student/loss": loss.detach(),
            "student/old_policy_distance": (velocity - old_velocity).detach().abs().mean(),
        }
        if "reference" in states.velocities:
            reference = states.velocities["reference"]
            metrics["student/reference_distance"] = (velocity - reference).detach().abs().mean()
            prior = losses.prior_loss(velocity, reference).mean()
            loss = loss + config.prior_every * config.prior_weight * prior
        return loss, metrics

    def _old_policy_decay(self, step: int) -> float:
        config = self.config
        if config.old_policy_warmup:
            return min(config.old_policy_warmup * step, config.old_policy_decay)
        return config.old_policy_decay


def _rows(places: Tensor, group: int) -> list[int]:
    """Of (P, n) places within groups of so many."""
    first = torch.arange(len(places), device=places.device)[:, None] * group
    rows: list[int] = (first + places).flatten().tolist()
    return rows
