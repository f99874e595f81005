"""Sections that say which networks take part in a run."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from afd_scale.config.presets import ARCHITECTURES, FAMILIES
from afd_scale.config.section import Section


def _with_preset(values: Any, field: str, presets: dict[str, dict[str, Any]]) -> Any:
    """Put the named preset's values under the ones given explicitly."""
    if not isinstance(values, dict):
        return values
    name = values.get(field, "toy")
    if name not in presets:
        raise ValueError(f"{field} ({name}) must be one of {', '.join(presets)}")
    return {**presets[name], **values}


class WanArchitecture(Section):
    """Shape of a Wan 2.1 transformer; `architecture` names a preset, any other field overrides it."""

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

    @model_validator(mode="before")
    @classmethod
    def _fill_from_architecture(cls, values: Any) -> Any:
        return _with_preset(values, "architecture", ARCHITECTURES)

    @model_validator(mode="after")
    def _check(self) -> "WanArchitecture":
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"num_heads ({self.num_heads}) must divide dim ({self.dim}) into even widths: RoPE rotates pairs"
            )
        if self.patch[0] != 1:
            raise ValueError(f"patch ({self.patch}) must start with 1: a token may not span frames of two chunks")
        return self


class LoraConfig(Section):
    """Low-rank adapters on q, k, v, o and feed-forward of every block; the weights under them stay frozen."""

    rank: PositiveInt = 256
    """Width of the adapter's bottleneck."""
    alpha: PositiveFloat = 256.0
    """The adapter's output is scaled by alpha / rank."""


class StudentConfig(WanArchitecture):
    """The causal student: its architecture and how it generates."""

    family: Literal["toy", "self-forcing", "causal-forcing", "causal-forcing-framewise"] = "toy"
    """Preset of the generation fields below."""
    weights: Path | None = None
    """Where training starts: a run or checkpoint folder of ours, a Wan / Self-Forcing .safetensors or .pt file, or a
    diffusers folder. None starts from random weights."""
    chunk_frames: PositiveInt
    """Latent frames denoised together."""
    window_frames: PositiveInt | None = None
    """Latent frames a chunk may attend to, itself and the sink included; None is all."""
    sink_frames: int = Field(default=0, ge=0)
    """First latent frames that never leave the window."""
    timesteps: tuple[int, ...] = Field(min_length=1)
    """Denoising steps in (0, 1000], falling, before the warp."""
    timestep_shift: PositiveFloat
    """s of the warp sigma' = s sigma / (1 + (s - 1) sigma)."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing its activations."""
    lora: LoraConfig | None = None
    """Train adapters instead of the weights; None trains the weights."""

    def cached_frames(self, frames: int) -> int:
        """Latent frames that a chunk at the end of so many sees, itself included."""
        return min(frames, self.window_frames or frames)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_family(cls, values: Any) -> Any:
        return _with_preset(values, "family", FAMILIES)

    @model_validator(mode="after")
    def _check_generation(self) -> "StudentConfig":
        steps = self.timesteps
        if any(not 0 < t <= 1000 for t in steps) or list(steps) != sorted(set(steps), reverse=True):
            raise ValueError(f"timesteps ({list(steps)}) must fall strictly within (0, 1000]: they are denoising steps")
        if self.window_frames is None:
            if self.sink_frames:
                raise ValueError(
                    f"sink_frames ({self.sink_frames}) needs window_frames: nothing leaves without a window"
                )
            return self
        for name, frames in (("window_frames", self.window_frames), ("sink_frames", self.sink_frames)):
            if frames % self.chunk_frames:
                raise ValueError(f"{name} ({frames}) must be a multiple of chunk_frames ({self.chunk_frames}): "
                                 "the window moves by whole chunks")  # fmt: skip
        if self.window_frames - self.sink_frames < self.chunk_frames:
            raise ValueError(f"window_frames ({self.window_frames}) must hold the sink ({self.sink_frames}) "
                             f"and one chunk ({self.chunk_frames})")  # fmt: skip
        return self


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
    unpack: tuple[PositiveInt, PositiveInt] = (3, 4)
    """(frames, pixels) that the codec folded into the latent channels; undone before the convolutions."""


class LatentDiscriminatorConfig(WanArchitecture):
    """A bidirectional Wan trunk over clean latents, cross-attending the prompt, with a score head."""

    name: Literal["latent"] = "latent"
    """Tag of this variant."""
    weights: Path | None = None
    """Where the trunk starts, as `student.weights`; None starts from random weights. The score always does."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing its activations."""
    lora: LoraConfig | None = None
    """Train adapters and the score instead of all weights."""


DiscriminatorConfig = Annotated[ConvDiscriminatorConfig | LatentDiscriminatorConfig, Field(discriminator="name")]
