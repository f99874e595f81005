"""What a method says of itself as plain data: which networks take part, its cast, and what one step runs, its passes.

Builder, checkpoints, planner, benchmarks and the rules between sections loop over these two, and ask no method for its
name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from afd_scale.config.judges import DiscriminatorConfig, LatentDiscriminatorConfig, VlmDiscriminatorConfig
from afd_scale.config.models import LoraConfig, OptimizerConfig, ScoreConfig, StudentConfig, WanConfig

NetworkConfig = StudentConfig | ScoreConfig | DiscriminatorConfig


@dataclass(frozen=True)
class Role:
    """One network of a cast.

    Attributes:
        name: of the role, of its folder in a checkpoint, and of its adapter where it is one.
        section: of the config that describes its network, for errors.
        network: that section's value.
        optimizer: of a network that is trained, and no copy of another.
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

    @property
    def lora(self) -> LoraConfig | None:
        return self.network.lora if isinstance(self.network, WanConfig | VlmDiscriminatorConfig) else None

    @property
    def is_partly_trained(self) -> bool:
        """Whether its optimizer steps what start weights lack alone, and an adapter if there is one."""
        network = self.network
        reads_features = isinstance(network, LatentDiscriminatorConfig) and bool(network.features)
        return self.optimizer is not None and (reads_features or self.lora is not None)

    @property
    def adapter(self) -> str | None:
        """The adapter that counts in its passes; None is the network as it is, with which new adapters start."""
        return self.name if self.lora and (self.changes or self.lora.weights) else None


@dataclass(frozen=True)
class Load:
    """A data rank's share of one step.

    Attributes:
        prompts: each with a teacher video.
        extra_prompts: beside them, without a video.
        micro_batch: videos that pass through a network together; None is all.
        start_frames: latent frames of each video that students are given.
    """

    prompts: int
    extra_prompts: int = 0
    micro_batch: int | None = None
    start_frames: int = 0


@dataclass(frozen=True)
class Pass:
    """What a step runs through one network, over all videos of a data rank.

    Attributes:
        phase: of the step; its passes run one after the other.
        role: whose network.
        kind: `rollout`, few-step generation chunk by chunk with a KV cache; `velocity`, of noised chunks given the
            clean ones before them; `bidirectional`, of noised videos whose frames all see each other; `score`, of clean
            videos by a judge.
        videos: in all.
        at_once: of them, in one pass.
        gradient: a backward pass follows, and at the end the optimizer's step.
        of_input: with `gradient`: of what passes through alone; weights get none and take no step.
        states: noised states of each video (`velocity`).
        context_gradient: the gradient goes through the clean chunks too, which then run along in one joint pass.
        held: videos whose latents the step keeps meanwhile, in float32.
        frames: latent frames of a video that it sees or generates; None is as many as the teacher's have.
        windows: of so many frames that it sees of a video (`score`); each counts in `videos`.
        within: latent frames of the longest videos of which it sees windows of `frames`, and before each window clean
            ones as context (`velocity`); None is no longer video.
        context: of these, beside the sink; None is those that the window's first chunk sees.
        given: first latent frames of a video that are there already, clean: they are not generated (`rollout`), or not
            noised (`velocity`).
        group: videos in a row that pass through together with no others; None is all.
        every: it runs in every so many steps.
        last: step behind which it runs no more; None is never. A plan is of a step in which it runs.
        warm_up: it runs in the warm-up's steps too.
    """

    phase: str
    role: str
    kind: Literal["rollout", "velocity", "bidirectional", "score"]
    videos: int
    at_once: int
    gradient: bool = False
    of_input: bool = False
    states: int = 1
    context_gradient: bool = False
    held: int = 0
    frames: int | None = None
    windows: int = 1
    within: int | None = None
    context: int | None = None
    given: int = 0
    group: int | None = None
    every: int = 1
    last: int | None = None
    warm_up: bool = False

    @property
    def trains(self) -> bool:
        """Whether its weights get gradients."""
        return self.gradient and not self.of_input

    @property
    def runs(self) -> int:
        """Micro-batches."""
        group = self.group or self.videos
        return self.videos // group * -(-group // self.at_once) if group else 0


def check_cast(cast: Sequence[Role], passes: Sequence[Pass], exported: str) -> None:
    """What the rest takes for granted of a method from anywhere.

    Raises:
        ValueError: names the first role that does not fit.
    """
    leaders: list[str] = []
    for number, role in enumerate(cast):
        if role.name in (other.name for other in cast[:number]):
            raise ValueError(f"role ({role.name}) must stand once in the cast")
        if role.of is None:
            leaders.append(role.name)
        if role.of not in (None, *leaders) or (role.of is not None and role.optimizer is not None):
            raise ValueError(f"role ({role.name}) must copy an earlier role with a network of its own ({role.of}), and "
                             "be frozen or follow it")  # fmt: skip
    changing = [role.name for role in cast if role.changes]
    if exported not in changing:
        raise ValueError(f"exported ({exported}) must be a role that changes: {', '.join(changing)}")
    for each in passes:
        if each.role not in (role.name for role in cast):
            raise ValueError(f"pass ({each.phase}) must be of a role of the cast, not {each.role}")
