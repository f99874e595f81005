"""From a section of the config to its network: the only place that names both."""

from afd_scale.config import ConfigError, RunConfig
from afd_scale.config.cast import Load, NetworkConfig, Role
from afd_scale.config.judges import (
    ConvDiscriminatorConfig,
    HttpJudgeConfig,
    LatentDiscriminatorConfig,
    MotionDiscriminatorConfig,
    VlmDiscriminatorConfig,
)
from afd_scale.config.models import ScoreConfig
from afd_scale.layers.lora import Adapters, adapter_of
from afd_scale.layers.network import Network
from afd_scale.layers.ops import ModelOps
from afd_scale.models.discriminators import ConvDiscriminator, LatentDiscriminator
from afd_scale.models.http_judge import HttpJudge, read_key
from afd_scale.models.motion import MotionDiscriminator
from afd_scale.models.vlm import VlmDiscriminator
from afd_scale.models.wan import CausalWan


def build_network(run: RunConfig, network: NetworkConfig, ops: ModelOps) -> Network:
    """A network of a run's cast, for the run's videos and texts."""
    data, student = run.data, run.student
    if isinstance(network, ConvDiscriminatorConfig):
        size = (data.latent_height, data.latent_width)
        seen = {each.frames for each in run.method.passes(Load(prompts=1)) if each.kind == "score"}
        frames = max(frames or data.latent_frames for frames in seen)
        return ConvDiscriminator(network, frames, student.latent_channels, size, student.text_dim)
    if isinstance(network, LatentDiscriminatorConfig):
        return LatentDiscriminator(network, ops)
    if isinstance(network, VlmDiscriminatorConfig):
        return VlmDiscriminator(network, ops)
    if isinstance(network, MotionDiscriminatorConfig):
        return MotionDiscriminator(network, student.text_dim)
    if isinstance(network, HttpJudgeConfig):
        return HttpJudge(network)
    if isinstance(network, ScoreConfig) and not network.causal:
        return CausalWan(network, run.sampler.model_copy(update={
            "chunk_frames": data.latent_frames, "first_chunk_frames": None, "window_frames": None, "sink_frames": 0,
        }), ops)  # fmt: skip
    return CausalWan(network, run.sampler, ops)


def check_files(run: RunConfig) -> None:
    """Look for the files that a judge reads on every rank by itself.

    Raises:
        ConfigError: one is absent, or cannot be read.
    """
    for role in run.cast:
        network = role.network
        if isinstance(network, HttpJudgeConfig):
            read_key(network)
        raft = network.raft_weights if isinstance(network, MotionDiscriminatorConfig) else None
        if raft is not None and not raft.is_file():
            raise ConfigError(f"{role.section}.raft_weights ({raft}) must be a file of torchvision's weights for "
                              "raft_small or raft_large")  # fmt: skip


def adapters_of(run: RunConfig, leader: Role) -> Adapters | None:
    """Those of a role's network: its own and those of its copies that have one; None where it has none."""
    if leader.lora is None or leader.adapter is None:
        return None
    names = (leader.name, *(role.name for role in run.cast if role.of == leader.name and role.adapter))
    return Adapters(names, leader.lora.rank, leader.lora.alpha / leader.lora.rank)


def train_part(network: Network, adapter: str | None) -> None:
    """Freeze all but one adapter, if there is one, and what no start weights have."""
    for name, parameter in network.named_parameters():
        is_adapter = adapter is not None and adapter_of(name) == adapter
        parameter.requires_grad_(is_adapter or network.starts_anew(name))
