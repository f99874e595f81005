"""Distribution matching distillation: its settings, networks and passes."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from afd_scale.config.cast import Load, Pass, Role
from afd_scale.config.judges import DiscriminatorConfig
from afd_scale.config.methods.adversarial import AdversarialConfig
from afd_scale.config.models import OptimizerConfig, ScoreConfig, StudentConfig

CRITIC = OptimizerConfig(learning_rate=4e-7, betas=(0.0, 0.999))


class DmdConfig(AdversarialConfig):
    """Distribution matching on the student's rollouts, Self-Forcing (arXiv:2506.08009) with DMD (arXiv:2405.14867)."""

    step = "afd_scale.methods.dmd:Dmd"
    name: Literal["dmd"] = "dmd"
    """Tag of this method."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-6, betas=(0.0, 0.999))
    """The student's optimizer."""
    student_every: PositiveInt = 5
    """The student is updated in every so many steps; the others train fake score and discriminator only."""
    fake_score: ScoreConfig = Field(default_factory=lambda: ScoreConfig.model_validate({}))
    """Learns the distribution of the student's rollouts."""
    fake_score_optimizer: OptimizerConfig = CRITIC
    """Its optimizer."""
    real_score: ScoreConfig | None = None
    """Knows the distribution that is wanted, and is frozen: a white-box teacher's, or one trained on other data. None
    is the fake score as it starts; with adapters on that, its base."""
    guidance_scale: NonNegativeFloat = 4.0
    """Of the real score, v_negative + scale (v - v_negative); 1 is none, and saves its second pass. Self-Forcing counts
    from v, so that its 3 is 4 here."""
    negative: Path | None = None
    """A .safetensors file whose `embedding` (T, E) is the text that guidance leads away from; None is zeros."""
    sigma_range: tuple[float, float] = (0.02, 0.98)
    """Noise levels of both scores: uniform, warped by the sampler's timestep_shift, held within this range."""
    gan_weight: NonNegativeFloat = 0.0
    """Weight of the generator's loss beside the distribution matching; 0 keeps no discriminator. Prompts without a
    teacher's video have none of it."""
    warmup_steps: NonNegativeInt = 0
    """Steps before the first one that train fake score and discriminator only, this one as long as it says itself."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Average of the student, per update of it, that is evaluated and exported; 0 keeps none."""

    @model_validator(mode="after")
    def _check(self) -> "DmdConfig":
        if self.gan_weight:
            self._check_gradient()
        low, high = self.sigma_range
        if not 0 < low < high <= 1:
            raise ValueError(f"sigma_range ({low}, {high}) must rise within (0, 1]: clean videos have no score")
        return self

    @property
    def all_judges(self) -> dict[str, DiscriminatorConfig]:
        return super().all_judges if self.gan_weight else {}

    @property
    def warm_up(self) -> int:
        return max(self.warmup_steps, super().warm_up)

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale != 1

    def cast(self, student: StudentConfig) -> tuple[Role, ...]:
        trained = Role("student", "student", student, self.optimizer)
        fake = Role("fake_score", "method.fake_score", self.fake_score, self.fake_score_optimizer)
        real = Role("real_score", "method.real_score", self.real_score) if self.real_score else fake.copy("real_score")
        average = (trained.average("average"),) if self.ema_decay else ()
        return (trained, *average, fake, real, *self._judge_roles())

    def passes(self, load: Load) -> tuple[Pass, ...]:
        """Rollouts to their end: a random exit ends them earlier."""
        every = self.student_every
        videos = (load.prompts + load.extra_prompts) * self.rollouts_per_prompt
        at_once = min(load.micro_batch or videos, videos)
        held = load.prompts + 2 * videos  # the teacher's; rollouts, and what their last steps saw
        kept, given = held + 2 * videos, load.start_frames  # and what the scores make of them

        def score(role: str, network: ScoreConfig, trains: bool = False) -> Pass:
            return Pass(
                role if trains else "scores", role, "velocity" if network.causal else "bidirectional", videos, at_once,
                trains, context_gradient=trains and network.causal, held=kept, every=1 if trains else every,
                warm_up=trains, given=given if network.causal else 0,
            )  # fmt: skip

        real = score("real_score", self.real_score or self.fake_score)
        return (
            Pass("rollout", "student", "rollout", videos, at_once, held=held, warm_up=True, given=given),
            score("fake_score", self.fake_score, trains=True),
            *(self._update(name, load, held) for name in self.all_judges),
            *(real for _ in range(1 + self.is_guided)),
            score("fake_score", self.fake_score),
            *(self._judgement(load, kept, every) if self.gan_weight else ()),
            Pass("student", "student", "velocity", videos, at_once, gradient=True, held=held + videos, every=every,
                 given=given),
        )  # fmt: skip

    @property
    def exported(self) -> str:
        return "average" if self.ema_decay else "student"
