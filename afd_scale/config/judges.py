"""Sections of judges: what gives a video and its prompt one logit, how it is trained, and what it counts."""

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from afd_scale.config.models import LoraConfig, OptimizerConfig, WanConfig
from afd_scale.config.section import Section

# Qwen2-VL's own chat form, with a question of VideoAlign's kind.
VLM_TEMPLATE = """<|im_start|>system
You are a helpful assistant.<|im_end|>
<|im_start|>user
{video}This video was generated from the text prompt below. Rate its visual quality, its motion, and how well it shows \
what the prompt says.
Prompt: {prompt}
Rating: <|reward|><|im_end|>
"""
# What a model that answers in words is asked; as VQAScore has it for images (arXiv:2404.01291).
QUESTION = 'Does this video show "{prompt}", in good quality? Answer Yes or No.'
ANSWERS = ("Yes", "No")
QUESTION_TEMPLATE = f"""<|im_start|>system
You are a helpful assistant.<|im_end|>
<|im_start|>user
{{video}}{QUESTION}<|im_end|>
<|im_start|>assistant
"""

# Fields that count where a judge is trained.
ONLY_TRAINED = (
    "objective", "warmup_steps", "freeze_after", "r1_weight", "r2_weight", "penalty_deviation", "mismatch_weight",
    "augment",
)  # fmt: skip


class JudgeConfig(Section):
    """What every judge has beside its network."""

    optimizer: OptimizerConfig | None = OptimizerConfig(learning_rate=5e-6)
    """Trains it to tell the teacher's videos from rollouts; learning_rate 0 freezes it. None: it is a fixed reward, as
    its weights are, and never sees a teacher's video."""
    objective: Literal["bradley_terry", "softplus"] = "bradley_terry"
    """Prompt-paired Bradley-Terry loss, or the non-paired GAN loss."""
    warmup_steps: NonNegativeInt = 0
    """Steps before the first one that train judges only; of several judges each begins with its own."""
    freeze_after: NonNegativeInt | None = None
    """It learns in its warm-up and in so many steps, and is a fixed reward from then on; 0 is the warm-up alone. None:
    it learns in all steps."""
    r1_weight: NonNegativeFloat = 0.0
    """Weight of the finite-difference R1 penalty on the teacher's videos; 0 is off."""
    r2_weight: NonNegativeFloat = 0.0
    """The same on the rollouts."""
    penalty_deviation: PositiveFloat = 0.1
    """Standard deviation of the perturbation that R1 and R2 difference over; much smaller drowns in bf16 rounding."""
    mismatch_weight: NonNegativeFloat = 0.0
    """Weight of a second loss, that ranks a teacher's video higher under its own prompt than under another one of the
    step; 0 is off. The other prompt is one of the same data rank, which needs two."""
    weight: PositiveFloat = 1.0
    """Of its standardised score among those of several judges."""

    @model_validator(mode="after")
    def _check_fixed(self) -> "JudgeConfig":
        if self.optimizer is None and self.scores_at_random:
            raise ValueError("optimizer (null) must be given: without training it would score at random, for it has no "
                             "start weights of a score")  # fmt: skip
        for name, value in self if self.optimizer is None else ():
            if name in ONLY_TRAINED and value != type(self).model_fields[name].default:
                raise ValueError(f"{name} ({value}) must be left out of a fixed judge (optimizer: null): it is of "
                                 "training")  # fmt: skip
        if self.freeze_after == 0 and not self.warmup_steps:
            raise ValueError("freeze_after (0) must come with warmup_steps: it would never learn, as optimizer: null "
                             "says")  # fmt: skip
        return self

    def learns_at(self, step: int) -> bool:
        """Whether a step trains it; those of the warm-up end with 0."""
        if self.optimizer is None or step < 1 - self.warmup_steps:
            return False
        return self.freeze_after is None or step <= self.freeze_after

    @property
    def is_penalised(self) -> bool:
        return self.r1_weight > 0 or self.r2_weight > 0

    @property
    def rows_of_prompt(self) -> int:
        """Videos that a training pass has of a prompt besides its rollouts: the teacher's, under another prompt too."""
        return 1 + (self.mismatch_weight > 0)

    @property
    def sees_pixels(self) -> bool:
        """Whether it is given decoded videos, by which its logit has no gradient."""
        return False

    @property
    def scores_at_random(self) -> bool:
        """Whether nothing but training makes its score."""
        return False


class PixelJudgeConfig(JudgeConfig):
    """A judge that is given decoded videos."""

    augment: tuple[Literal["mirror", "brightness", "shift"], ...] = ()
    """Changes that leave physics as it is, drawn for each prompt and step and the same for all its videos. `mirror`
    swaps left and right, which is wrong where prompts name them."""

    @property
    def sees_pixels(self) -> bool:
        return True


class ConvDiscriminatorConfig(JudgeConfig):
    """Three convolutions over stacked frames with prompt FiLM: small, for the toy world."""

    name: Literal["conv"] = "conv"
    """Tag of this variant."""
    channels: PositiveInt = 64
    """Width of the convolutions."""
    identity_patch: tuple[PositiveInt, PositiveInt] = (3, 4)
    """(frames, pixels) of the identity codec's patch in the latent channels; undone before the convolutions."""

    @property
    def scores_at_random(self) -> bool:
        return True

    @model_validator(mode="before")
    @classmethod
    def _refuse_old_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and "unpack" in values:
            raise ValueError(f"unpack ({values['unpack']}) must be given as identity_patch: that codec's patch")
        return values


class LatentDiscriminatorConfig(WanConfig, JudgeConfig):
    """A bidirectional Wan trunk over clean latents, cross-attending the prompt, with a score that starts at random."""

    name: Literal["latent"] = "latent"
    """Tag of this variant."""
    features: tuple[PositiveInt, ...] = ()
    """Layers, the first is 1, whose outputs a small head reads. The trunk is then frozen, ends with the last of them,
    and no gradient of the training passes through it. Without any the trunk is trained, or adapters on it."""
    head_channels: PositiveInt = 64
    """Width of that head."""

    @model_validator(mode="after")
    def _check_features(self) -> "LatentDiscriminatorConfig":
        if self.features and max(self.features) > self.num_layers:
            raise ValueError(f"features ({max(self.features)}) must be at most num_layers ({self.num_layers})")
        if self.features and (self.weights is None or self.lora is not None):
            raise ValueError(f"features ({self.features}) must come with weights and without lora: they are read from "
                             "a frozen trunk")  # fmt: skip
        return self

    @property
    def layers_run(self) -> int:
        return max(self.features, default=self.num_layers)

    @property
    def scores_at_random(self) -> bool:
        return True  # start weights are those of a policy or a score, which give no logit


class VlmDiscriminatorConfig(PixelJudgeConfig):
    """A video-language model of transformers, Qwen2-VL or Qwen2.5-VL, that sees a video's pixels and its prompt: the
    paper's kind of discriminator (VideoAlign, arXiv:2501.13918)."""

    name: Literal["vlm"] = "vlm"
    """Tag of this variant."""
    model: str
    """Folder of the model with its tokenizer, or a hub id whose files are in the local cache: nothing is downloaded."""
    weights: Path | None = None
    """A checkpoint that goes over the model's weights: a folder of VideoAlign's kind or of PEFT's, or a .safetensors or
    .pth file with their keys. None starts from the model, with a score at random but for head `yes_no`."""
    weights_adapters: Literal["merge", "keep"] = "merge"
    """Adapters in `weights` are added to the weights under them, or trained on: then `lora` must be as theirs."""
    template: str = VLM_TEMPLATE
    """What the model reads; {video} and {prompt} stand for them. With head `yes_no` it ends where the answer begins, by
    default behind a question."""
    head: Literal["reward_token", "pooled", "yes_no"] = "reward_token"
    """What the score is a linear function of: the last hidden state at the reward tokens, added up over them, the mean
    of all tokens', or with `yes_no` the last token's. That score starts as the model's log-odds of the first answer
    against the second."""
    answers: tuple[str, str] = ANSWERS
    """Of head `yes_no`, a token each."""
    reward_tokens: tuple[str, ...] = ("<|reward|>",)
    """Tokens of the template that are rewarded; those that the tokenizer lacks are added in this order, and take free
    rows of the model's table. VideoAlign's: <|VQ_reward|>, <|MQ_reward|>, <|TA_reward|>."""
    frames_per_second: PositiveFloat = 2.0
    """That the model sees, from a video's first frame to its last."""
    min_pixels: PositiveInt = 100_352
    """A frame with fewer is enlarged, with its aspect ratio."""
    max_pixels: PositiveInt = 200_704
    """A frame with more is shrunk."""
    lora: LoraConfig | None = None
    """Train adapters on the language model's layers, and the score, instead of all weights; None trains all."""
    lora_vision: bool = False
    """Adapters on the vision tower's blocks too."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of storing its activations."""

    @model_validator(mode="before")
    @classmethod
    def _ask(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("head") == "yes_no":
            return {"template": QUESTION_TEMPLATE, **values}
        return values

    @property
    def scores_at_random(self) -> bool:
        return self.weights is None and self.head != "yes_no"

    @model_validator(mode="after")
    def _check(self) -> "VlmDiscriminatorConfig":
        for part in ("{video}", "{prompt}", *(self.reward_tokens if self.head == "reward_token" else ())):
            if self.template.count(part) != 1:
                raise ValueError(f"template ({self.template[:40]!r}...) must hold {part} once")
        if not self.reward_tokens and self.head == "reward_token":
            raise ValueError("reward_tokens () must name a token with head reward_token")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels ({self.min_pixels}) must be at most max_pixels ({self.max_pixels})")
        if self.lora_vision and self.lora is None:
            raise ValueError("lora_vision (True) must come with lora: without it all weights are trained")
        if self.lora is not None and self.optimizer is None:
            raise ValueError("lora must be left out of a fixed judge (optimizer: null): adapters in weights are merged")
        if self.weights_adapters == "keep" and (self.weights is None or self.lora is None):
            raise ValueError("weights_adapters (keep) must come with weights and lora: those adapters are trained on")
        return self


class MotionDiscriminatorConfig(PixelJudgeConfig):
    """A small network over time that sees what moves and how, and nothing else of the pixels, with the prompt."""

    name: Literal["motion"] = "motion"
    """Tag of this variant."""
    features: Literal["flow", "raft", "tracks"] = "flow"
    """What it sees of the pixels. `flow`: optical flow by OpenCV, on the CPU. `raft`: by torchvision's RAFT, where the
    pixels are. `tracks`: place, speed, acceleration, size and light of one bright thing on a darker ground, as in the
    toy world."""
    raft_weights: Path | None = None
    """torchvision's weights of raft_small or raft_large, a .safetensors or .pth file; for `raft`, and with it only."""
    grid: int = Field(default=8, ge=1, le=32)
    """Flow is averaged over grid x grid cells of the frame."""
    workers: NonNegativeInt = 0
    """Processes that compute `flow`, of each rank; 0 is the rank itself."""
    channels: PositiveInt = 64
    """Width of the convolutions."""

    @property
    def scores_at_random(self) -> bool:
        return True

    @model_validator(mode="after")
    def _check(self) -> "MotionDiscriminatorConfig":
        if (self.raft_weights is None) == (self.features == "raft"):
            rule = "be given with" if self.features == "raft" else "be absent without"
            raise ValueError(f"raft_weights ({self.raft_weights}) must {rule} features raft: they are that network's")
        if self.workers and self.features != "flow":
            raise ValueError(f"workers ({self.workers}) must be 0 with features {self.features}: they compute flow")
        return self


class HttpJudgeConfig(PixelJudgeConfig):
    """A scorer behind HTTP, which is sent videos with their prompts (docs/judges.md); it is not trained here."""

    name: Literal["http"] = "http"
    """Tag of this variant."""
    optimizer: OptimizerConfig | None = None
    """None: it is a fixed reward."""
    url: str
    """Where requests are posted to."""
    key_file: Path | None = None
    """A file with the server's key, which is sent as a bearer token and written nowhere; None sends none."""
    timeout_seconds: PositiveFloat = 120.0
    """For one request and its answer."""
    retries: int = Field(default=5, ge=0, le=1000)
    """Of a request that met no server, no answer in time, or one of 429 and 5xx; after 1, 2, 4, ... 60 seconds."""
    videos_per_request: PositiveInt = 4
    """Videos of one request, at most; a rank sends several requests at once."""

    @property
    def patience_seconds(self) -> float:
        """That one request may take in all."""
        return (self.retries + 1) * self.timeout_seconds + sum(map(backoff_seconds, range(self.retries)))

    @model_validator(mode="after")
    def _check(self) -> "HttpJudgeConfig":
        if self.optimizer is not None:
            raise ValueError("optimizer must be null: a judge behind HTTP is not trained")
        url = urlsplit(self.url)
        if "@" in self.url:
            raise ValueError(f"url (of {url.scheme}) must hold no user and no password: key_file names a file")
        try:
            usable = url.scheme in ("http", "https") and bool(url.hostname) and (url.port or 1) > 0
        except ValueError:  # a port that is none
            usable = False
        if not usable or not self.url.isascii() or not self.url.isprintable() or " " in self.url:
            raise ValueError(f"url ({self.url}) must be one such as http://scorer:8000/score")
        return self


def backoff_seconds(failures: int) -> float:
    """Before the next attempt after so many failed ones and one more."""
    return min(2.0**failures, 60.0)


DiscriminatorConfig = Annotated[
    ConvDiscriminatorConfig
    | LatentDiscriminatorConfig
    | VlmDiscriminatorConfig
    | MotionDiscriminatorConfig
    | HttpJudgeConfig,
    Field(discriminator="name"),
]
