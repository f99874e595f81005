"""Bytes on one rank: what ZeRO-3 shards all the time, and the peak of each phase on top of it.

DeepSpeed 0.19 in bf16, bytes a parameter of a trained network: bf16 shard 2, float32 master 4, Adam 8, gradient
partition 2 (4 where micro-batches are accumulated; the optimizer's step makes a float32 copy, one sub-group at a time).
In float32 the master is a second copy of the shard. Each trained engine also holds a bucket for gradients on their way.
"""

from dataclasses import dataclass
from typing import Any

from afd_scale.config import RunConfig
from afd_scale.config.methods import AfdConfig
from afd_scale.config.models import LatentDiscriminatorConfig
from afd_scale.planning.activations import (
    FLOAT32,
    Tokens,
    Trunk,
    forward_working,
    key_value_bytes,
    saved_outside_blocks,
    training_activations,
)  # fmt: skip
from afd_scale.planning.parameters import NetworkSize, discriminator_size, student_size
from afd_scale.planning.workload import Workload

MASTER, ADAM = 4, 8  # bytes a trained parameter
# Defaults of DeepSpeed 0.19 that hold memory, in elements; engine.deepspeed.zero_optimization overrides them.
ZERO_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "sub_group_size": 1_000_000_000,
}
LATENTS_AT_ONCE = 8  # tensors of a video's size in the student's loss, float32: states, velocities, their differences


@dataclass(frozen=True)
class Phase:
    """What a phase holds besides the shards, by name, and its peak with them.

    Attributes:
        parts: that are there together.
        step: instead of them, while the optimizer steps.
        peak: bytes, shards included.
    """

    parts: dict[str, int]
    step: int
    peak: int


@dataclass(frozen=True)
class Memory:
    """One rank's memory in bytes.

    Attributes:
        shards: what is there all the time.
        host: what is offloaded, on the CPU or on NVMe.
        phases: rollout, discriminator, velocities (of old policy and reference) and student, or student alone.
        gathered_rollout: policies hold all weights while they generate and predict.
    """

    shards: dict[str, int]
    host: dict[str, int]
    phases: dict[str, Phase]
    gathered_rollout: bool

    @property
    def peak(self) -> int:
        return max(phase.peak for phase in self.phases.values())


def rank_memory(config: RunConfig, load: Workload, usable_bytes: int) -> Memory:
    """Memory of one rank.

    Args:
        usable_bytes: of a GPU; rollout.weights auto gathers where all weights fit into it.
    """
    shards, host = _shards(config, load.gpus)
    static = sum(shards.values())
    gathered, phases = False, {}
    if isinstance(config.method, AfdConfig):
        sharded, whole = (_rollout(config, load, static, gathered) for gathered in (False, True))
        residency = config.rollout.weights
        velocities = {gather: _velocities(config, load, static, gather) for gather in (False, True)}
        fits = max(whole.peak, velocities[True].peak) <= usable_bytes
        gathered = residency == "gathered" or (residency == "auto" and fits)
        phases = {"rollout": whole if gathered else sharded, "discriminator": _discriminator(config, load, static)}
        phases["velocities"] = velocities[gathered]
    phases["student"] = _student(config, load, static)
    return Memory(shards, host, phases, gathered)


def itemsize(config: RunConfig) -> int:
    """Bytes of a parameter, a gradient and an activation."""
    return 4 if config.precision == "fp32" else 2


def student_trunk(config: RunConfig, load: Workload) -> Trunk:
    student = config.student
    rank = None if student.lora is None else student.lora.rank
    return Trunk(student, itemsize(config), student.activation_checkpointing, rank, load.sequence)


def _shards(config: RunConfig, gpus: int) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes on the device and on the host that are there all the time."""
    size = itemsize(config)
    shards: dict[str, int] = {}
    host: dict[str, int] = {}
    optimizer = host if config.engine.offload_optimizer != "none" else shards
    parameters = host if config.engine.offload_parameters != "none" else shards

    def add(where: dict[str, int], name: str, elements: int, bytes_each: int) -> None:
        where[name] = where.get(name, 0) + -(-elements // gpus) * bytes_each

    def trained(name: str, network: NetworkSize) -> None:
        add(parameters, f"{name} parameters", network.total, size)
        add(optimizer, f"{name} optimizer", network.trained, MASTER + ADAM)
        accumulated = FLOAT32 if config.train.micro_batch is not None else size  # as parallel/deepspeed_config.py sets
        add(optimizer, f"{name} gradients", network.trained, accumulated)
        shards[f"{name} reduce bucket"] = _zero(config, "reduce_bucket_size") * size

    student, discriminator = student_size(config), discriminator_size(config)
    trained("student", student)
    followed = isinstance(config.method, AfdConfig) or config.method.ema_decay > 0
    averaged = student.adapter or student.base
    if followed and not student.adapter:
        add(parameters, "old policy parameters", student.base, size)
    if followed and size < FLOAT32:
        add(shards, "old policy float32 average", averaged, FLOAT32)
    if discriminator is not None:
        if not student.adapter and isinstance(config.method, AfdConfig) and config.method.prior_weight:
            add(parameters, "reference parameters", student.base, size)
        trained("discriminator", discriminator)
    return shards, host


def _rollout(config: RunConfig, load: Workload, static: int, gathered: bool) -> Phase:
    student, size, trunk = config.student, student_size(config), student_trunk(config, load)
    chunk = load.chunk_frames * load.local_tokens_per_frame * load.together
    tokens = Tokens(chunk, 0, load.chunk_frames * load.together, load.together)
    cached = student.cached_frames(load.frames) * load.local_tokens_per_frame * load.together
    weights = size.total * itemsize(config) if gathered else _gathered(config, size)
    parts = {
        "gathered weights": weights,
        "KV cache": key_value_bytes(trunk, cached),
        "activations": forward_working(trunk, tokens) + saved_outside_blocks(trunk, tokens),
        # Of all videos, which the phases after it read; noise and re-noise of those that are generated together.
        "latents": (load.videos + load.together * (1 + len(student.timesteps))) * _video_bytes(config),
    }
    return Phase(parts, 0, static + sum(parts.values()))


def _discriminator(config: RunConfig, load: Workload, static: int) -> Phase:
    assert isinstance(config.method, AfdConfig)
    network, size = config.method.discriminator, discriminator_size(config)
    assert size is not None
    videos = load.prompts_together * (1 + load.rollouts_per_prompt)
    if config.method.r1_weight or config.method.r2_weight:
        videos *= 2
    activations = 0  # of convolutions: too small to matter
    if isinstance(network, LatentDiscriminatorConfig):
        rank = None if network.lora is None else network.lora.rank
        trunk = Trunk(network, itemsize(config), network.activation_checkpointing, rank, load.sequence)
        activations = training_activations(trunk, Tokens(videos * load.video_tokens, 0, videos * load.frames, videos))
    parts = {
        **_backward_buffers(config, size),
        "activations": activations,
        "latents": (load.videos + load.prompts + videos) * _video_bytes(config),
    }
    return _phase(config, load, parts, size, static)


def _velocities(config: RunConfig, load: Workload, static: int, gathered: bool) -> Phase:
    """Old policy and reference on the noised states, without gradient."""
    assert isinstance(config.method, AfdConfig)
    size, trunk, videos = student_size(config), student_trunk(config, load), load.together
    states = config.method.states_per_rollout
    context = videos * load.video_tokens
    parts = {
        "gathered weights": size.total * itemsize(config) if gathered else _gathered(config, size),
        "clean past": key_value_bytes(trunk, context),
        "activations": forward_working(trunk, Tokens(states * context, context, states * videos * load.frames, videos)),
        # Of all videos: themselves, and their states' noisy latents and two velocities.
        "latents": load.videos * (1 + 3 * states) * _video_bytes(config),
    }
    return Phase(parts, 0, static + sum(parts.values()))


def _student(config: RunConfig, load: Workload, static: int) -> Phase:
    size, trunk, videos = student_size(config), student_trunk(config, load), load.together
    own_context = not isinstance(config.method, AfdConfig) or config.method.context_gradient
    states = config.method.states_per_rollout if isinstance(config.method, AfdConfig) else 1
    kept = 1 + 3 * states if isinstance(config.method, AfdConfig) else 1  # videos; their states and frozen velocities
    if own_context:
        tokens = Tokens((1 + states) * videos * load.video_tokens, 0, (1 + states) * videos * load.frames, videos)
    else:
        context = videos * load.video_tokens
        tokens = Tokens(states * context, context, states * videos * load.frames, videos)
    parts = {
        **_backward_buffers(config, size),
        "activations": training_activations(trunk, tokens),
        "latents": (load.videos * kept + LATENTS_AT_ONCE * states * videos) * _video_bytes(config),
    }
    return _phase(config, load, parts, size, static)


def _backward_buffers(config: RunConfig, size: NetworkSize) -> dict[str, int]:
    """Whole weights and whole gradients that ZeRO-3 has in its hands during a backward pass."""
    return {
        "gathered weights": _gathered(config, size),
        "whole gradients": size.unit_trained * itemsize(config),
    }


def _phase(config: RunConfig, load: Workload, parts: dict[str, int], size: NetworkSize, static: int) -> Phase:
    """Peak of a training phase: its backward pass, or its optimizer's step."""
    shard = -(-size.trained // load.gpus)
    step = 0 if config.engine.offload_optimizer != "none" else min(shard, _zero(config, "sub_group_size")) * FLOAT32
    return Phase(parts, step, static + max(sum(parts.values()), step))


def _gathered(config: RunConfig, size: NetworkSize) -> int:
    """Whole weights at any time in a sharded pass: ZeRO-3 keeps what it will soon use again, up to a limit."""
    live = _zero(config, "stage3_max_live_parameters") + _zero(config, "stage3_prefetch_bucket_size")
    return min(size.total, live + size.unit) * itemsize(config)


def _video_bytes(config: RunConfig) -> int:
    """A video's latents in float32."""
    data = config.data
    return data.latent_frames * config.student.latent_channels * data.latent_height * data.latent_width * FLOAT32


def _zero(config: RunConfig, key: str) -> int:
    section: dict[str, Any] = config.engine.deepspeed.get("zero_optimization", {})
    return int(section.get(key, ZERO_DEFAULTS[key]))
