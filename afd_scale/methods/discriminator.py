"""What methods do with a discriminator: it learns to prefer the teacher's video of a prompt, D(video, prompt) -> logit,
and says where a rollout should go to be preferred.

P prompts of this rank, G rollouts each: rows stand as (P, G), see types.py.
"""

import torch
from torch import Tensor

from afd_scale.config.methods.adversarial import AdversarialConfig
from afd_scale.flow import losses
from afd_scale.flow.randomness import Randomness
from afd_scale.methods.updates import accumulate, learning_rate, without_gradient
from afd_scale.protocols import Metrics, TrainedScorer
from afd_scale.types import Videos, pieces


def train_discriminator(
    discriminator: TrainedScorer, teacher: Videos, rollouts: Videos, config: AdversarialConfig, randomness: Randomness,
    step: int, steps: int,
) -> Metrics:  # fmt: skip
    """On pairs of a teacher video and a rollout of its prompt; rollouts beyond, of prompts alone, teach nothing.

    Args:
        steps: of the run, for the learning rate.
    """
    group, at_once = config.rollouts_per_prompt, config.prompts_at_once(discriminator.micro_batch)

    def loss_of(prompts: slice) -> tuple[Tensor, Metrics]:
        of_prompts = rollouts[prompts.start * group : prompts.stop * group]
        return _loss(discriminator, teacher[prompts], of_prompts, config, randomness, step)

    metrics = accumulate(discriminator, len(teacher), at_once, loss_of)
    rate = learning_rate(config.discriminator_optimizer, max(step, 1), steps)
    return {**metrics, "discriminator/gradient_norm": discriminator.step(rate)}


def judge(
    discriminator: TrainedScorer, teacher: Videos, rollouts: Videos, config: AdversarialConfig
) -> tuple[Tensor, Tensor]:
    """The generator's mean loss, and (B, F, C, H, W) each rollout's own loss by its latents, through D and no further.

    Student and discriminator are two engines, whose backward passes stay apart.
    """
    of_teacher: Tensor | None = None
    if config.discriminator_objective == "bradley_terry":
        logits = without_gradient(discriminator, len(teacher), lambda rows: discriminator(teacher[rows]))
        of_teacher = logits.repeat_interleave(config.rollouts_per_prompt)

    def judge_some(rows: slice) -> tuple[Tensor, Tensor]:
        real = None if of_teacher is None else of_teacher[rows]
        return discriminator.input_gradient(rollouts[rows], lambda fake: losses.generator_loss(fake, real).sum())

    parts = [judge_some(rows) for rows in pieces(len(rollouts), discriminator.micro_batch)]
    loss, gradient = zip(*parts, strict=True)
    return torch.stack(loss).sum() / len(rollouts), torch.cat(gradient)


def _loss(
    discriminator: TrainedScorer, teacher: Videos, rollouts: Videos, config: AdversarialConfig, randomness: Randomness,
    step: int,
) -> tuple[Tensor, Metrics]:  # fmt: skip
    prompts, clean = len(teacher), teacher + rollouts
    if config.is_penalised:
        # One pass for both: ZeRO-3 takes one forward of a block for each backward.
        noise = _penalty_noise(teacher, rollouts, randomness, step)
        perturbed = clean.of(clean.latents + config.penalty_deviation * noise)
        logits, perturbed_logits = discriminator(clean + perturbed).chunk(2)
    else:
        logits = discriminator(clean)
    real, fake = logits[:prompts, None], logits[prompts:].unflatten(0, (prompts, -1))  # (P, 1), (P, G)
    if config.discriminator_objective == "bradley_terry":
        loss = losses.bradley_terry_loss(real, fake)
    else:
        loss = losses.softplus_loss(real, fake)
    metrics = {
        "discriminator/loss": loss.detach(),
        "discriminator/accuracy": (real > fake).float().mean(),
        "discriminator/margin": (real - fake).mean().detach(),
    }
    if config.is_penalised:
        penalty = _penalty(logits, perturbed_logits, prompts, config)
        metrics["discriminator/penalty"] = penalty.detach()
        loss = loss + penalty
    return loss, metrics


def _penalty_noise(teacher: Videos, rollouts: Videos, randomness: Randomness, step: int) -> Tensor:
    shape, device = tuple(teacher.latents.shape[1:]), teacher.latents.device
    of_teacher = randomness.normal("penalty/teacher", step, teacher.prompts.keys, shape, device)
    of_student = randomness.normal("penalty/student", step, rollouts.prompts.keys, shape, device)
    return torch.cat([of_teacher, of_student])


def _penalty(logits: Tensor, perturbed: Tensor, prompts: int, config: AdversarialConfig) -> Tensor:
    """R1 on the teacher's videos (the first rows) and R2 on the rollouts."""
    r1, r2 = (
        losses.finite_difference_penalty(logits[rows], perturbed[rows], config.penalty_deviation)
        for rows in (slice(prompts), slice(prompts, None))
    )
    return config.r1_weight * r1 + config.r2_weight * r2
