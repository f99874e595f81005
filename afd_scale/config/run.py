"""One run: its sections and the rules that span them."""

import math
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from afd_scale.config.cast import Load, Pass, Role, check_cast
from afd_scale.config.engine_rules import check_raw_keys
from afd_scale.config.frame_rules import check_frames
from afd_scale.config.judges import (
    ConvDiscriminatorConfig,
    HttpJudgeConfig,
    JudgeConfig,
    LatentDiscriminatorConfig,
)
from afd_scale.config.methods import MethodConfig, method_class
from afd_scale.config.models import ScoreConfig, StudentConfig, WanConfig
from afd_scale.config.sampler import SamplerConfig
from afd_scale.config.section import Section, Size, first_problem

Alarm = Literal["saturated", "suppressed", "hacked", "collapsed", "blurred", "static"]


WORLD_OF = {"toy": "drop", "kick": "kick"}  # the world that a suite of `evaluation.metrics` measures


class ProceduralSource(Section):
    """A toy world's teacher; makes the shards when they are absent."""

    name: Literal["procedural"] = "procedural"
    """Tag of this source."""
    world: Literal["drop", "kick"] = "drop"
    """`drop`: a ball that falls and bounces, whose clip its prompt nearly fixes, 12 frames. `kick`: one that is kicked
    once over a rough floor, where chance decides which way it goes on, 18 frames."""
    clips: PositiveInt = 1024
    """Clips to render."""
    physics: Literal["teacher", "wrong"] = "teacher"
    """The teacher's physics, or the wrong ones that the base student is pretrained on."""
    seed: NonNegativeInt = 0
    """Of the clips' random starts."""
    prompts: Literal["all", "seen", "unseen"] = "all"
    """Which of the world's prompts: `seen` leaves out a fixed quarter of the combinations, `unseen` is that quarter.
    Every word is in both."""
    begin: tuple[NonNegativeInt, NonNegativeInt] | None = None
    """Clips are cut out of longer motions: each begins with a frame drawn from these, both included, and the first is
    0. Then a judge cannot tell by how clips begin. None begins with the first."""

    @model_validator(mode="after")
    def _check(self) -> "ProceduralSource":
        if self.begin is not None and self.begin[0] > self.begin[1]:
            raise ValueError(f"begin ({list(self.begin)}) must not fall: a frame is drawn from the first to the second")
        return self


class DataConfig(Section):
    """Where prompts and teacher videos come from: MDS shards."""

    shards: str = "runs/toy/shards/teacher"
    """Folder or remote URL of an MDS dataset."""
    prompts: str | None = None
    """Folder or remote URL of an MDS dataset of prompts alone, for rollouts beside those of the teacher's prompts. The
    discriminator judges them, and learns from the teacher's prompts only."""
    prompts_per_step: NonNegativeInt = 0
    """Prompts of `prompts` in a step, over all ranks; they come on top of `global_batch`."""
    cache: Path | None = None
    """Folder on each machine that remote shards are copied to; None is <out>/shard_cache/<host name>. What local shards
    were found good is noted there too, by default in <out>/shard_cache."""
    source: ProceduralSource | None = None
    """Makes `shards` when that folder does not exist; None expects it to be there."""
    latent_frames: int = Field(default=4, gt=0, le=10_000)
    """Latent frames of a video, F."""
    start_frames: NonNegativeInt = 0
    """First latent frames of a video, whole chunks, that the student is given: the image or the clip that its teacher
    goes on from. Every rollout begins with those of its prompt's video, and nothing is learned from them."""
    latent_height: Size = 4
    """Latent rows, H."""
    latent_width: Size = 4
    """Latent columns, W."""
    global_batch: Size = 16
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
    """Steps between checkpoints; None saves at the end only, or as `save_minutes` says."""
    save_minutes: PositiveFloat | None = None
    """Minutes between checkpoints, from the start of one to that of the next, beside those of `save_every`; None is
    no such clock."""
    keep_checkpoints: PositiveInt = 2
    """Newest complete checkpoints kept."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps that are multiples of this are kept for good, too; None keeps no others."""
    most_skipped_steps: PositiveInt = 5
    """Steps in a row whose gradients are not finite, and whose updates are therefore left out, before the run goes back
    to its newest checkpoint, and on from there with the data that comes next; if that does not help, it ends."""
    sample_every: PositiveInt | None = None
    """Steps between sample videos; None makes them at the end only."""
    diagnose_every: PositiveInt | None = None
    """Steps between looks at judges and student on fixed prompts with fixed noise, at the end of the warm-up too, which
    metrics call `diagnostics/` (docs/symptoms.md); None has none. `evaluation.diagnosed_prompts` says how many."""
    stop_on_alarm: tuple[Alarm, ...] = ()
    """Alarms (docs/symptoms.md) that end the run when they are raised: it saves, and exits with code 2. While one of
    them is on, starting it again does so too; without its name here, or without the setting, it goes on."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where metrics and sample videos can be watched, beside the run's own files; wandb and trackio are extras. What
    fails in the middle of a run is dropped with a warning."""
    resume: bool = True
    """Continue from the newest complete checkpoint of the run folder."""
    micro_batch: PositiveInt | None = None
    """Videos of a rank that pass through a network together, each with its noised states; the gradients of a step add
    up over them. None takes all at once. The discriminator is trained on whole prompts, one teacher video with its
    rollouts, at least one."""


class ParallelConfig(Section):
    """How ranks share the work; what is not sequence-parallel is data-parallel under ZeRO-3."""

    sequence: Size = 1
    """Ulysses degree: ranks that share one video's tokens."""


class EngineConfig(Section):
    """DeepSpeed."""

    timeout_minutes: PositiveInt = 60
    """Of a collective: loading and evaluation make some ranks wait."""
    parameter_persistence: NonNegativeInt | None = None
    """Parameters with fewer elements stay whole on every rank (stage3_param_persistence_threshold), where all of a
    network is trained. None is 0, and from 64 ranks on 50,000, as each parameter is then gathered by itself."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where optimizer states live between steps (ZeRO-Offload)."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Where parameter shards live between uses. Not on nvme: averages are written into them after each step."""
    nvme_path: Path | None = None
    """Folder on a fast local disk for optimizer states that are offloaded to nvme."""
    deepspeed: dict[str, Any] = {}
    """Raw DeepSpeed keys merged over the generated configuration."""


class RolloutConfig(Section):
    """How frozen policies generate and predict."""

    weights: Literal["sharded", "gathered", "auto"] = "auto"
    """`sharded` gathers each block's weights in every pass, `gathered` all of them once for the rollouts of a step and
    once for the old policy's and the reference's velocities; `auto` gathers where they fit into the memory that is
    free, and logs what it chose. Where they are gathered, a policy that samples has its adapter merged: in bf16 that
    rounds, by chance, and the samples are others."""
    graphs: Literal["auto", True, False] = "auto"
    """Capture the passes of a rollout as CUDA graphs, where weights are whole and ranks share no video; `auto` does so
    on a GPU."""


class CodecConfig(Section):
    """What decodes the data's latents, for videos to look at and to judge."""

    name: Literal["identity", "wan"] = "identity"
    """As in the data's dataset.json. Where that is Wan's and nothing is said here, nothing is decoded: the run leaves
    metrics and checkpoints, no videos."""
    models: str | None = None
    """Folder or hub id of Wan's models in diffusers' layout, for its VAE."""

    @model_validator(mode="after")
    def _check(self) -> "CodecConfig":
        if (self.models is not None) != (self.name == "wan"):
            raise ValueError(f"models ({self.models}) must be given with codec wan, and with no other: they are a VAE")
        return self


class EvaluationConfig(Section):
    """What is generated, shown and measured of the student."""

    metrics: Literal["toy", "kick", "video", "none"] = "toy"
    """`toy`: trajectories measured from the toy world's pixels; `kick`: from those of the world of kicks; `video`:
    motion, flicker, sharpness, drift and jumps at chunk borders of any video (docs/evaluation.md), against the data's;
    `none`: videos are shown and not measured."""
    clips: int = Field(default=384, ge=2)
    """Clips of a policy that are generated and measured, spread over the prompts; all are in the main rank's memory."""
    lengths: int = Field(default=1, ge=1, le=256)
    """How often as long as the data's the student's clips at the end of a run are. Their start is measured beside the
    base's and the teacher's, and what comes after it by how many lengths have passed (docs/evaluation.md). The KV cache
    grows with them unless `sampler.window_frames` bounds it."""
    batch: PositiveInt = 64
    """Clips generated together on one rank."""
    samples: NonNegativeInt = 8
    """Prompts shown in the sample grid and as mp4, where there is a codec: of the base before training, of the student
    at its end and every `train.sample_every` steps, beside the teacher's videos."""
    prompts: str | None = None
    """Folder or remote URL of an MDS dataset of prompts to evaluate on, held-out ones say; None takes the data's."""
    split: str | None = None
    """Name of a split of those prompts, as their prompts file gave it; None takes all."""
    diagnosed_prompts: PositiveInt = 8
    """Prompts, with the teacher's video of each, that `train.diagnose_every` looks at: of `prompts` and `split` where
    those have videos, else of the data's own."""
    diagnosed_rollouts: int = Field(default=4, ge=2)
    """Videos of the student for each of them."""


class RunConfig(Section):
    """One training run."""

    name: str = "run"
    """Folder of the run below `out`."""
    out: Path = Path("runs")
    """Folder of all runs."""
    seed: NonNegativeInt = 0
    """Of every random stream."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Of parameters and activations; optimizer states are float32. `fp8` is bf16 with q, k, v, o and feed-forward
    products in FP8: Transformer Engine's on a GPU, emulated on a CPU."""
    fp8_scaling: Literal["current", "delayed", "row", "block", "mxfp8", "nvfp4"] = "current"
    """What shares a scale in FP8. One for a tensor: `current` from its own maximum, `delayed` from those of the steps
    before. One for each `row` of values that are summed over, for each `block` of 128 of them (of weights 128 x 128),
    or of 32 (`mxfp8`, Blackwell). `nvfp4` is no FP8 but 4 bits, a scale for each 16 values (Blackwell). On a GPU all
    but `row` are Transformer Engine's recipes; on a CPU all but `delayed` and `nvfp4` are emulated."""
    fp8_keep_blocks: NonNegativeInt = 0
    """First and last blocks, so many each, whose linears stay in bf16."""
    attention: Literal["auto", "sdpa", "flash", "flex", "fa4"] = "auto"
    """Kernels of self-attention; `auto` takes the fastest one that is there, and logs what it chose."""
    compile: Literal["auto", True, False] = "auto"
    """Compile the parts of each transformer block around its attention (torch.compile); `auto` does on a GPU."""
    requires: Path | None = None
    """Config of a run that must be complete first; run when it is not (relative to this file)."""
    method: SerializeAsAny[MethodConfig]
    """What one training step does."""
    student: StudentConfig = Field(default_factory=lambda: StudentConfig.model_validate({}))
    """The causal student."""
    sampler: SamplerConfig = SamplerConfig()
    """How it generates."""
    data: DataConfig = DataConfig()
    """Prompts and teacher videos."""
    train: TrainConfig = TrainConfig()
    """Length and logging."""
    parallel: ParallelConfig = ParallelConfig()
    """Ranks."""
    engine: EngineConfig = EngineConfig()
    """DeepSpeed."""
    rollout: RolloutConfig = RolloutConfig()
    """Of the policies that are not trained."""
    codec: CodecConfig = CodecConfig()
    """From latents to pixels."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Videos to look at, and metrics."""

    @field_validator("method", mode="before")
    @classmethod
    def _find_method(cls, value: Any) -> Any:
        if not isinstance(value, str | dict):
            return value
        values = {"name": value} if isinstance(value, str) else value
        section = method_class(values)
        try:
            return section.model_validate(values)
        except ValidationError as error:
            raise ValueError(first_problem(error)) from error

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def cast(self) -> tuple[Role, ...]:
        """The networks of the method."""
        return self.method.cast(self.student)

    def role(self, name: str) -> Role:
        """One of them."""
        return {role.name: role for role in self.cast}[name]

    @model_validator(mode="after")
    def _cross_field_rules(self) -> "RunConfig":
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"name ({self.name}) must be letters, digits, '.', '_' and '-': it names a folder")
        student, data, passes = self.student, self.data, self._passes()
        check_cast(self.cast, passes, self.method.exported)
        check_frames(passes, self.sampler, data.latent_frames, data.start_frames, self.evaluation.lengths)
        for axis, size, patch in (("height", data.latent_height, student.patch[1]),
                                  ("width", data.latent_width, student.patch[2])):  # fmt: skip
            if size % patch:
                raise ValueError(f"data.latent_{axis} ({size}) must be a multiple of student.patch ({patch}): "
                                 "a latent is a whole number of tokens")  # fmt: skip
        if bool(data.prompts) != bool(data.prompts_per_step):
            raise ValueError(f"data.prompts_per_step ({data.prompts_per_step}) must be positive with data.prompts and "
                             f"0 without: data.prompts is {data.prompts}")  # fmt: skip
        if data.start_frames and passes == self._passes(start_frames=0):
            raise ValueError(f"data.start_frames ({data.start_frames}) must be 0 with method {self.method.name}: its "
                             "student is given none")  # fmt: skip
        if data.start_frames and data.prompts:
            raise ValueError(f"data.prompts ({data.prompts}) must be absent with data.start_frames "
                             f"({data.start_frames}): a start is that of the prompt's video")  # fmt: skip
        if data.prompts and passes == self._passes(extra_prompts=1):
            raise ValueError(f"data.prompts ({data.prompts}) must be absent with method {self.method.name}: it learns "
                             "from prompts with a video alone")  # fmt: skip
        if self.evaluation.metrics == "none" and not self.evaluation.samples:
            for name in ("prompts", "split"):
                value = getattr(self.evaluation, name)
                if value is not None:
                    raise ValueError(f"evaluation.{name} ({value}) must be absent where nothing is measured or shown")
        if self.evaluation.metrics == "none" and self.evaluation.lengths > 1:
            raise ValueError(f"evaluation.lengths ({self.evaluation.lengths}) must be 1 where nothing is measured")
        world = WORLD_OF.get(self.evaluation.metrics)
        if data.source is not None and self.evaluation.prompts is None and world not in (None, data.source.world):
            raise ValueError(f"evaluation.metrics ({self.evaluation.metrics}) must be of data.source.world "
                             f"({data.source.world}): it reads the prompts of {world} alone")  # fmt: skip
        self._check_alarms()
        self._check_graphs()
        check_raw_keys(self.engine.deepspeed)
        for role in self.cast:
            if role.of is None:
                self._check_network(role)
        if self.engine.offload_optimizer == "nvme":
            self._check_nvme()
        return self

    def _passes(self, **load: int) -> tuple[Pass, ...]:
        return self.method.passes(Load(**{"prompts": 1, "start_frames": self.data.start_frames} | load))

    def _check_graphs(self) -> None:
        for field, value, forbids in (
            ("parallel.sequence", self.parallel.sequence, self.parallel.sequence > 1),
            ("precision", self.precision, self.precision == "fp8"),
            ("rollout.weights", self.rollout.weights, self.rollout.weights == "sharded"),
        ):
            if self.rollout.graphs is True and forbids:
                raise ValueError(f"rollout.graphs (true) must be auto or false with {field} {value}: graphs are of "
                                 "passes on whole weights that exchange nothing")  # fmt: skip

    def _check_alarms(self) -> None:
        """An alarm that nothing can raise stops no run."""
        looks = self.train.diagnose_every is not None and self.evaluation.metrics != "none"
        learns = any(isinstance(role.network, JudgeConfig) and role.optimizer for role in self.cast)
        for name in self.train.stop_on_alarm:
            if name in ("hacked", "blurred", "static") and not looks:
                raise ValueError(f"train.stop_on_alarm ({name}) must come with train.diagnose_every and "
                                 "evaluation.metrics: it goes by what they measure")  # fmt: skip
            if name in ("saturated", "suppressed") and not learns:
                raise ValueError(f"train.stop_on_alarm ({name}) must come with a judge that is trained")

    def _check_nvme(self) -> None:
        if not self.engine.nvme_path:
            raise ValueError("engine.nvme_path (None) must be given: optimizer states go to nvme")
        if any(role.follows for role in self.cast):
            raise ValueError("engine.offload_optimizer (nvme) must be none or cpu where a policy follows the student: "
                             "DeepSpeed reads up to 12 GB back for each weight that is looked at")  # fmt: skip

    def sequence_degrees(self) -> list[int]:
        """Ulysses degrees that share the heads of every network evenly."""
        heads = math.gcd(*(role.network.num_heads for role in self.cast if isinstance(role.network, WanConfig)))
        return [degree for degree in range(1, heads + 1) if heads % degree == 0]

    def _check_network(self, role: Role) -> None:
        network, student = role.network, self.student
        if isinstance(network, WanConfig):
            self._check_transformer(role.section, network)
        if isinstance(network, LatentDiscriminatorConfig | ScoreConfig):
            for field in ("latent_channels", "text_dim", "text_length", "patch"):
                ours, students = getattr(network, field), getattr(student, field)
                if ours != students:
                    raise ValueError(f"{role.section}.{field} ({ours}) must equal student.{field} ({students}): it "
                                     "reads the student's latents and text")  # fmt: skip
        elif isinstance(network, ConvDiscriminatorConfig):
            frames, pixels = network.identity_patch
            if student.latent_channels % (frames * pixels**2):
                raise ValueError(f"{role.section}.identity_patch ({frames}, {pixels}) must fit student.latent_channels "
                                 f"({student.latent_channels}): frames x pixels^2 values are folded into each position"
                                 )  # fmt: skip
        elif isinstance(network, HttpJudgeConfig) and network.patience_seconds >= 60 * self.engine.timeout_minutes:
            raise ValueError(f"engine.timeout_minutes ({self.engine.timeout_minutes}) must be more than the "
                             f"{network.patience_seconds / 60:.1f} that {role.section}.timeout_seconds and retries may "
                             "take: the other ranks wait meanwhile")  # fmt: skip

    def _check_transformer(self, name: str, network: WanConfig) -> None:
        sequence = self.parallel.sequence
        if network.num_heads % sequence:
            valid = ", ".join(str(degree) for degree in self.sequence_degrees())
            raise ValueError(f"parallel.sequence ({sequence}) must divide {name}.num_heads ({network.num_heads}): each "
                             f"rank of a sequence attends with equally many heads; it may be {valid}")  # fmt: skip
        if network.activation_checkpointing == "keep_attention":
            for field, value in (("attention", self.attention), ("fp8_scaling", self.fp8_scaling)):
                if value in ("flex", "fa4", "delayed"):
                    raise ValueError(f"{name}.activation_checkpointing (keep_attention) must be full or none with "
                                     f"{field} {value}, whose attention cannot be kept")  # fmt: skip
        if self.precision != "fp8":
            return
        multiple = 32 if self.fp8_scaling in ("mxfp8", "nvfp4") else 16
        for field in ("dim", "ffn_dim"):
            if getattr(network, field) % multiple:
                raise ValueError(f"{name}.{field} ({getattr(network, field)}) must be a multiple of {multiple} with "
                                 f"fp8_scaling {self.fp8_scaling}: the tensor cores take such rows")  # fmt: skip
        if 2 * self.fp8_keep_blocks >= network.num_layers:
            raise ValueError(f"fp8_keep_blocks ({self.fp8_keep_blocks}) must be less than half of {name}.num_layers "
                             f"({network.num_layers}): else nothing of it is in FP8, take precision bf16")  # fmt: skip
        if network.activation_checkpointing == "none":
            raise ValueError(f"{name}.activation_checkpointing (none) must be full or keep_attention with precision "
                             "fp8: quantised weights would stay whole on every rank until the backward pass"
                             )  # fmt: skip
