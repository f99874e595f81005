"""Time, rate and memory of a config's networks on one device, with random weights: linears, rollout, update, step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from afd_scale.benchmarks.engines import PlainAverage, PlainNetwork, PlainTrained
from afd_scale.benchmarks.timing import rates
from afd_scale.config import RunConfig
from afd_scale.config.methods import AfdConfig
from afd_scale.config.models import LatentDiscriminatorConfig, LoraConfig, StudentConfig
from afd_scale.flow.randomness import Randomness
from afd_scale.flow.schedule import denoising_sigmas
from afd_scale.layers.attention import choose_backend
from afd_scale.layers.choose_precision import choose_precision
from afd_scale.layers.lora import Adapters, adapter_of, train_only
from afd_scale.layers.ops import ModelOps
from afd_scale.layers.precision import Precision
from afd_scale.methods.afd import Afd
from afd_scale.models.discriminators import LatentDiscriminator
from afd_scale.models.wan import CausalWan
from afd_scale.planning.activations import Tokens, key_value_bytes, training_activations
from afd_scale.planning.flops import rollout_flops, rollout_passes, step_flops, update_flops
from afd_scale.planning.memory import student_trunk
from afd_scale.planning.parameters import discriminator_size, student_size
from afd_scale.planning.workload import workload
from afd_scale.rollout.causal import rollout
from afd_scale.types import Batch

LoraArchitecture = StudentConfig | LatentDiscriminatorConfig
STUDENT, OLD_POLICY = "student", "old_policy"
BF16 = "_bf16"  # suffix of the variants that FP8 is compared with


def benchmark_linear(config: RunConfig, repeats: int, device: torch.device) -> dict[str, Any]:
    """Each shape of linear in a student's block, forward, on the tokens of a micro-batch's videos."""
    student, load, dtype = config.student, workload(config, 1), dtype_of(config)
    tokens = load.together * load.video_tokens
    shapes = {
        "attention": (student.dim, student.dim),
        "feed_forward_in": (student.dim, student.ffn_dim),
        "feed_forward_out": (student.ffn_dim, student.dim),
    }
    variants: dict[str, Callable[[], Tensor]] = {}
    flops: dict[str, float] = {}
    for suffix, each in _beside_bf16(config).items():
        precision = choose_precision(each.precision, each.fp8_scaling, device)
        for name, (inputs, outputs) in shapes.items():
            linear = precision.linear(inputs, outputs).to(device, dtype)
            x = torch.randn(tokens, inputs, device=device, dtype=dtype)
            variants[name + suffix] = _without_gradient(precision, linear, x)
            flops[name + suffix] = 2.0 * tokens * inputs * outputs
    moved = {name: dtype.itemsize * (tokens * (i + o) + i * o + o) for name, (i, o) in shapes.items()}
    measured = rates(variants, flops, dtype, repeats, device)
    return {**measured, **_speedups(measured), "tokens": tokens, "bytes_moved": moved, "shapes": shapes,
            **_described(config)}  # fmt: skip


def benchmark_rollout(config: RunConfig, repeats: int, device: torch.device) -> dict[str, Any]:
    """The cached rollout of one micro-batch."""
    student, load = config.student, workload(config, 1)
    policy = PlainNetwork(build_student(config, device).requires_grad_(False), _adapter(config, OLD_POLICY))
    batch = random_batch(config, load.together, device)
    sigmas = denoising_sigmas(student.timesteps, student.timestep_shift)
    renoise = torch.randn(len(sigmas) - 1, *batch.latents.shape, device=device)

    def generate() -> Tensor:
        return rollout(policy, batch.text, batch.latents, renoise, sigmas)

    rank = 0 if student.lora is None else student.lora.rank
    flops = load.together * rollout_flops(student, load.frames, load.tokens_per_frame, rank).total
    weights = sum(p.nbytes for p in policy.network.parameters())
    cached = student.cached_frames(load.frames) * load.tokens_per_frame * load.together
    cache = key_value_bytes(student_trunk(config, load), cached)
    passes = rollout_passes(student, load.frames)
    measured = rates({"rollout": generate}, {"rollout": flops}, dtype_of(config), repeats, device)
    return {**measured, "videos": load.together, "passes": passes, "weight_bytes": weights, "kv_cache_bytes": cache,
            "bytes_moved": passes * (weights + cache // 2), **_described(config)}  # fmt: skip


def benchmark_update(config: RunConfig, repeats: int, device: torch.device) -> dict[str, Any]:
    """Forward and backward of the student's teacher-forcing pass on one micro-batch."""
    student, load, method = config.student, workload(config, 1), _afd(config)
    states = method.states_per_rollout
    batch = random_batch(config, load.together, device)
    noisy = torch.randn_like(batch.latents.repeat_interleave(states, dim=0))
    timestep = torch.full(noisy.shape[:2], 500.0, device=device)

    def updating(network: PlainNetwork) -> Callable[[], None]:
        options = {"clean": batch.latents, "clean_gradient": method.context_gradient}
        return lambda: network(noisy, timestep, batch.text, **options).square().mean().backward()

    variants: dict[str, Callable[[], None]] = {}
    for suffix, each in _beside_bf16(config).items():
        network = PlainNetwork(_train_only(build_student(each, device), student.lora), _adapter(config, STUDENT))
        trained = [p for p in network.network.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        variants["update" + suffix] = updating(network)

    flops = load.together * update_flops(
        student, load.frames, load.tokens_per_frame, states, context_gradient=method.context_gradient, recompute=False
    ).total  # fmt: skip
    video, frames = load.video_tokens * load.together, load.frames * load.together
    if method.context_gradient:
        tokens = Tokens((1 + states) * video, 0, (1 + states) * frames, load.together)
    else:
        tokens = Tokens(states * video, video, states * frames, load.together)
    planned = training_activations(student_trunk(config, load), tokens)
    weights = sum(p.nbytes for p in network.network.parameters()) + sum(p.nbytes for p in trained)
    planned += len(variants) * weights  # networks that take turns stand side by side
    measured = rates(variants, dict.fromkeys(variants, flops), dtype_of(config), repeats, device)
    return {
        **measured,
        **_speedups(measured),
        "videos": load.together,
        "states": states,
        "planned_peak_bytes": planned,
        **_described(config),
    }


def benchmark_step(config: RunConfig, repeats: int, device: torch.device) -> dict[str, Any]:
    """`methods.afd`'s whole step: rollout, discriminator, student."""
    method, load = _afd(config), workload(config, 1)
    if not isinstance(method.discriminator, LatentDiscriminatorConfig):
        name = method.discriminator.name
        raise ValueError(f"method.discriminator.name ({name}) must be latent: FLOPs of another are not counted")
    afd = _plain_afd(config, method, method.discriminator, device)
    batch = random_batch(config, load.prompts, device)
    flops = sum(phase.total for phase in step_flops(config, load, recompute=False).values())
    measured = rates({"step": lambda: afd.train_step(batch, 1)}, {"step": flops}, dtype_of(config), repeats, device)
    return {**measured, "prompts": load.prompts, "videos": load.videos, "videos_at_once": load.together,
            "weight_bytes": _weight_bytes(config), **_described(config)}  # fmt: skip


def _weight_bytes(config: RunConfig) -> int:
    """Of all networks of a step; adapters share a base."""
    student, judge = student_size(config), discriminator_size(config)
    policies = 1 if config.student.lora else 3 if _afd(config).prior_weight else 2
    return (policies * student.total + (judge.total if judge else 0)) * dtype_of(config).itemsize


def _plain_afd(
    config: RunConfig, method: AfdConfig, discriminator: LatentDiscriminatorConfig, device: torch.device
) -> Afd:
    lora = config.student.lora
    student = PlainTrained(
        _train_only(build_student(config, device), lora), method.optimizer, _adapter(config, STUDENT)
    )
    if lora is None:
        copies = [build_student(config, device) for _ in range(2 if method.prior_weight else 1)]
        for copy in copies:
            copy.load_state_dict(student.network.state_dict())
            copy.requires_grad_(False)
        old_policy = PlainAverage(copies[0])
        reference = PlainNetwork(copies[1]) if method.prior_weight else None
    else:
        old_policy = PlainAverage(student.network, OLD_POLICY)
        reference = PlainNetwork(student.network) if method.prior_weight else None
    with device:
        judge = LatentDiscriminator(discriminator, _ops(config, discriminator, device, LatentDiscriminator.ADAPTER))
    judge = judge.to(dtype_of(config))
    if discriminator.lora is not None:
        train_only(judge, LatentDiscriminator.trains_with_adapters)
    return Afd(
        method, config.student, config.train.steps, Randomness(config.seed), student, old_policy, reference,
        PlainTrained(judge, method.discriminator_optimizer), lambda value: value, config.train.micro_batch,
    )  # fmt: skip


def build_student(config: RunConfig, device: torch.device) -> CausalWan:
    """With random weights, the head's too, which would start at zero."""
    with device:
        network = CausalWan(config.student, _ops(config, config.student, device, STUDENT, OLD_POLICY))
        nn.init.normal_(network.head.head.weight, 0, 0.02)
    return network.to(dtype_of(config))


def random_batch(config: RunConfig, prompts: int, device: torch.device) -> Batch:
    """Noise for videos and for texts."""
    data, student = config.data, config.student
    shape = (prompts, data.latent_frames, student.latent_channels, data.latent_height, data.latent_width)
    names = tuple(f"prompt {number}" for number in range(prompts))
    text = torch.randn(prompts, student.text_length, student.text_dim, device=device)
    return Batch(names, names, tuple(range(prompts)), text, torch.randn(shape, device=device))


def dtype_of(config: RunConfig) -> torch.dtype:
    return torch.float32 if config.precision == "fp32" else torch.bfloat16


def _beside_bf16(config: RunConfig) -> dict[str, RunConfig]:
    """The config by the suffix of its variants; FP8 takes turns with bf16."""
    if config.precision != "fp8":
        return {"": config}
    return {"": config, BF16: config.model_copy(update={"precision": "bf16"})}


def _speedups(measured: dict[str, Any]) -> dict[str, Any]:
    """Of FP8 over bf16, where both were measured."""
    seconds = measured["seconds"]
    ratios = {name: seconds[name + BF16] / taken for name, taken in seconds.items() if name + BF16 in seconds}
    return {"speedup_over_bf16": ratios} if ratios else {}


def _ops(config: RunConfig, network: LoraArchitecture, device: torch.device, *names: str) -> ModelOps:
    lora, head_dim = network.lora, network.dim // network.num_heads
    adapters = None if lora is None else Adapters(names, lora.rank, lora.alpha / lora.rank)
    backend = choose_backend(config.attention, device=device, dtype=dtype_of(config), head_dim=head_dim)
    precision = choose_precision(config.precision, config.fp8_scaling, device)
    return ModelOps(precision, backend.attend, adapters)


def _train_only(network: CausalWan, lora: LoraConfig | None) -> CausalWan:
    train_only(network, lambda name: lora is None or adapter_of(name) == STUDENT)
    return network


def _adapter(config: RunConfig, name: str) -> str | None:
    return None if config.student.lora is None else name


def _without_gradient(precision: Precision, linear: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            output: Tensor = precision.run_block(linear, x, recompute=False)
        return output

    return run


def _afd(config: RunConfig) -> AfdConfig:
    if not isinstance(config.method, AfdConfig):
        raise ValueError(f"method.name ({config.method.name}) must be afd: its update and its step are measured")
    return config.method


def _described(config: RunConfig) -> dict[str, Any]:
    student, data = config.student, config.data
    return {
        "precision": config.precision,
        "attention": config.attention,
        "config": config.name,
        "shape": {
            "dim": student.dim, "ffn_dim": student.ffn_dim, "heads": student.num_heads, "layers": student.num_layers,
            "latents": [data.latent_frames, student.latent_channels, data.latent_height, data.latent_width],
            "checkpointing": student.activation_checkpointing,
            "lora_rank": None if student.lora is None else student.lora.rank,
        },
    }  # fmt: skip
