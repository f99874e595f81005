"""What a method says of itself as plain data: which networks take part, its cast, and what one step runs, its passes.

Builder, checkpoints, planner, benchmarks and the rules between sections loop over these two, and ask no method for its
name.
"""

from dataclasses import dataclass
from typing import Literal

from afd_scale.config.models import NetworkConfig, OptimizerConfig


@dataclass(frozen=True)
class Role:
    """One network of a cast.

    Attributes:
        name: of the role, of its folder in a checkpoint, and of its adapter where it is one.
        section: of the config that describes its network, for errors.
        network: that section's value.
        optimizer: of a network that is trained.
        of: the role that it starts as a copy of; with LoRA both are one base and two adapters, or the base itself.
        follows: it is a running average of `of`; otherwise it stays as it starts.
    """

    name: str
    section: str
    network: NetworkConfig
    optimizer: OptimizerConfig | None = None
    of: str | None = None
    follows: bool = False

    def average(self, name: str) -> "Role":
        """A frozen role that follows this one."""
        return Role(name, self.section, self.network, of=self.name, follows=True)

    def copy(self, name: str) -> "Role":
        """A frozen role that stays where this one starts."""
        return Role(name, self.section, self.network, of=self.name)

    @property
    def changes(self) -> bool:
        """Whether a checkpoint must hold it."""
        return self.optimizer is not None or self.follows


@dataclass(frozen=True)
class Load:
    """A data rank's share of one step.

    Attributes:
        prompts: each with a teacher video.
        extra_prompts: beside them, without a video.
        micro_batch: videos that pass through a network together; None is all.
    """

    prompts: int
    extra_prompts: int = 0
    micro_batch: int | None = None


@dataclass(frozen=True)
class Pass:
    """What a step runs through one network, over all videos of a data rank.

    Attributes:
        phase: of the step; its passes run one after the other.
        role: whose network.
        kind: `rollout`, few-step generation chunk by chunk with a KV cache; `velocity`, of noised chunks given the
            clean ones before them; `score`, of clean videos by a judge.
        videos: in all.
        at_once: of them, in one pass.
        gradient: a backward pass follows, and at the end the optimizer's step.
        states: noised states of each video (`velocity`).
        context_gradient: the gradient goes through the clean chunks too, which then run along in one joint pass.
        held: videos whose latents the step keeps meanwhile, in float32.
    """

    phase: str
    role: str
    kind: Literal["rollout", "velocity", "score"]
    videos: int
    at_once: int
    gradient: bool = False
    states: int = 1
    context_gradient: bool = False
    held: int = 0

    @property
    def runs(self) -> int:
        """Micro-batches."""
        return -(-self.videos // self.at_once)
