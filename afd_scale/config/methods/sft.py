"""Supervised fine-tuning."""

from typing import Literal

from pydantic import Field

from afd_scale.config.cast import Load, Pass, Role
from afd_scale.config.methods.method import MethodConfig, SigmaConfig
from afd_scale.config.models import OptimizerConfig, StudentConfig


class SftConfig(MethodConfig):
    """Flow matching on the teacher's videos, each chunk given the clean past (teacher forcing)."""

    step = "afd_scale.methods.sft:Sft"
    name: Literal["sft"] = "sft"
    """Tag of this method."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    """The student's optimizer."""
    sigma: SigmaConfig = SigmaConfig(name="uniform")
    """Noise levels; one for each chunk of each sample."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Average of the weights that is evaluated and exported; 0 keeps none."""

    def cast(self, student: StudentConfig) -> tuple[Role, ...]:
        trained = Role("student", "student", student, self.optimizer)
        return (trained, trained.average("average")) if self.ema_decay else (trained,)

    def passes(self, load: Load) -> tuple[Pass, ...]:
        videos = load.prompts
        at_once = min(load.micro_batch or videos, videos)
        return (Pass("student", "student", "velocity", videos, at_once, gradient=True, context_gradient=True,
                     held=videos, given=load.start_frames),)  # fmt: skip

    @property
    def exported(self) -> str:
        return "average" if self.ema_decay else "student"
