"""Time, rate and memory of a config's networks on one device, with random weights: linears, rollout, update, step."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afd_scale.benchmarks.profiles import largest
from afd_scale.benchmarks.timing import medians, rates
from afd_scale.codecs.wan import WanCodec
from afd_scale.config import RunConfig
from afd_scale.config.cast import Pass
from afd_scale.config.judges import JudgeConfig
from afd_scale.engines.cast import build_cast
from afd_scale.engines.plain import Plain
from afd_scale.flow.randomness import Randomness
from afd_scale.layers.choose_precision import choose_precision, parameter_dtype
from afd_scale.methods import make_method
from afd_scale.models.wan import CausalWan
from afd_scale.planning.activations import Trunk, training_activations
from afd_scale.planning.flops import step_flops, video_flops
from afd_scale.planning.memory import cache_bytes, itemsize, tokens_of
from afd_scale.planning.parameters import network_sizes
from afd_scale.planning.workload import Workload, workload
from afd_scale.rollout.sampler import Sampler
from afd_scale.types import Batch, Prompts, Videos

BF16 = "_bf16"  # suffix of the variants that FP8 is compared with


def benchmark_linear(config: RunConfig, repeats: int, device: torch.device) -> dict[str, Any]:
    """Each shape of linear in a student's block, forward, on the tokens of a micro-batch's videos."""
    student, load, dtype = config.student, workload(config, 1), parameter_dtype(config.precision)
    tokens = load.together * load.video_tokens
    shapes = {
        "attention": (student.dim, student.dim),
        "feed_forward_in": (student.dim, student.ffn_dim),
        "feed_forward_out": (student.ffn_dim, student.dim),
    }
    variants: dict[str, Callable[[], Tensor]] = {}
    flops: dict[str, float] = {}
    for suffix, each in _beside_bf16(config).items():
        precision = choose_precision(each.precision, each.fp8_scaling, device, keep_blocks=each.fp8_keep_blocks)
        for name, (inputs, outputs) in shapes.items():
            linear = precision.linear(inputs, outputs).to(device, dtype)
            x = torch.randn(tokens, inputs, device=device, dtype=dtype)
            variants[name + suffix] = torch.no_grad()(partial(precision.run_block, linear, x, recompute="none"))
            flops[name + suffix] = 2.0 * tokens * inputs * outputs
    moved = {name: dtype.itemsize * (tokens * (i + o) + i * o + o) for name, (i, o) in shapes.items()}
    measured = rates(variants, flops, dtype, repeats, device)
    return {**measured, **_speedups(measured), "tokens": tokens, "bytes_moved": moved, "shapes": shapes,
            **described(config)}  # fmt: skip


def benchmark_rollout(config: RunConfig, repeats: int, device: torch.device, profile: bool) -> dict[str, Any]:
    """The cached rollout of one micro-batch, and where the config's VAE is there, decoding it.

    Args:
        profile: say which kernels or operators take longest (`profiles.largest`); so below.
    """
    load = workload(config, 1)
    each = pass_of(config, load, kind="rollout")
    policy = build_engines(config, device)[each.role]
    batch, sampler, videos = random_batch(config, each.at_once, device), Sampler(config.sampler), each.at_once
    prompts, shape = batch.teacher.prompts, tuple(batch.teacher.latents.shape[1:])
    noise = sampler.draw(Randomness(config.seed), "rollout", 1, prompts.keys, shape, device,
                         given=batch.teacher.start(each.given, 1, slice(None)))  # fmt: skip
    flops = videos * video_flops(config, load, each).total
    weights = sum(p.nbytes for p in policy.network.parameters())
    cache, passes = cache_bytes(config, load, videos), load.calls_of(each)
    run = partial(sampler.rollout, policy, prompts.embeddings, noise)
    measured = rates({"rollout": run}, {"rollout": flops}, parameter_dtype(config.precision), repeats, device)
    seconds = measured["seconds"]["rollout"]
    return {**measured, "videos": videos, "passes": passes, "weight_bytes": weights, "kv_cache_bytes": cache,
            "bytes_moved": passes * (weights + cache // 2), "latent_frames_per_second": videos * load.frames / seconds,
            **_decoded(config, noise.initial, seconds, repeats, device), **profiled(run, device, profile),
            **described(config)}  # fmt: skip


def _decoded(
    config: RunConfig, latents: Tensor, seconds: float, repeats: int, device: torch.device
) -> dict[str, float]:
    """Frames a second of videos whose rollout takes so long, without and with decoding; none without a VAE."""
    if config.codec.name != "wan" or config.codec.models is None or not Path(config.codec.models).is_dir():
        return {}
    codec = WanCodec(config.codec.models, device=device)
    frames = len(latents) * codec.frames(latents.shape[1])

    @torch.no_grad()
    def decode(_: object) -> None:
        for video in latents:
            codec.decode(video[None])

    decoding = medians(decode, {"decode": None}, repeats, device)["decode"]
    return {"frames_per_second": frames / seconds, "frames_per_second_decoded": frames / (seconds + decoding)}


def benchmark_update(config: RunConfig, repeats: int, device: torch.device, profile: bool) -> dict[str, Any]:
    """Forward and backward of the student's teacher-forcing pass on one micro-batch."""
    load = workload(config, 1)
    each = pass_of(config, load, kind="velocity", gradient=True)
    states, videos = each.states, each.at_once
    batch = random_batch(config, videos, device).teacher.after(each.given)
    noisy = torch.randn_like(batch.latents.repeat_interleave(states, dim=0))
    timestep = torch.full(noisy.shape[:2], 500.0, device=device)

    def updating(student: Any) -> Callable[[], None]:
        options = {**batch.in_context, "clean_gradient": each.context_gradient}
        return lambda: student(noisy, timestep, batch.prompts.embeddings, **options).square().mean().backward()

    variants: dict[str, Callable[[], None]] = {}
    for suffix, variant in _beside_bf16(config).items():
        student = build_engines(variant, device)[each.role]
        for parameter in student.trained:
            parameter.grad = torch.zeros_like(parameter)
        variants["update" + suffix] = updating(student)

    flops = videos * video_flops(config, load, each, recompute=False).total
    planned = training_activations(Trunk(config.student, itemsize(config)), tokens_of(load, each, videos))
    weight_bytes = sum(p.nbytes for p in student.network.parameters())
    planned += len(variants) * (
        weight_bytes + sum(p.nbytes for p in student.trained)
    )  # networks that take turns stand side by side
    dtype = parameter_dtype(config.precision)
    measured = rates(variants, dict.fromkeys(variants, flops), dtype, repeats, device)
    return {**measured, **_speedups(measured), "videos": videos, "states": states, "weight_bytes": weight_bytes,
            "planned_peak_bytes": planned, **profiled(variants["update"], device, profile),
            **described(config)}  # fmt: skip


def benchmark_step(config: RunConfig, repeats: int, device: torch.device, profile: bool) -> dict[str, Any]:
    """A method's whole step."""
    load = workload(config, 1)
    for role in config.cast:
        if isinstance(role.network, JudgeConfig) and role.network.sees_pixels:
            raise ValueError(f"{role.section}.name ({role.network.name}) must be of a judge of latents: random ones "
                             "have no pixels")  # fmt: skip
    method = make_method(config, build_engines(config, device), lambda value: value)
    batch = random_batch(config, load.prompts, device)
    flops = sum(phase.total for phase in step_flops(config, load, recompute=False).values())
    dtype = parameter_dtype(config.precision)
    last = config.train.steps  # where updates that take turns come together
    step = partial(method.train_step, batch, last)
    measured = rates({"step": step}, {"step": flops}, dtype, repeats, device)
    return {**measured, "prompts": load.prompts, "videos": load.videos, "videos_at_once": load.together,
            "weight_bytes": _weight_bytes(config), **profiled(step, device, profile), **described(config)}  # fmt: skip


def profiled(run: Callable[[], Any], device: torch.device, asked: bool) -> dict[str, Any]:
    """What takes longest in it, if asked for."""
    return {"profile": largest(run, device)} if asked else {}


def pass_of(config: RunConfig, load: Workload, kind: str, gradient: bool = False) -> Pass:
    """The method's first pass of a kind."""
    for each in load.passes:
        if each.kind == kind and each.gradient == gradient:
            return each
    raise ValueError(f"method.name ({config.method.name}) must have a {kind} pass: that is what is measured")


def _weight_bytes(config: RunConfig) -> int:
    """Of all networks of a step; adapters share a base."""
    sizes = network_sizes(config)
    own = [sizes[role.name].total for role in config.cast if role.of is None or not sizes[role.name].adapter]
    return sum(own) * parameter_dtype(config.precision).itemsize


def build_engines(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Plain engines of a run's cast, with random weights, the students' outputs too, which would start at zero."""
    engines = build_cast(config, Plain(config, device))
    for engine in engines.values():
        if isinstance(engine.network, CausalWan):
            nn.init.normal_(engine.network.head.head.weight, 0, 0.02)
    return engines


def random_batch(config: RunConfig, prompts: int, device: torch.device) -> Batch:
    """Noise for videos and for texts."""
    data, student = config.data, config.student
    shape = (prompts, data.latent_frames, student.latent_channels, data.latent_height, data.latent_width)
    names = tuple(f"prompt {number}" for number in range(prompts))
    text = torch.randn(prompts, student.text_length, student.text_dim, device=device)
    asked = Prompts(names, names, tuple(range(prompts)), text)
    return Batch(Videos(asked, torch.randn(shape, device=device)), asked[:0])


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


def described(config: RunConfig) -> dict[str, Any]:
    """What was measured."""
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
