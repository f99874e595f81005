"""What every method's section has."""

from abc import abstractmethod
from typing import ClassVar, Literal

from pydantic import PositiveFloat

from afd_scale.config.cast import Load, Pass, Role
from afd_scale.config.models import StudentConfig
from afd_scale.config.section import Section


class MethodConfig(Section):
    """What one training step does; a variant adds its fields, and says its cast and its passes."""

    step: ClassVar[str]
    """`module:Class` of the training step, made of (config, engines by role, mean over ranks); imported when a run is
    built, for a section needs no torch."""
    name: str
    """Tag of the method: one of ours, or `module:Class` of a section from elsewhere."""

    @abstractmethod
    def cast(self, student: StudentConfig) -> tuple[Role, ...]:
        """The networks that take part; a copy comes after its original."""

    @abstractmethod
    def passes(self, load: Load) -> tuple[Pass, ...]:
        """What one step runs, in its order."""

    @property
    def warm_up(self) -> int:
        """Steps before the first one, in which what must be learned before the student moves is learned."""
        return 0

    @property
    def exported(self) -> str:
        """The role that is evaluated, shown and exported."""
        return "student"


class SigmaConfig(Section):
    """From where a training sigma is drawn."""

    name: Literal["steps", "uniform", "logit_normal"] = "steps"
    """`steps`: the sampler's own warped denoising steps; `uniform` on [0, 1]; `logit_normal`, then warped by the
    sampler's timestep_shift."""
    mean: float = 0.0
    """Mean of the logit-normal."""
    deviation: PositiveFloat = 1.0
    """Standard deviation of the logit-normal."""
