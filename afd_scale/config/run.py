"""One run: its sections and the rules that span them."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from afd_scale.config.methods import AfdConfig, MethodConfig
from afd_scale.config.models import LatentDiscriminatorConfig, StudentConfig
from afd_scale.config.section import Section


class ProceduralSource(Section):
    """The toy world's teacher; makes the shards when they are absent."""

    name: Literal["procedural"] = "procedural"
    """Tag of this source."""
    clips: PositiveInt = 1024
    """Clips to render."""
    physics: Literal["teacher", "wrong"] = "teacher"
    """The teacher's physics, or the wrong ones that the base student is pretrained on."""
    seed: NonNegativeInt = 0
    """Of the clips' random starts."""


class DataConfig(Section):
    """Where prompts and teacher videos come from: MDS shards."""

    shards: str = "runs/toy/shards/teacher"
    """Folder or remote URL of an MDS dataset."""
    cache: Path | None = None
    """Local folder that remote shards are copied to and validated in; None is <out>/shard_cache."""
    source: ProceduralSource | None = None
    """Makes `shards` when that folder does not exist; None expects it to be there."""
    latent_frames: PositiveInt = 4
    """Latent frames of a video, F."""
    latent_height: PositiveInt = 4
    """Latent rows, H."""
    latent_width: PositiveInt = 4
    """Latent columns, W."""
    global_batch: PositiveInt = 16
    """Samples (prompt and teacher video) of one step over all ranks."""
    canonical_nodes: PositiveInt = 1
    """Fixes the sample order whatever the number of nodes; keep it when a job resumes."""


class TrainConfig(Section):
    """Length of a run and what it leaves on the way."""

    steps: PositiveInt = 100
    """Optimizer steps."""
    log_every: PositiveInt = 10
    """Steps between lines of metrics.jsonl."""
    save_every: PositiveInt | None = None
    """Steps between checkpoints; None saves at the end only."""
    keep_checkpoints: PositiveInt = 2
    """Newest complete checkpoints kept."""
    sample_every: PositiveInt | None = None
    """Steps between sample grids; None makes them at the end only."""
    resume: bool = True
    """Continue from the newest complete checkpoint of the run folder."""


class ParallelConfig(Section):
    """How ranks share the work; what is not sequence-parallel is data-parallel under ZeRO-3."""

    sequence: PositiveInt = 1
    """Ulysses degree: ranks that share one video's tokens."""


class EngineConfig(Section):
    """DeepSpeed."""

    timeout_minutes: PositiveInt = 60
    """Of a collective: loading and evaluation make some ranks wait."""
    parameter_persistence: NonNegativeInt = 0
    """Parameters with fewer elements stay whole on every rank (stage3_param_persistence_threshold)."""
    deepspeed: dict[str, Any] = {}
    """Raw DeepSpeed keys merged over the generated configuration."""


class EvaluationConfig(Section):
    """What is generated and measured when training ends."""

    metrics: Literal["toy", "none"] = "toy"
    """`toy`: trajectories measured from the toy world's pixels, and sample videos; `none`: no evaluation."""
    clips: int = Field(default=384, ge=2)
    """Clips a policy generates, spread over the prompts of the data."""
    batch: PositiveInt = 64
    """Clips generated together on one rank."""
    samples: PositiveInt = 8
    """Prompts shown in the sample grid and as mp4."""


class RunConfig(Section):
    """One training run."""

    name: str = "run"
    """Folder of the run below `out`."""
    out: Path = Path("runs")
    """Folder of all runs."""
    seed: NonNegativeInt = 0
    """Of every random stream."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of parameters and activations; optimizer states are float32."""
    requires: Path | None = None
    """Config of a run that must be complete first; run when it is not (relative to this file)."""
    method: MethodConfig
    """What one training step does."""
    student: StudentConfig = Field(default_factory=lambda: StudentConfig.model_validate({}))
    """The causal student."""
    data: DataConfig = DataConfig()
    """Prompts and teacher videos."""
    train: TrainConfig = TrainConfig()
    """Length and logging."""
    parallel: ParallelConfig = ParallelConfig()
    """Ranks."""
    engine: EngineConfig = EngineConfig()
    """DeepSpeed."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """After training."""

    @field_validator("method", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @model_validator(mode="after")
    def _cross_field_rules(self) -> "RunConfig":
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"name ({self.name}) must be letters, digits, '.', '_' and '-': it names a folder")
        student, data = self.student, self.data
        if data.latent_frames % student.chunk_frames:
            raise ValueError(f"student.chunk_frames ({student.chunk_frames}) must divide data.latent_frames "
                             f"({data.latent_frames}): a video is a whole number of chunks")  # fmt: skip
        for axis, size, patch in (("height", data.latent_height, student.patch[1]),
                                  ("width", data.latent_width, student.patch[2])):  # fmt: skip
            if size % patch:
                raise ValueError(f"data.latent_{axis} ({size}) must be a multiple of student.patch ({patch}): "
                                 "a latent is a whole number of tokens")  # fmt: skip
        if self.parallel.sequence > 1:
            raise ValueError(f"parallel.sequence ({self.parallel.sequence}) must be 1: "
                             "this version shards data and parameters only")  # fmt: skip
        zero = self.engine.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict) or zero.get("stage", 3) != 3:
            raise ValueError(f"engine.deepspeed.zero_optimization ({zero}) must be a section that leaves stage at 3: "
                             "policies are averaged and saved shard by shard")  # fmt: skip
        if isinstance(self.method, AfdConfig):
            self._check_afd(self.method)
        return self

    def _check_afd(self, method: AfdConfig) -> None:
        advantage = method.advantage
        if method.rollouts_per_prompt < 2 and "group" in (advantage.baseline, advantage.spread):
            raise ValueError(f"method.rollouts_per_prompt ({method.rollouts_per_prompt}) must be at least 2 for a "
                             "group baseline or spread: one rollout equals its group's mean; use batch")  # fmt: skip
        discriminator = method.discriminator
        if isinstance(discriminator, LatentDiscriminatorConfig):
            for field in ("latent_channels", "text_dim", "text_length", "patch"):
                ours, students = getattr(discriminator, field), getattr(self.student, field)
                if ours != students:
                    raise ValueError(f"method.discriminator.{field} ({ours}) must equal student.{field} ({students}): "
                                     "it reads the student's latents and text")  # fmt: skip
        else:
            frames, pixels = discriminator.unpack
            if self.student.latent_channels % (frames * pixels**2):
                raise ValueError(f"method.discriminator.unpack ({frames}, {pixels}) must fit student.latent_channels "
                                 f"({self.student.latent_channels}): frames x pixels^2 values are folded into each "
                                 "position")  # fmt: skip
