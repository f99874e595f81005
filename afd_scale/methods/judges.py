"""What methods do with a judge: it learns to prefer the teacher's video of a prompt, D(video, prompt) -> logit, and
says where a rollout should go to be preferred.

P prompts of this rank, G rollouts each: rows stand as (P, G), see types.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from afd_scale.config.judges import JudgeConfig, PixelJudgeConfig
from afd_scale.flow import losses
from afd_scale.flow.augmentation import change_of
from afd_scale.flow.randomness import Randomness
from afd_scale.methods.updates import accumulate, learning_rate, watched_pieces, without_gradient
from afd_scale.protocols import Metrics, TrainedScorer
from afd_scale.types import Videos, View


@dataclass(frozen=True)
class Lesson:
    """What judges are trained on in one step.

    Attributes:
        teacher: P videos.
        rollouts: P G, of their prompts.
        step, steps: this one, and those of the run.
    """

    teacher: Videos
    rollouts: Videos
    randomness: Randomness
    step: int
    steps: int

    @property
    def group(self) -> int:
        """G."""
        return len(self.rollouts) // len(self.teacher)

    def mismatched(self) -> Videos:
        """The teacher's videos, each under the prompt of its neighbour on this rank: they take turns in pairs, and the
        last of an odd number has the first one's."""
        prompts, count = self.teacher.prompts, len(self.teacher)
        order = [row ^ 1 if row ^ 1 < count else 0 for row in range(count)]
        return self.teacher.under(prompts.take(order, prompts.keys))


def train_judge(
    name: str, judge: TrainedScorer, config: JudgeConfig, lesson: Lesson, micro_batch: int | None
) -> tuple[Metrics, Tensor, Tensor]:
    """One update, by pairs of a teacher's video and a rollout of its prompt.

    Args:
        name: of the judge's role; metrics are `discriminator/...`, those of others `discriminator/NAME/...`.
        micro_batch: prompts, each with its videos, that pass through together; None is all.
    Returns:
        Metrics, and of before the update (P G,) logits of the rollouts and (P,) shares of its rollouts that each
        teacher's video was preferred to.
    """
    said: list[Tensor] = []
    won: list[Tensor] = []

    def loss_of(prompts: slice) -> tuple[Tensor, Metrics]:
        loss, metrics, real, fake = _loss(judge, config, lesson, prompts)
        said.append(fake.detach().flatten())
        won.append(_preferred(real, fake).mean(1))
        return loss, metrics

    metrics = accumulate(judge, len(lesson.teacher), micro_batch, loss_of)
    assert config.optimizer is not None, "a judge that learns has an optimizer"
    rate = learning_rate(config.optimizer, max(lesson.step, 1), lesson.steps)
    return prefixed(name, {**metrics, "gradient_norm": judge.step(rate)}), torch.cat(said), torch.cat(won)


def prefixed(judge: str, metrics: Metrics) -> Metrics:
    """A judge's metrics under its name."""
    place = "discriminator" if judge == "discriminator" else f"discriminator/{judge}"
    return {f"{place}/{metric}": value for metric, value in metrics.items()}


def judge_rollouts(
    judge: TrainedScorer, config: JudgeConfig, teacher: Videos, rollouts: Videos
) -> tuple[Tensor, Tensor]:
    """The generator's mean loss, and (B, F, C, H, W) each rollout's own loss by its latents, through D and no further.

    Student and judge are two engines, whose backward passes stay apart.
    """
    of_teacher: Tensor | None = None
    if config.objective == "bradley_terry":
        logits = without_gradient(judge, len(teacher), lambda rows: judge(teacher[rows]))
        of_teacher = logits.repeat_interleave(len(rollouts) // len(teacher))

    def judge_some(rows: slice) -> tuple[Tensor, Tensor]:
        real = None if of_teacher is None else of_teacher[rows]
        return judge.input_gradient(rollouts[rows], lambda fake: losses.generator_loss(fake, real).sum())

    parts = [judge_some(rows) for rows in watched_pieces(judge, len(rollouts), judge.micro_batch)]
    loss, gradient = zip(*parts, strict=True)
    return torch.stack(loss).sum() / len(rollouts), torch.cat(gradient)


def _loss(
    judge: TrainedScorer, config: JudgeConfig, lesson: Lesson, prompts: slice
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """Of some prompts: the loss, metrics, and logits, (P, 1) of the teacher's videos and (P, G) of their rollouts."""
    group, count = lesson.group, prompts.stop - prompts.start
    teacher, rollouts = lesson.teacher[prompts], lesson.rollouts[prompts.start * group : prompts.stop * group]
    if isinstance(config, PixelJudgeConfig) and config.augment:
        teacher, rollouts = _augmented(config, lesson, teacher, rollouts)
    shown = [teacher + rollouts]
    if config.is_penalised:
        shown.append(_perturbed(config, lesson, teacher, rollouts))
    if config.mismatch_weight:
        others = lesson.mismatched()[prompts]
        shown.append(others.seen(teacher.views or (None,) * count))
    # One pass for all: ZeRO-3 takes one forward of a block for each backward.
    logits, *more = judge(_joined(shown)).split([len(videos) for videos in shown])
    real, fake = logits[:count, None], logits[count:].unflatten(0, (count, -1))  # (P, 1), (P, G)
    if config.objective == "bradley_terry":
        loss = losses.bradley_terry_loss(real, fake)
    else:
        loss = losses.softplus_loss(real, fake)
    metrics = {
        "loss": loss.detach(),
        "accuracy": (real > fake).float().mean() + 0.5 * (real == fake).float().mean(),
        "margin": (real - fake).mean().detach(),
        "win_probability": (fake - real).sigmoid().mean().detach(),  # of a rollout against the teacher's video
    }
    if config.is_penalised:
        penalty = _penalty(config, logits, more.pop(0), count)
        metrics["penalty"] = penalty.detach()
        loss = loss + penalty
    if config.mismatch_weight:
        differ = [ours != theirs for ours, theirs in zip(teacher.prompts.ids, others.prompts.ids, strict=True)]
        wrong, differs = more.pop(0), logits.new_tensor(differ)
        mismatch = losses.mismatch_loss(real[:, 0], wrong, differs, config.objective)
        told = torch.where(differs > 0, (real[:, 0] > wrong).float(), 0.5)  # nobody tells a prompt from itself
        metrics["mismatch_accuracy"] = told.mean()
        loss = loss + config.mismatch_weight * mismatch
    return loss, metrics, real, fake


def _preferred(real: Tensor, fake: Tensor) -> Tensor:
    """Of each pair: 1, or 0.5 where neither is."""
    return (real > fake).float() + 0.5 * (real == fake).float()


def _joined(parts: list[Videos]) -> Videos:
    whole, *rest = parts
    for part in rest:
        whole = whole + part
    return whole


def _augmented(config: PixelJudgeConfig, lesson: Lesson, teacher: Videos, rollouts: Videos) -> tuple[Videos, Videos]:
    """Each prompt's videos through one change of its own."""
    drawn = lesson.randomness.uniform("judge/augment", lesson.step, teacher.prompts.keys, (4,))
    changes = [change_of(config.augment, numbers) for numbers in drawn.tolist()]
    return teacher.seen(changes), rollouts.seen([change for change in changes for _ in range(lesson.group)])


def _perturbed(config: JudgeConfig, lesson: Lesson, teacher: Videos, rollouts: Videos) -> Videos:
    """All videos with noise: in their latents, or where a judge sees pixels in these."""
    clean, deviation = teacher + rollouts, config.penalty_deviation
    streams = ["penalty/teacher"] * len(teacher) + ["penalty/student"] * len(rollouts)

    def noise(row: int, x: Tensor) -> Tensor:
        key = clean.prompts.keys[row]
        return lesson.randomness.normal(streams[row], lesson.step, (key,), tuple(x.shape[1:]), x.device)

    if not config.sees_pixels:
        rows = [clean.latents[row : row + 1] for row in range(len(clean))]
        return clean.of(torch.cat([x + deviation * noise(row, x) for row, x in enumerate(rows)]))

    def view(row: int) -> View:
        def add(pixels: Tensor) -> Tensor:
            look = clean.views[row] if clean.views else None
            seen = look(pixels) if look else pixels
            return seen + deviation * noise(row, seen)

        return add

    return clean.seen([view(row) for row in range(len(clean))])


def _penalty(config: JudgeConfig, logits: Tensor, perturbed: Tensor, prompts: int) -> Tensor:
    """R1 on the teacher's videos (the first rows) and R2 on the rollouts."""
    r1, r2 = (
        losses.finite_difference_penalty(logits[rows], perturbed[rows], config.penalty_deviation)
        for rows in (slice(prompts), slice(prompts, None))
    )
    return config.r1_weight * r1 + config.r2_weight * r2
