"""What the sections of methods with judges have in common."""

from typing import Any

from pydantic import model_validator

from afd_scale.config.cast import Load, Pass, Role
from afd_scale.config.judges import ConvDiscriminatorConfig, DiscriminatorConfig, JudgeConfig
from afd_scale.config.methods.method import MethodConfig
from afd_scale.config.section import Size

# What stood beside the discriminator's section before there were several judges, by its place within.
EARLIER_NAMES = {
    "discriminator_optimizer": "optimizer", "discriminator_objective": "objective",
    "discriminator_warmup_steps": "warmup_steps", "r1_weight": "r1_weight", "r2_weight": "r2_weight",
    "penalty_deviation": "penalty_deviation",
}  # fmt: skip


class AdversarialConfig(MethodConfig):
    """A discriminator that learns to tell the teacher's videos from rollouts of the same prompts."""

    rollouts_per_prompt: Size = 1
    """G: rollouts for each prompt and step."""
    discriminator: DiscriminatorConfig | None = ConvDiscriminatorConfig()
    """The prompt-paired scorer."""

    @model_validator(mode="before")
    @classmethod
    def _take_earlier_names(cls, values: Any) -> Any:
        """Into the discriminator's section, over what is there."""
        if not isinstance(values, dict) or not (earlier := EARLIER_NAMES.keys() & values.keys()):
            return values
        if "warmup_steps" in cls.model_fields and "discriminator_warmup_steps" in earlier:  # a method with its own
            values = {"warmup_steps": values["discriminator_warmup_steps"], **values}
        judge = values.get("discriminator", {"name": "conv"})
        if not isinstance(judge, dict):
            raise ValueError(f"{min(earlier)} must be left out where discriminator is {judge}: it is of its training")
        judge = dict(judge)
        for name in sorted(earlier):
            place, value = EARLIER_NAMES[name], values[name]
            both = isinstance(value, dict) and isinstance(judge.get(place), dict)
            judge[place] = {**judge[place], **value} if both else value
        return {**{name: value for name, value in values.items() if name not in earlier}, "discriminator": judge}

    @model_validator(mode="after")
    def _check_weight(self) -> "AdversarialConfig":
        if len(self.all_judges) == 1:
            (judge,) = self.all_judges.values()
            if judge.weight != 1:
                raise ValueError(f"weight ({judge.weight}) must be left out of a judge that is alone: nothing is added")
        return self

    @property
    def all_judges(self) -> dict[str, DiscriminatorConfig]:
        """By role."""
        return {} if self.discriminator is None else {"discriminator": self.discriminator}

    @property
    def warm_up(self) -> int:
        """The longest of a judge."""
        return max((judge.warmup_steps for judge in self.all_judges.values() if judge.optimizer), default=0)

    def prompts_at_once(self, judge: JudgeConfig, rollouts: int, micro_batch: int | None) -> int | None:
        """Prompts, each with its videos, that pass through a judge together while it is trained.

        Args:
            rollouts: of a prompt, that it is trained on.
        """
        return None if micro_batch is None else max(1, micro_batch // (judge.rows_of_prompt + rollouts))

    def _judge_roles(self) -> tuple[Role, ...]:
        return tuple(Role(name, _section(name), judge, judge.optimizer) for name, judge in self.all_judges.items())

    def _update(self, name: str, load: Load, held: int, rollouts: int | None = None) -> Pass:
        """A judge on the teacher's videos and rollouts of their prompts, and on perturbed copies.

        Args:
            rollouts: of a prompt, that it is trained on; None is all.
        """
        judge, rollouts = self.all_judges[name], rollouts or self.rollouts_per_prompt
        judged = judge.rows_of_prompt + rollouts + (1 + rollouts if judge.is_penalised else 0)  # of a prompt
        at_once = judged * min(self.prompts_at_once(judge, rollouts, load.micro_batch) or load.prompts, load.prompts)
        return Pass(name, name, "score", load.prompts * judged, at_once, gradient=True, held=held,
                    last=judge.freeze_after, warm_up=True)  # fmt: skip

    def _check_gradient(self) -> None:
        """For methods that need the logit's gradient by the latents."""
        judge = self.discriminator
        if judge is None or judge.optimizer is None:
            raise ValueError("discriminator must be given, with an optimizer: it learns beside the student")
        if judge.freeze_after is not None:
            raise ValueError(f"discriminator.freeze_after ({judge.freeze_after}) must be left out: it learns in every "
                             "step; afd may freeze it")  # fmt: skip
        if judge.sees_pixels:
            raise ValueError(f"discriminator.name ({judge.name}) must be conv or latent: the student learns from the "
                             "logit's gradient by its latents, and decoding passes none on; afd needs none"
                             )  # fmt: skip

    def _judgement(self, load: Load, held: int, every: int) -> tuple[Pass, ...]:
        """The gradient of the generator's loss by the rollouts, against the teacher's logits where they are paired."""
        assert self.discriminator is not None, "checked with the section"
        videos = load.prompts * self.rollouts_per_prompt
        at_once, of_teacher = (min(load.micro_batch or rows, rows) for rows in (videos, load.prompts))
        teacher = Pass("judgement", "discriminator", "score", load.prompts, of_teacher, held=held, every=every)
        return (
            *((teacher,) if self.discriminator.objective == "bradley_terry" else ()),
            Pass("judgement", "discriminator", "score", videos, at_once, gradient=True, of_input=True,
                 held=held + videos, every=every),
        )  # fmt: skip


def _section(judge: str) -> str:
    return "method.discriminator" if judge == "discriminator" else f"method.judges.{judge}"
