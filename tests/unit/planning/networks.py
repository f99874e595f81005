"""Networks as a run has them, built from its config in one process."""

import torch

from afd_scale.config import RunConfig
from afd_scale.config.models import LoraConfig
from afd_scale.layers.lora import Adapters, adapter_of
from afd_scale.layers.ops import ModelOps
from afd_scale.models.discriminators import ConvDiscriminator, LatentDiscriminator
from afd_scale.models.wan import CausalWan

# Small, but large enough that no bias or norm decides: shapes that differ in every proportion.
SHAPES = {
    "narrow": {"student": {"dim": 128, "ffn_dim": 512, "num_heads": 4, "num_layers": 4}, "frames": 4, "size": (24, 24)},
    "deep": {"student": {"dim": 96, "ffn_dim": 384, "num_heads": 4, "num_layers": 14}, "frames": 3, "size": (24, 24)},
    "wide": {"student": {"dim": 192, "ffn_dim": 576, "num_heads": 6, "num_layers": 3}, "frames": 3, "size": (24, 32)},
}


def make_config(shape: str, *, lora: bool = False, checkpointing: bool = False, states: int = 1, text_length: int = 16):
    sizes = SHAPES[shape]
    network = {
        **sizes["student"], "freq_dim": 32, "text_dim": 32, "text_length": text_length, "latent_channels": 4,
        "prediction": "velocity", "activation_checkpointing": checkpointing, "lora": {"rank": 8} if lora else None,
    }  # fmt: skip
    height, width = sizes["size"]
    return RunConfig.model_validate(
        {
            "student": {**network, "family": "self-forcing", "chunk_frames": 1},
            "data": {"latent_frames": sizes["frames"], "latent_height": height, "latent_width": width,
                     "global_batch": 1},
            "method": {"name": "afd", "states_per_rollout": states, "rollouts_per_prompt": 2,
                       "discriminator": {"name": "latent", **network}},
        }
    )  # fmt: skip


def ops_for(lora: LoraConfig | None, *names: str) -> ModelOps:
    return ModelOps(adapters=None if lora is None else Adapters(names, lora.rank, lora.alpha / lora.rank))


def build_student(config: RunConfig) -> CausalWan:
    network = CausalWan(config.student, ops_for(config.student.lora, "student", "old_policy"))
    if config.student.lora is not None:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(adapter_of(name) == "student")
    return network


def build_discriminator(config: RunConfig) -> LatentDiscriminator | ConvDiscriminator:
    discriminator, data, student = config.method.discriminator, config.data, config.student
    if discriminator.name == "conv":
        size = (data.latent_height, data.latent_width)
        return ConvDiscriminator(discriminator, data.latent_frames, student.latent_channels, size, student.text_dim)
    network = LatentDiscriminator(discriminator, ops_for(discriminator.lora, "discriminator"))
    if discriminator.lora is not None:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(adapter_of(name) is not None or name == "score.weight")
    return network


def adapter(config: RunConfig) -> str | None:
    return None if config.student.lora is None else "student"


def draw(config: RunConfig, videos: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of the teacher-forcing pass; `clean` are the videos."""
    data, student = config.data, config.student
    shape = (data.latent_frames, student.latent_channels, data.latent_height, data.latent_width)
    states = config.method.states_per_rollout
    return {
        "noisy": torch.randn(videos * states, *shape),
        "timestep": torch.full((videos * states, data.latent_frames), 500.0),
        "text": torch.randn(videos, student.text_length, student.text_dim),
        "clean": torch.randn(videos, *shape),
    }
