"""Self-Forcing's GAN, arXiv:2506.08009. One step, in order:

1. Rollout. The student generates G videos for each prompt, and leaves the sampler at a random step (self_rollout.py).
2. Discriminator. D(video, y) -> logit learns to prefer the teacher's video of the same prompt.
3. Judgement. The gradient of the generator's loss with respect to each rollout, through D and no further.
4. Student. The gradient goes on from there through its last denoising step.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from afd_scale.config import RunConfig
from afd_scale.config.methods import GanConfig
from afd_scale.flow.randomness import Randomness
from afd_scale.methods.judges import Lesson, judge_rollouts, train_judge
from afd_scale.methods.self_rollout import follow, roll_out, train_student
from afd_scale.methods.updates import learning_rate
from afd_scale.protocols import AveragedPolicy, Metrics, TrainedPolicy, TrainedScorer
from afd_scale.rollout.sampler import Sampler
from afd_scale.types import Batch, RankMean


class Gan:
    """Student against discriminator.

    Args:
        engines: by role, as `GanConfig.cast` names them.
    """

    config: GanConfig

    def __init__(self, run: RunConfig, engines: Mapping[str, Any], mean_over_ranks: RankMean):
        assert isinstance(run.method, GanConfig)
        (self.judge,) = run.method.all_judges.values()
        self.config, self.steps, self.randomness = run.method, run.train.steps, Randomness(run.seed)
        self.student: TrainedPolicy = engines["student"]
        self.average: AveragedPolicy | None = engines.get("average")
        self.discriminator: TrainedScorer = engines["discriminator"]
        self.warmup_steps, self.memory = self.config.warm_up, dict[str, Tensor]()
        self.sampler, self.start_frames = Sampler(run.sampler), run.data.start_frames

    def train_step(self, batch: Batch, step: int) -> Metrics:
        config, teacher = self.config, batch.teacher
        prompts = teacher.prompts.repeat(config.rollouts_per_prompt)
        rollouts = roll_out(self.student, self.sampler, prompts, teacher, self.randomness, step, self.start_frames)
        lesson = Lesson(teacher, rollouts.videos, self.randomness, step, self.steps)
        at_once = config.prompts_at_once(self.judge, lesson.group, self.discriminator.micro_batch)
        discriminator_metrics, *_ = train_judge("discriminator", self.discriminator, self.judge, lesson, at_once)
        if step < 1 or step % config.student_every:
            return discriminator_metrics
        loss, gradient = judge_rollouts(self.discriminator, self.judge, teacher, rollouts.videos)
        rate = learning_rate(config.optimizer, step, self.steps)
        student_metrics = train_student(self.student, rollouts, gradient[:, self.start_frames :], rate)
        if self.average is not None:
            follow(self.average, self.student, config.ema_decay, step // config.student_every)
        return {**discriminator_metrics, **student_metrics, "student/loss": loss}
