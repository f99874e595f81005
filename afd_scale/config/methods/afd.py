"""On-Policy Adversarial Flow Distillation: its settings, networks and passes."""

import re
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from afd_scale.config.cast import Load, Pass, Role
from afd_scale.config.judges import DiscriminatorConfig, PixelJudgeConfig
from afd_scale.config.methods.adversarial import AdversarialConfig
from afd_scale.config.methods.long_rollouts import LongRolloutsConfig
from afd_scale.config.methods.method import SigmaConfig
from afd_scale.config.models import OptimizerConfig, StudentConfig
from afd_scale.config.section import Section, Size


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
    rollouts_per_prompt: Size = 4
    """G: rollouts of the sampling policy for each prompt and step."""
    judges: dict[str, DiscriminatorConfig] = {}
    """More judges, by a name that is none of another role. Several add up as standardised scores, each centred and
    divided by the running mean and deviation of its own logits and times its weight. A discriminator of None leaves it
    to these; where none of them is trained the teacher's videos do not count."""
    reuse_logits: bool = False
    """Rewards are the logits of a judge's own training pass, of before its update; a second pass is left out."""
    trained_rollouts: PositiveInt | None = None
    """Rollouts of each prompt that judges are trained on; all are weighed. None is all of them."""
    judged_frames: PositiveInt | None = None
    """Latent frames that judges see of a video, whole chunks: a window whose place is drawn for each prompt and step,
    and is the same for all its videos. None shows all; of long rollouts a window as long as the teacher's videos."""
    judged_windows: int = Field(default=1, gt=0, le=1000)
    """Windows of `judged_frames` by which a rollout is weighed, spread evenly over it. 1 is that at the drawn place.
    With more each chunk has a weight of its own, the mean over the windows that hold it, each compared with those of
    the group at the same place; judges still learn from the one at the drawn place."""
    long_rollouts: LongRolloutsConfig | None = None
    """Rollouts longer than the teacher's videos, of which judges and the student see a window each. None is rollouts as
    long as these."""
    student_rollouts: PositiveInt | None = None
    """Rollouts of each prompt that the student learns from, chosen as `taught` says. None is as many as there are."""
    taught: Literal["extremes", "resampled"] = "extremes"
    """`extremes`: the best and the worst, whose weights differ most (PODS, arXiv:2504.13818). `resampled`: they are
    drawn with replacement, better ones more often, and all pull with weight 1; one that is drawn twice is noised in two
    ways."""
    resample_temperature: PositiveFloat = 1.0
    """Of `resampled`: rollouts are drawn with probability softmax(r / temperature) over their group, r the reward minus
    the group's mean over the group's standard deviation."""
    advantage: BaselineConfig = BaselineConfig()
    """From rewards to weights."""
    credit: Literal["forward", "regression"] = "forward"
    """`forward`: the contrastive loss on noised rollouts, good ones pull and bad ones push. `regression`: all pull,
    weighted by w over its mean in the batch; the old policy's velocities only say how far the student is from it."""
    policy_mix: PositiveFloat = Field(default=0.1, le=1)
    """beta of v+ = (1 - beta) v_old + beta v and v- = (1 + beta) v_old - beta v, in the `forward` loss."""
    prior_weight: NonNegativeFloat = 1e-4
    """lambda of the prior |v - v_reference|^2; 0 keeps no reference in memory."""
    prior_every: PositiveInt = 1
    """The prior, and the reference's pass, are left out but for every so many steps, where it has as many times its
    weight."""
    inner_updates: int = Field(default=1, gt=0, le=100)
    """Updates of the student by the rollouts of one step, each with noised states of its own."""
    step_target: PositiveFloat | None = None
    """A mean |v - v_old|, as the metric student/old_policy_distance has it, that the student's learning rate is steered
    to: after each step the rate's factor, student/rate_factor, is multiplied by sqrt(target / measured), within
    [0.8, 1.25], and stays within [0.1, 10]. None leaves the rate to the schedule."""
    normalise: bool = True
    """Divide each sample's x0 error by its stop-gradient mean (DiffusionNFT); off: the plain velocity form."""
    sigma: SigmaConfig = SigmaConfig()
    """Noise levels of the forward process on the student's own samples."""
    states_per_rollout: int = Field(default=1, gt=0, le=1000)
    """Noised states drawn from one rollout; they share one pass over the clean context."""
    context_gradient: bool = False
    """Let gradients flow through the pass over the clean context."""
    old_policy_decay: float = Field(default=0.99, ge=0, lt=1)
    """v_old <- decay v_old + (1 - decay) v after each step."""
    old_policy_warmup: NonNegativeFloat = 0.0
    """With a positive rate r the decay is min(r k, old_policy_decay) at step k (DiffusionNFT); 0 is constant."""

    @model_validator(mode="after")
    def _check_judges(self) -> "AfdConfig":
        if not self.all_judges:
            raise ValueError("discriminator (null) must be given where judges is empty: nobody would weigh rollouts")
        for name in self.judges:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "discriminator":
                raise ValueError(f"judges ({name}) must be small letters, digits and _, and not discriminator: "
                                 "a role, a folder and a metric have this name")  # fmt: skip
        for name in ("trained_rollouts", "student_rollouts"):
            some = getattr(self, name)
            if some is not None and some > self.rollouts_per_prompt:
                raise ValueError(f"{name} ({some}) must be at most rollouts_per_prompt ({self.rollouts_per_prompt})")
        trained = self.trained_rollouts
        if trained not in (None, self.rollouts_per_prompt) and self.reuse_logits:
            raise ValueError(f"trained_rollouts ({trained}) must be all of rollouts_per_prompt with reuse_logits: the "
                             "others have no logit to take")  # fmt: skip
        if self.judged_windows > 1:
            for name in ("long_rollouts", "reuse_logits"):
                if getattr(self, name):
                    raise ValueError(f"judged_windows ({self.judged_windows}) must be 1 with {name}: judges see one "
                                     "window of a rollout there")  # fmt: skip
        freezes = any(judge.freeze_after is not None for judge in self.all_judges.values())
        if freezes and self.reuse_logits:
            raise ValueError("reuse_logits (True) must be off with a judge's freeze_after: a frozen judge has no "
                             "training pass to take logits of")  # fmt: skip
        trains = any(judge.optimizer for judge in self.all_judges.values())
        for name in ("reuse_logits", "trained_rollouts"):
            if getattr(self, name) and not trains:
                raise ValueError(f"{name} ({getattr(self, name)}) must be left out where no judge is trained")
        if self.reuse_logits and any(
            isinstance(judge, PixelJudgeConfig) and judge.augment for judge in self.all_judges.values()
        ):
            raise ValueError(
                "reuse_logits (True) must be off with a judge's augment: rewards would be of changed pixels"
            )
        if not self.prior_weight and self.prior_every > 1:
            raise ValueError(f"prior_every ({self.prior_every}) must be 1 with prior_weight 0: there is no prior")
        if self.long_rollouts is not None and self.advantage.baseline != "group":
            raise ValueError(f"advantage.baseline ({self.advantage.baseline}) must be group with long_rollouts: a "
                             "prompt's windows are of one time, others of other times")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _check_group(self) -> "AfdConfig":
        if self.resample_temperature != 1 and self.taught != "resampled":
            raise ValueError(f"resample_temperature ({self.resample_temperature}) must be left out where taught is "
                             f"{self.taught}: nothing is drawn")  # fmt: skip
        if self.rollouts_per_prompt < 2 and self.taught == "resampled":
            raise ValueError(f"rollouts_per_prompt ({self.rollouts_per_prompt}) must be at least 2 for taught "
                             "resampled: there is nothing to choose from")  # fmt: skip
        if self.rollouts_per_prompt < 2 and "group" in (self.advantage.baseline, self.advantage.spread):
            raise ValueError(f"rollouts_per_prompt ({self.rollouts_per_prompt}) must be at least 2 for a group "
                             "baseline or spread: one rollout equals its group's mean; use batch")  # fmt: skip
        return self

    def cast(self, student: StudentConfig) -> tuple[Role, ...]:
        trained = Role("student", "student", student, self.optimizer)
        reference = (trained.copy("reference"),) if self.prior_weight else ()
        return (trained, trained.average("old_policy"), *reference, *self._judge_roles())

    @property
    def all_judges(self) -> dict[str, DiscriminatorConfig]:
        return super().all_judges | self.judges

    def passes(self, load: Load) -> tuple[Pass, ...]:
        prompts, group, states = load.prompts + load.extra_prompts, self.rollouts_per_prompt, self.states_per_rollout
        videos, learned = prompts * group, prompts * (self.student_rollouts or group)
        long = self.long_rollouts
        learned_together = learned if long is None else self.student_rollouts or group
        at_once, learned_at_once = (min(load.micro_batch or rows, rows) for rows in (videos, learned_together))
        frozen = {"old_policy": 1} | ({"reference": self.prior_every} if self.prior_weight else {})
        # The teacher's are there for the whole step; of a long rollout a window, and what stands before it.
        held = load.prompts + (videos if long is None else 2 * videos)
        seen: dict[str, Any] = {"given": load.start_frames} if long is None else {
            "frames": self.judged_frames, "within": long.frames, "context": long.context_frames,
            "group": learned_together,
        }  # fmt: skip
        kept = held + learned * states * (1 + len(frozen))  # and the states: noisy latents and frozen velocities
        return (
            Pass("rollout", "old_policy", "rollout", videos, at_once, held=held, warm_up=True,
                 frames=None if long is None else long.frames, given=load.start_frames),
            *(each for name in self.all_judges for each in self._judged(name, load, held)),
            *([Pass("velocities", role, "velocity", learned, learned_at_once, states=states, held=kept, every=every,
                    **seen)
               for role, every in frozen.items()]
              + [Pass("student", "student", "velocity", learned, learned_at_once, gradient=True, states=states,
                      context_gradient=self.context_gradient, held=kept, **seen)]) * self.inner_updates,
        )  # fmt: skip

    def _judged(self, name: str, load: Load, held: int) -> tuple[Pass, ...]:
        """What a judge learns and says in a step."""
        is_trained = self.all_judges[name].optimizer is not None
        known = load.prompts if is_trained and self.reuse_logits else 0
        asked = (load.prompts + load.extra_prompts - known) * self.rollouts_per_prompt
        update = self._update(name, load, held, self.trained_rollouts)
        asked *= self.judged_windows
        at_once = min(load.micro_batch or asked, asked)
        question = Pass(name, name, "score", asked, at_once, held=held, windows=self.judged_windows)
        passes = ((update,) if is_trained else ()) + ((question,) if asked else ())
        return tuple(replace(each, frames=self.judged_frames) for each in passes)
