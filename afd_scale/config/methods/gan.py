"""Self-Forcing's GAN: its settings, networks and passes."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from afd_scale.config.cast import Load, Pass, Role
from afd_scale.config.methods.adversarial import AdversarialConfig
from afd_scale.config.models import OptimizerConfig, StudentConfig


class GanConfig(AdversarialConfig):
    """Adversarial training with the gradient through the last denoising step, Self-Forcing, arXiv:2506.08009."""

    step = "afd_scale.methods.gan:Gan"
    name: Literal["gan"] = "gan"
    """Tag of this method."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-6, betas=(0.0, 0.999))
    """The student's optimizer."""
    student_every: PositiveInt = 1
    """The student is updated in every so many steps; the others train the discriminator only."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Average of the student, per update of it, that is evaluated and exported; 0 keeps none."""

    @model_validator(mode="after")
    def _check(self) -> "GanConfig":
        self._check_gradient()
        return self

    def cast(self, student: StudentConfig) -> tuple[Role, ...]:
        trained = Role("student", "student", student, self.optimizer)
        average = (trained.average("average"),) if self.ema_decay else ()
        return (trained, *average, *self._judge_roles())

    def passes(self, load: Load) -> tuple[Pass, ...]:
        """Rollouts to their end: a random exit ends them earlier."""
        videos, every = load.prompts * self.rollouts_per_prompt, self.student_every
        at_once = min(load.micro_batch or videos, videos)
        held = load.prompts + 2 * videos  # the teacher's; rollouts, and what their last steps saw
        given = load.start_frames
        return (
            Pass("rollout", "student", "rollout", videos, at_once, held=held, warm_up=True, given=given),
            self._update("discriminator", load, held),
            *self._judgement(load, held, every),
            Pass("student", "student", "velocity", videos, at_once, gradient=True, held=held + videos, every=every,
                 given=given),
        )  # fmt: skip

    @property
    def exported(self) -> str:
        return "average" if self.ema_decay else "student"
