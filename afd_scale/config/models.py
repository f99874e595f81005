"""Sections that say which networks take part in a run."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from afd_scale.config.presets import ARCHITECTURES, with_preset
from afd_scale.config.sampler import SamplerConfig
from afd_scale.config.section import Section, Size


def _of_bool(value: Any) -> Any:
    return ("full" if value else "none") if isinstance(value, bool) else value


Recomputation = Annotated[Literal["full", "keep_attention", "none"], BeforeValidator(_of_bool)]


class LoraConfig(Section):
    """Low-rank adapters on q, k, v, o and feed-forward of every block; the weights under them stay frozen."""

    rank: Size = 256
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
    dim: Size
    """Width of the token stream."""
    ffn_dim: Size
    """Hidden width of the feed-forward."""
    num_heads: Size
    """Attention heads; dim / num_heads is the head width."""
    num_layers: int = Field(gt=0, le=1000)
    """Transformer blocks."""
    freq_dim: Size
    """Width of the sinusoidal timestep embedding."""
    text_dim: Size
    """Width of a text embedding row (4096 for UMT5-XXL)."""
    text_length: Size
    """Rows the text is padded to, with zeros, before the text MLP; all are attended."""
    latent_channels: Size
    """Channels of the latents going in and out."""
    patch: tuple[Size, Size, Size] = (1, 2, 2)
    """Latent (frames, height, width) of one token."""
    eps: PositiveFloat = 1e-6
    """Epsilon of the norms."""
    prediction: Literal["velocity", "x0"]
    """What the head predicts; the model's interface returns a velocity either way."""

    weights: Path | None = None
    """Where it starts: a run or checkpoint folder of ours, a Wan / Self-Forcing .safetensors or .pt file, or a
    diffusers folder. None starts from random weights."""
    activation_checkpointing: Recomputation = "none"
    """What of each block is recomputed in the backward pass instead of stored: `full` all of it, `keep_attention` all
    but its attention, whose outputs are kept; `none` nothing. True is `full`, false `none`."""
    lora: LoraConfig | None = None
    """Train adapters, and what the start weights lack, instead of all weights; None trains all."""

    @property
    def layers_run(self) -> int:
        """Blocks that there are."""
        return self.num_layers

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


class ScoreConfig(WanConfig):
    """A velocity model of some kind of videos at any noise level."""

    causal: bool = False
    """Each chunk is given the clean ones before it, as in the student; otherwise all frames see each other."""
