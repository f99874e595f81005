"""Sections that say which networks take part in a run."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from afd_scale.config.presets import ARCHITECTURES, with_preset
from afd_scale.config.sampler import SamplerConfig
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


class LoraConfig(Section):
    """Low-rank adapters on q, k, v, o and feed-forward of every block; the weights under them stay frozen."""

    rank: PositiveInt = 256
    """Width of the adapter's bottleneck."""
    alpha: PositiveFloat = 256.0
    """The adapter's output is scaled by alpha / rank."""
    weights: Path | None = None
    """Where the adapters start: a LoRA run or checkpoint folder of ours, or a LoRA file or folder of peft, diffusers,
    ComfyUI, kohya or LongLive. Its rank must be the one above; its alpha is brought to it. None starts as the base."""


class WanConfig(Section):
    """A Wan 2.1 transformer: its shape, where it starts, how it is trained. `architecture` names a preset of shapes,
    and any field beside it overrides that."""

    architecture: Literal["toy", "wan-1.3b", "wan-14b"] = "toy"
    """Preset of the sizes below."""
    dim: PositiveInt
    """Width of the token stream."""
    ffn_dim: PositiveInt
    """Hidden width of the feed-forward."""
    num_heads: PositiveInt
    """Attention heads; dim / num_heads is the head width."""
    num_layers: PositiveInt
    """Transformer blocks."""
    freq_dim: PositiveInt
    """Width of the sinusoidal timestep embedding."""
    text_dim: PositiveInt
    """Width of a text embedding row (4096 for UMT5-XXL)."""
    text_length: PositiveInt
    """Rows the text is padded to, with zeros, before the text MLP; all are attended."""
    latent_channels: PositiveInt
    """Channels of the latents going in and out."""
    patch: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 2, 2)
    """Latent (frames, height, width) of one token."""
    eps: PositiveFloat = 1e-6
    """Epsilon of the norms."""
    prediction: Literal["velocity", "x0"]
    """What the head predicts; the model's interface returns a velocity either way."""

    weights: Path | None = None
    """Where it starts: a run or checkpoint folder of ours, a Wan / Self-Forcing .safetensors or .pt file, or a
    diffusers folder. None starts from random weights."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing its activations."""
    lora: LoraConfig | None = None
    """Train adapters, and what the start weights lack, instead of all weights; None trains all."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_architecture(cls, values: Any) -> Any:
        return with_preset(values, "architecture", ARCHITECTURES)

    @model_validator(mode="after")
    def _check(self) -> "WanConfig":
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"num_heads ({self.num_heads}) must divide dim ({self.dim}) into even widths: RoPE rotates pairs"
            )
        if self.patch[0] != 1:
            raise ValueError(f"patch ({self.patch}) must start with 1: a token may not span frames of two chunks")
        if self.lora and self.lora.weights and not self.weights:
            raise ValueError(f"lora.weights ({self.lora.weights}) must come with weights: adapters are of one base")
        return self


class StudentConfig(WanConfig):
    """The causal student. How it generates is the section `sampler`."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_old_names(cls, values: Any) -> Any:
        for name in SamplerConfig.model_fields if isinstance(values, dict) else ():
            if name in values:
                raise ValueError(f"{name} ({values[name]}) must be given as sampler.{name}: how a student generates is "
                                 "a section of its own")  # fmt: skip
        return values


class PolicyConfig(Section):
    """What a folder of a student's weights says of them: the network, and how it generates."""

    student: StudentConfig
    """The network."""
    sampler: SamplerConfig = SamplerConfig()
    """How it generates."""

    @model_validator(mode="before")
    @classmethod
    def _split(cls, values: Any) -> Any:
        """Older files have one section for both."""
        if not isinstance(values, dict) or "student" in values:
            return values
        sampler = {name: values[name] for name in SamplerConfig.model_fields if name in values}
        return {"student": {name: value for name, value in values.items() if name not in sampler}, "sampler": sampler}


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW with a clipped gradient and a warmed-up schedule."""

    learning_rate: float = Field(ge=0)
    """Peak learning rate; 0 freezes the network."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment: gradients far below it do not move a weight by a full step."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decoupled weight decay."""
    gradient_norm: float = Field(default=1.0, ge=0)
    """The gradient's global norm is clipped to this; 0 does not clip."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a half cosine down towards zero at the end of train.steps."""


class ConvDiscriminatorConfig(Section):
    """Three convolutions over stacked frames with prompt FiLM: small, for the toy world."""

    name: Literal["conv"] = "conv"
    """Tag of this variant."""
    channels: PositiveInt = 64
    """Width of the convolutions."""
    identity_patch: tuple[PositiveInt, PositiveInt] = (3, 4)
    """(frames, pixels) of the identity codec's patch in the latent channels; undone before the convolutions."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_old_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and "unpack" in values:
            raise ValueError(f"unpack ({values['unpack']}) must be given as identity_patch: that codec's patch")
        return values


class LatentDiscriminatorConfig(WanConfig):
    """A bidirectional Wan trunk over clean latents, cross-attending the prompt, with a score that starts at random."""

    name: Literal["latent"] = "latent"
    """Tag of this variant."""


class ScoreConfig(WanConfig):
    """A velocity model of some kind of videos at any noise level."""

    causal: bool = False
    """Each chunk is given the clean ones before it, as in the student; otherwise all frames see each other."""


class VlmDiscriminatorConfig(Section):
    """A video-language model of transformers, Qwen2-VL or Qwen2.5-VL, that sees a video's pixels and its prompt: the
    paper's kind of discriminator (VideoAlign, arXiv:2501.13918)."""

    name: Literal["vlm"] = "vlm"
    """Tag of this variant."""
    model: str
    """Folder of the model with its tokenizer, or a hub id whose files are in the local cache: nothing is downloaded."""
    weights: Path | None = None
    """A checkpoint that goes over the model's weights: a folder of VideoAlign's kind or of PEFT's, or a .safetensors or
    .pth file with their keys. None starts from the model, with a score at random."""
    weights_adapters: Literal["merge", "keep"] = "merge"
    """Adapters in `weights` are added to the weights under them, or trained on: then `lora` must be as theirs."""
    template: str = VLM_TEMPLATE
    """What the model reads; {video} and {prompt} stand for them."""
    head: Literal["reward_token", "pooled"] = "reward_token"
    """What the score is a linear function of: the last hidden state at the reward tokens, added up over them, or the
    mean of all tokens'."""
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
        if self.weights_adapters == "keep" and (self.weights is None or self.lora is None):
            raise ValueError("weights_adapters (keep) must come with weights and lora: those adapters are trained on")
        return self


DiscriminatorConfig = Annotated[
    ConvDiscriminatorConfig | LatentDiscriminatorConfig | VlmDiscriminatorConfig, Field(discriminator="name")
]
NetworkConfig = (
    StudentConfig | ScoreConfig | ConvDiscriminatorConfig | LatentDiscriminatorConfig | VlmDiscriminatorConfig
)
