"""Bytes on one rank: what ZeRO-3 shards all the time, and the peak of each phase on top of it.

DeepSpeed 0.19 in bf16, bytes a parameter of a trained network: bf16 shard 2, float32 master 4, Adam 8, gradient
partition 2 (4 where micro-batches are accumulated; the optimizer's step makes a float32 copy, one sub-group at a time).
In float32 the master is a second copy of the shard. Each trained engine also holds a bucket for gradients on their way,
which are added up in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from afd_scale.config import RunConfig
from afd_scale.config.cast import Pass
from afd_scale.config.judges import VlmDiscriminatorConfig
from afd_scale.config.models import StudentConfig, WanConfig
from afd_scale.planning import vae
from afd_scale.planning.activations import (
    FLOAT32,
    Tokens,
    Trunk,
    forward_working,
    key_value_bytes,
    saved_outside_blocks,
    text_key_value_bytes,
    training_activations,
)  # fmt: skip
from afd_scale.planning.flops import has_frozen_trunk
from afd_scale.planning.parameters import NetworkSize
from afd_scale.planning.vlm import activation_bytes, shown_video, stacks
from afd_scale.planning.workload import Workload, sample_pass

MASTER, ADAM = 4, 8  # bytes a trained parameter
# What holds memory, in elements: ours of parallel/deepspeed_config.py, then defaults of DeepSpeed 0.19;
# engine.deepspeed.zero_optimization overrides them.
ZERO_DEFAULTS = {
    "reduce_bucket_size": 250_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "sub_group_size": 1_000_000_000,
}
LATENTS_AT_ONCE = 8  # tensors of a state's size in a policy's loss, float32: states, velocities, their differences


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
        phases: of the step; each is its largest pass.
        gathered_rollout: policies hold all weights while they generate and predict.
        samples: of the sample videos between steps; None where no VAE decodes any.
        snapshot: on the CPU, of a checkpoint that is being written.
        kept: on the CPU, what a step could be given up for: trained networks but the student, as they were before it.
    """

    shards: dict[str, int]
    host: dict[str, int]
    phases: dict[str, Phase]
    gathered_rollout: bool
    samples: Phase | None
    snapshot: int
    kept: int

    @property
    def all_phases(self) -> dict[str, Phase]:
        """Those of a step, and that of the sample videos."""
        return self.phases if self.samples is None else {**self.phases, "sample videos": self.samples}

    @property
    def peak(self) -> int:
        return max(phase.peak for phase in self.all_phases.values())


def rank_memory(config: RunConfig, load: Workload, sizes: Mapping[str, NetworkSize], usable_bytes: int) -> Memory:
    """Memory of one rank.

    Args:
        sizes: by role.
        usable_bytes: of a GPU; rollout.weights auto gathers where all weights fit into it.
    """
    shards, host = _shards(config, load.gpus, sizes)
    static = sum(shards.values())

    def held(each: Pass, gathered: bool) -> Phase:
        parts = _parts(config, load, each, sizes[each.role], gathered)
        step = _optimizer_step(config, load, sizes[each.role]) if each.trains else 0
        return Phase(parts, step, static + max(sum(parts.values()), step))

    residents = [each for each in load.passes if is_resident(config, each)]
    fits = all(held(each, True).peak <= usable_bytes for each in residents)
    choice = config.rollout.weights
    gathered = bool(residents) and (choice == "gathered" or (choice == "auto" and fits))
    phases = {
        name: max((held(each, gathered and each in residents) for each in passes), key=lambda phase: phase.peak)
        for name, passes in load.phases.items()
    }
    samples, sampled = None, sample_pass(config, load)
    if sampled is not None:
        pixels = config.data.latent_height * config.data.latent_width * vae.PIXELS**2
        decoding = sampled.at_once * vae.DECODE_BYTES_PER_PIXEL * min(pixels, vae.WHOLE_FRAME_PIXELS)
        parts = _parts(config, load, sampled, sizes[sampled.role], gathered)
        parts |= {"VAE": vae.WEIGHT_BYTES, "VAE decoding": decoding}
        samples = Phase(parts, 0, static + sum(parts.values()))
    return Memory(
        shards, host, phases, gathered, samples, _snapshot(config, load.gpus, sizes), _kept(config, load.gpus, sizes)
    )


def is_resident(config: RunConfig, each: Pass) -> bool:
    """Whether rollout.weights speaks of a pass: a policy's without gradient."""
    return not each.gradient and isinstance(config.role(each.role).network, StudentConfig)


def has_twin(config: RunConfig, each: Pass, gathered: bool) -> bool:
    """Whether a pass runs in a plain twin, without hooks."""
    return gathered and is_resident(config, each) and config.precision != "fp8"


def is_captured(config: RunConfig, load: Workload, each: Pass, gathered: bool) -> bool:
    """Whether the passes of a rollout run as graphs, as `afd_scale.engines.captured` decides on a GPU."""
    alone = load.sequence == 1 and config.rollout.graphs is not False
    return alone and each.kind == "rollout" and has_twin(config, each, gathered)


def itemsize(config: RunConfig) -> int:
    """Bytes of a parameter, a gradient and an activation."""
    return 4 if config.precision == "fp32" else 2


def reduced_itemsize(config: RunConfig) -> int:
    """Bytes of a gradient on its way to the rank that keeps it: float32, unless engine.deepspeed says otherwise."""
    return FLOAT32 if config.engine.deepspeed.get("communication_data_type", "fp32") == "fp32" else 2


def cache_bytes(config: RunConfig, load: Workload, videos: int, frames: int | None = None) -> int:
    """Of a rank's KV cache in a rollout of so many videos, and of the keys that a layer turns anew in each pass.

    Args:
        frames: of a video; None is the teacher's.
    """
    tokens = videos * config.sampler.cached_frames(frames or load.frames) * load.local_tokens_per_frame
    trunk = Trunk(config.student, itemsize(config), load.sequence)
    turned = tokens * config.student.dim * itemsize(config) if config.sampler.positions == "window" else 0
    return key_value_bytes(trunk, tokens) + text_key_value_bytes(trunk, videos) + turned


def tokens_of(load: Workload, each: Pass, videos: int) -> Tokens:
    """A rank's tokens of so many videos in a network's pass; of a rollout, in the longest."""
    frames = videos * load.frames_of(each)
    tokens = frames * load.local_tokens_per_frame
    if each.kind == "rollout":
        frames = videos * load.frames_at_once
        return Tokens(frames * load.local_tokens_per_frame, 0, frames, videos)
    if each.kind in ("score", "bidirectional"):
        return Tokens(tokens, 0, frames, videos)
    clean_frames = frames + videos * load.window_of(each).context
    clean = clean_frames * load.local_tokens_per_frame
    if each.gradient and each.context_gradient:
        return Tokens(each.states * tokens + clean, 0, each.states * frames + clean_frames, videos)
    return Tokens(each.states * tokens, clean, each.states * frames, videos)


def _shards(config: RunConfig, gpus: int, sizes: Mapping[str, NetworkSize]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes on the device and on the host that are there all the time."""
    size = itemsize(config)
    shards: dict[str, int] = {}
    host: dict[str, int] = {}
    optimizer = host if config.engine.offload_optimizer != "none" else shards
    parameters = host if config.engine.offload_parameters != "none" else shards

    def add(where: dict[str, int], name: str, elements: int, bytes_each: int) -> None:
        where[name] = where.get(name, 0) + -(-elements // gpus) * bytes_each

    for role in config.cast:
        name, network = role.name.replace("_", " "), sizes[role.name]
        if role.of is None or not network.adapter:
            add(parameters, f"{name} parameters", network.total, size)
        if role.follows and size < FLOAT32:
            add(shards, f"{name} float32 average", network.adapter or network.base, FLOAT32)
        if role.optimizer is not None:
            add(optimizer, f"{name} optimizer", network.trained, MASTER + ADAM)
            add(optimizer, f"{name} gradients", network.trained, FLOAT32 if config.train.micro_batch else size)
            shards[f"{name} reduce bucket"] = _zero(config, "reduce_bucket_size") * reduced_itemsize(config)
    return shards, host


def _snapshot(config: RunConfig, gpus: int, sizes: Mapping[str, NetworkSize]) -> int:
    """A rank's copy of what a checkpoint holds of its shards; those on NVMe are copied there, weights alone here.

    The main rank's whole adapters, of a LoRA run, come on top.
    """
    trained = MASTER if config.engine.offload_optimizer == "nvme" else MASTER + ADAM
    total = 0
    for role in config.cast:
        size = sizes[role.name]
        if role.optimizer is not None:
            total += -(-size.trained // gpus) * trained
        elif role.follows:
            total += -(-(size.adapter or size.base) // gpus) * FLOAT32
    return total


def _kept(config: RunConfig, gpus: int, sizes: Mapping[str, NetworkSize]) -> int:
    """A rank's copy of the networks that a step trains before the student."""
    if config.engine.offload_optimizer == "nvme":
        return 0
    trained = [role for role in config.cast if role.optimizer is not None and role.name != "student"]
    return sum(-(-sizes[role.name].trained // gpus) * (MASTER + ADAM) for role in trained)


def _parts(config: RunConfig, load: Workload, each: Pass, size: NetworkSize, gathered: bool) -> dict[str, int]:
    """What a pass holds besides the shards."""
    whole = size.whole(config.role(each.role)) + size.unit  # of a twin, and the unit that is being gathered
    parts = {"gathered weights": whole * itemsize(config) if gathered else _gathered(config, size)}
    if each.trains:
        parts["whole gradients"] = size.unit_trained * itemsize(config)
    latents = each.held
    network, videos = config.role(each.role).network, each.at_once
    if each.kind == "rollout":
        parts["KV cache"] = cache_bytes(config, load, videos, each.frames)
        # What is generated, noise, and re-noise, drawn for the chunk of the most steps; of long videos for one chunk.
        drawn = videos * (1 + max(len(config.sampler.timesteps_of(chunk)) for chunk in (0, 1)))
        latents += drawn if each.frames is None else -(-drawn * load.chunk_frames // load.frames)
    elif each.kind == "score":
        latents += videos
    elif each.gradient:
        latents += LATENTS_AT_ONCE * each.states * videos
    if isinstance(network, WanConfig):  # others, of convolutions, are too small to matter
        through = each.gradient and not (each.trains and has_frozen_trunk(network))
        parts |= _activations(load, each, Trunk(network, itemsize(config), load.sequence), through)
        if is_captured(config, load, each, gathered):  # in a pool of their own; buffers of a last, smaller micro-batch
            parts["graphs"] = parts["activations"] + cache_bytes(
                config, load, each.videos % each.at_once, each.frames
            )  # fmt: skip
    elif isinstance(network, VlmDiscriminatorConfig):
        both, own = stacks(network, shown_video(config, each.frames)), -(-videos // load.sequence)
        parts["activations"] = activation_bytes(network, both, own, itemsize(config), each.gradient)
    if seen := load.pixels_seen(config).get(each.phase):  # not of what is no phase of the step
        parts["decoded pixels"] = -(-seen // load.sequence) * shown_video(config, each.frames).bytes
    return {**parts, "latents": latents * _video_bytes(config)}


def _activations(load: Workload, each: Pass, trunk: Trunk, gradient: bool) -> dict[str, int]:
    seen = tokens_of(load, each, each.at_once)
    if gradient:
        return {"activations": training_activations(trunk, seen)}
    if each.kind == "rollout":  # its cache is counted already
        return {"activations": forward_working(trunk, seen, cached=True) + saved_outside_blocks(trunk, seen)}
    past = {"clean past": key_value_bytes(trunk, seen.past)} if seen.past else {}
    return {**past, "activations": forward_working(trunk, seen)}


def _optimizer_step(config: RunConfig, load: Workload, size: NetworkSize) -> int:
    """What is there while the optimizer steps, instead of a pass."""
    shard = -(-size.trained // load.gpus)
    return 0 if config.engine.offload_optimizer != "none" else min(shard, _zero(config, "sub_group_size")) * FLOAT32


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
