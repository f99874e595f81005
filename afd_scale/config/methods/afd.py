"""On-Policy Adversarial Flow Distillation: its settings, networks and passes."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from afd_scale.config.cast import Load, Pass, Role
from afd_scale.config.methods.adversarial import AdversarialConfig
from afd_scale.config.methods.method import SigmaConfig
from afd_scale.config.models import OptimizerConfig, StudentConfig
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


class AfdConfig(AdversarialConfig):
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

    @model_validator(mode="after")
    def _check_group(self) -> "AfdConfig":
        if self.rollouts_per_prompt < 2 and "group" in (self.advantage.baseline, self.advantage.spread):
            raise ValueError(f"rollouts_per_prompt ({self.rollouts_per_prompt}) must be at least 2 for a group "
                             "baseline or spread: one rollout equals its group's mean; use batch")  # fmt: skip
        return self

    def cast(self, student: StudentConfig) -> tuple[Role, ...]:
        trained = Role("student", "student", student, self.optimizer)
        reference = (trained.copy("reference"),) if self.prior_weight else ()
        return (trained, trained.average("old_policy"), *reference, self._discriminator_role())

    def passes(self, load: Load) -> tuple[Pass, ...]:
        prompts, group, states = load.prompts + load.extra_prompts, self.rollouts_per_prompt, self.states_per_rollout
        videos = prompts * group
        at_once = min(load.micro_batch or videos, videos)
        frozen = ("old_policy", "reference") if self.prior_weight else ("old_policy",)
        held = load.prompts + videos  # the teacher's are there for the whole step
        kept = held + videos * states * (1 + len(frozen))  # and the states: noisy latents and frozen velocities
        return (
            Pass("rollout", "old_policy", "rollout", videos, at_once, held=held),
            self._discriminator_update(load, held),
            Pass("discriminator", "discriminator", "score", videos, at_once, held=held),
            *(Pass("velocities", role, "velocity", videos, at_once, states=states, held=kept) for role in frozen),
            Pass("student", "student", "velocity", videos, at_once, gradient=True, states=states,
                 context_gradient=self.context_gradient, held=kept),
        )  # fmt: skip
