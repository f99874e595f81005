"""What the sections of methods with a discriminator have in common."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from afd_scale.config.cast import Load, Pass, Role
from afd_scale.config.methods.method import MethodConfig
from afd_scale.config.models import (
    ConvDiscriminatorConfig,
    DiscriminatorConfig,
    OptimizerConfig,
    VlmDiscriminatorConfig,
)


class AdversarialConfig(MethodConfig):
    """A discriminator that learns to tell the teacher's videos from rollouts of the same prompts."""

    rollouts_per_prompt: PositiveInt = 1
    """G: rollouts for each prompt and step."""
    discriminator: DiscriminatorConfig = ConvDiscriminatorConfig()
    """The prompt-paired scorer."""
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-6)
    """Its optimizer; learning_rate 0 freezes it."""
    discriminator_objective: Literal["bradley_terry", "softplus"] = "bradley_terry"
    """Prompt-paired Bradley-Terry loss, or the non-paired GAN loss."""
    discriminator_warmup_steps: int = Field(default=0, ge=0)
    """First steps that train the discriminator only."""
    r1_weight: NonNegativeFloat = 0.0
    """Weight of the finite-difference R1 penalty on the teacher's videos; 0 is off."""
    r2_weight: NonNegativeFloat = 0.0
    """The same on the rollouts."""
    penalty_deviation: PositiveFloat = 0.1
    """Standard deviation of the perturbation that R1 and R2 difference over; much smaller drowns in bf16 rounding."""

    @property
    def is_penalised(self) -> bool:
        return self.r1_weight > 0 or self.r2_weight > 0

    def prompts_at_once(self, micro_batch: int | None) -> int | None:
        """Prompts, each a teacher video and its rollouts, that pass through the discriminator together."""
        return None if micro_batch is None else max(1, micro_batch // (1 + self.rollouts_per_prompt))

    def _discriminator_role(self) -> Role:
        return Role("discriminator", "method.discriminator", self.discriminator, self.discriminator_optimizer)

    def _discriminator_update(self, load: Load, held: int) -> Pass:
        """On the teacher's videos and the rollouts of their prompts, and on perturbed copies."""
        judged = (1 + self.rollouts_per_prompt) * (2 if self.is_penalised else 1)  # of a prompt
        at_once = judged * min(self.prompts_at_once(load.micro_batch) or load.prompts, load.prompts)
        return Pass("discriminator", "discriminator", "score", load.prompts * judged, at_once, gradient=True, held=held)

    def _refuse_pixels(self) -> None:
        """For methods that need the logit's gradient by the latents."""
        if isinstance(self.discriminator, VlmDiscriminatorConfig):
            raise ValueError("discriminator.name (vlm) must be conv or latent: the student learns from the logit's "
                             "gradient by its latents, and decoding passes none on; afd needs none")  # fmt: skip

    def _judgement(self, load: Load, held: int) -> tuple[Pass, ...]:
        """The gradient of the generator's loss by the rollouts, against the teacher's logits where they are paired."""
        videos = load.prompts * self.rollouts_per_prompt
        at_once, of_teacher = (min(load.micro_batch or rows, rows) for rows in (videos, load.prompts))
        teacher = Pass("judgement", "discriminator", "score", load.prompts, of_teacher, held=held)
        return (
            *((teacher,) if self.discriminator_objective == "bradley_terry" else ()),
            Pass("judgement", "discriminator", "score", videos, at_once, gradient=True, of_input=True,
                 held=held + videos),
        )  # fmt: skip
