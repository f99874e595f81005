"""On-Policy Adversarial Flow Distillation: its settings, networks and passes."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from afd_scale.config.cast import Load, Pass, Role
from afd_scale.config.methods.method import MethodConfig, SigmaConfig
from afd_scale.config.models import ConvDiscriminatorConfig, DiscriminatorConfig, OptimizerConfig, StudentConfig
from afd_scale.config.section import Section


class BaselineConfig(Section):
    """How rewards become advantages and weights."""

    baseline: Literal["batch", "group"] = "group"
    """Mean that is subtracted: of the whole batch, or of the rollouts of the same prompt."""
    spread: Literal["none", "group", "batch"] = "batch"
    """Standard deviation of the centred rewards that divides them."""
    spread_floor: PositiveFloat = 1e-2
    """Smallest divisor: an undecided discriminator must not be amplified."""
    clip: PositiveFloat = 5.0
    """Advantages are clipped to +-clip, which maps to weights 0 and 1."""


class AfdConfig(MethodConfig):
    """On-Policy Adversarial Flow Distillation, arXiv:2605.26105."""

    step = "afd_scale.methods.afd:Afd"
    name: Literal["afd"] = "afd"
    """Tag of this method."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    """The student's optimizer."""
    rollouts_per_prompt: PositiveInt = 4
    """G: rollouts of the sampling policy for each prompt and step."""
    advantage: BaselineConfig = BaselineConfig()
    """From discriminator logits to weights."""
    policy_mix: PositiveFloat = Field(default=0.1, le=1)
    """beta of v+ = (1 - beta) v_old + beta v and v- = (1 + beta) v_old - beta v."""
    prior_weight: NonNegativeFloat = 1e-4
    """lambda of the prior |v - v_reference|^2; 0 keeps no reference in memory."""
    normalise: bool = True
    """Divide each sample's x0 error by its stop-gradient mean (DiffusionNFT); off: the plain velocity form."""
    sigma: SigmaConfig = SigmaConfig()
    """Noise levels of the forward process on the student's own samples."""
    states_per_rollout: PositiveInt = 1
    """Noised states drawn from one rollout; they share one pass over the clean context."""
    context_gradient: bool = False
    """Let gradients flow through the pass over the clean context."""
    old_policy_decay: float = Field(default=0.99, ge=0, lt=1)
    """v_old <- decay v_old + (1 - decay) v after each step."""
    old_policy_warmup: NonNegativeFloat = 0.0
    """With a positive rate r the decay is min(r k, old_policy_decay) at step k (DiffusionNFT); 0 is constant."""
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

    @model_validator(mode="after")
    def _check_group(self) -> "AfdConfig":
        if self.rollouts_per_prompt < 2 and "group" in (self.advantage.baseline, self.advantage.spread):
            raise ValueError(f"rollouts_per_prompt ({self.rollouts_per_prompt}) must be at least 2 for a group "
                             "baseline or spread: one rollout equals its group's mean; use batch")  # fmt: skip
        return self

    def cast(self, student: StudentConfig) -> tuple[Role, ...]:
        trained = Role("student", "student", student, self.optimizer)
        discriminator = Role("discriminator", "method.discriminator", self.discriminator, self.discriminator_optimizer)
        reference = (trained.copy("reference"),) if self.prior_weight else ()
        return (trained, trained.average("old_policy"), *reference, discriminator)

    def passes(self, load: Load) -> tuple[Pass, ...]:
        prompts, group, states = load.prompts + load.extra_prompts, self.rollouts_per_prompt, self.states_per_rollout
        videos = prompts * group
        at_once = min(load.micro_batch or videos, videos)
        judged = (1 + group) * (2 if self.is_penalised else 1)  # of a prompt
        judged_at_once = judged * min(self.prompts_at_once(load.micro_batch) or load.prompts, load.prompts)
        frozen = ("old_policy", "reference") if self.prior_weight else ("old_policy",)
        held = load.prompts + videos  # the teacher's are there for the whole step
        kept = held + videos * states * (1 + len(frozen))  # and the states: noisy latents and frozen velocities
        return (
            Pass("rollout", "old_policy", "rollout", videos, at_once, held=held),
            Pass("discriminator", "discriminator", "score", load.prompts * judged, judged_at_once, gradient=True,
                 held=held),
            Pass("discriminator", "discriminator", "score", videos, at_once, held=held),
            *(Pass("velocities", role, "velocity", videos, at_once, states=states, held=kept) for role in frozen),
            Pass("student", "student", "velocity", videos, at_once, gradient=True, states=states,
                 context_gradient=self.context_gradient, held=kept),
        )  # fmt: skip

    @property
    def is_penalised(self) -> bool:
        return self.r1_weight > 0 or self.r2_weight > 0

    def prompts_at_once(self, micro_batch: int | None) -> int | None:
        """Prompts, each a teacher video and its rollouts, that pass through the discriminator together."""
        return None if micro_batch is None else max(1, micro_batch // (1 + self.rollouts_per_prompt))
