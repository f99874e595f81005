"""Sections of the training methods, a union tagged by `name`."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from afd_scale.config.models import ConvDiscriminatorConfig, DiscriminatorConfig, OptimizerConfig
from afd_scale.config.section import Section


class SigmaConfig(Section):
    """From where a training sigma is drawn."""

    name: Literal["steps", "uniform", "logit_normal"] = "steps"
    """`steps`: the student's own warped denoising steps; `uniform` on [0, 1]; `logit_normal`, then warped by the
    student's timestep_shift."""
    mean: float = 0.0
    """Mean of the logit-normal."""
    deviation: PositiveFloat = 1.0
    """Standard deviation of the logit-normal."""


class SftConfig(Section):
    """Flow matching on the teacher's videos, each chunk given the clean past (teacher forcing)."""

    name: Literal["sft"] = "sft"
    """Tag of this method."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    """The student's optimizer."""
    sigma: SigmaConfig = SigmaConfig(name="uniform")
    """Noise levels; one for each chunk of each sample."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Average of the weights that is evaluated and exported; 0 keeps none."""


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


class AfdConfig(Section):
    """On-Policy Adversarial Flow Distillation, arXiv:2605.26105."""

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

    def prompts_at_once(self, micro_batch: int | None) -> int | None:
        """Prompts, each a teacher video and its rollouts, that pass through the discriminator together."""
        return None if micro_batch is None else max(1, micro_batch // (1 + self.rollouts_per_prompt))


MethodConfig = Annotated[AfdConfig | SftConfig, Field(discriminator="name")]
