"""Networks as a run has them, built from its config in one process."""

from collections.abc import Mapping
from types import MappingProxyType

import torch

from afd_scale.config import RunConfig
from afd_scale.layers.network import Network
from afd_scale.layers.ops import ModelOps
from afd_scale.models.build import adapters_of, build_network, train_part
from tests.networks import make_videos

# Small, but large enough that no bias or norm decides: shapes that differ in every proportion.
SHAPES = {
    "narrow": {"student": {"dim": 128, "ffn_dim": 512, "num_heads": 4, "num_layers": 4}, "frames": 4, "size": (24, 24)},
    "deep": {"student": {"dim": 96, "ffn_dim": 384, "num_heads": 4, "num_layers": 14}, "frames": 3, "size": (24, 24)},
    "wide": {"student": {"dim": 192, "ffn_dim": 576, "num_heads": 6, "num_layers": 3}, "frames": 3, "size": (24, 32)},
}

# Chunks of the narrow shape's four frames.
FIRST_OF_ONE, FIRST_OF_THREE = {"chunk_frames": 3, "first_chunk_frames": 1}, {"first_chunk_frames": 3}


def make_config(
    shape: str, *, lora: bool = False, checkpointing: bool = False, text_length: int = 16, window: int | None = None,
    start: int = 0, sampler: Mapping[str, int] = MappingProxyType({}), **method: object,
):  # fmt: skip
    sizes = SHAPES[shape]
    network = {
        **sizes["student"], "freq_dim": 32, "text_dim": 32, "text_length": text_length, "latent_channels": 4,
        "prediction": "velocity", "activation_checkpointing": checkpointing, "lora": {"rank": 8} if lora else None,
    }  # fmt: skip
    height, width = sizes["size"]
    return RunConfig.model_validate(
        {
            "student": network,
            "sampler": {"family": "self-forcing", "chunk_frames": 1, "window_frames": window, **sampler},
            "data": {"latent_frames": sizes["frames"], "latent_height": height, "latent_width": width,
                     "start_frames": start, "global_batch": 1},
            "method": {"name": "afd", "rollouts_per_prompt": 2, "discriminator": {"name": "latent", **network},
                       **method},
        }
    )  # fmt: skip


def build(config: RunConfig, role: str) -> Network:
    """A role's network with what it trains, on the current device."""
    adapters = adapters_of(config, config.role(role))
    network = build_network(config, config.role(role).network, ModelOps(adapters=adapters))
    if adapters is not None:
        train_part(network, role)
    return network


def adapter(config: RunConfig, role: str = "student") -> str | None:
    return None if config.student.lora is None else role


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


def judged(inputs: dict[str, torch.Tensor]):
    """The same videos as a judge takes them."""
    return make_videos(inputs["clean"], inputs["text"])
