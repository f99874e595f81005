"""Ours beside Self-Forcing's own code, beside the floor and, for a rollout, beside the sharded engine: in turns, with
the same weights and the same noise in one process."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afd_scale.benchmarks.floor import record
from afd_scale.benchmarks.networks import described, pass_of, profiled, random_batch
from afd_scale.benchmarks.self_forcing import FLEX_NOTE, SelfForcing, check, check_checkout, check_training
from afd_scale.benchmarks.timing import medians
from afd_scale.config import RunConfig
from afd_scale.engines.cast import Kind
from afd_scale.engines.plain import Plain
from afd_scale.flow.randomness import Randomness
from afd_scale.layers.lora import Adapters
from afd_scale.layers.network import Network
from afd_scale.models.build import build_network
from afd_scale.parallel.launchers import launched_as
from afd_scale.parallel.ranks import Ranks, start_ranks
from afd_scale.planning.memory import cache_bytes
from afd_scale.planning.workload import workload
from afd_scale.rollout.sampler import Sampler

SPREAD = 0.02  # added to every weight: zeros and ones would hide a bias or a norm that is left out
Run = Callable[[], Any]


def rollout_against(
    config: RunConfig, repeats: int, device: torch.device, profile: bool, folder: Path
) -> dict[str, Any]:
    """The cached rollout of a micro-batch beside Self-Forcing's inference pipeline.

    Theirs runs a pass on the last clean chunk too, which nothing follows.
    """
    check(config)
    _check_floor(config)
    check_checkout(folder)
    load = workload(config, 1)
    each = pass_of(config, load, kind="rollout")
    plain = build_policy(config, Plain(config, device), each.role)
    state = spread(plain.network, config.seed)
    sampler, (text, shape) = Sampler(config.sampler), _inputs(config, each.at_once, device)
    keys = tuple(range(each.at_once))
    noise = sampler.draw(Randomness(config.seed), "rollout", 1, keys, shape, device)

    def of(policy: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with policy.resident(sampling=True):
                return sampler.rollout(policy, text, noise)

        return run

    theirs = SelfForcing(folder, config, state, device).rollout(noise, text)
    ours = of(plain)
    difference = relative_difference(ours(), theirs())
    from afd_scale.engines.sharded_kind import Sharded  # which imports DeepSpeed, which logs

    with _one_rank() as ranks:
        kind = Sharded(_gathered(config), ranks, lambda role: state, cache_bytes(config, load, each.at_once))
        variants: dict[str, Run] = {"ours": ours, "theirs": theirs, "floor": record(ours, plain.network.parameters())}
        variants["sharded"] = of(build_policy(config, kind, each.role))
        seconds = _medians(variants, repeats, device)
    return {
        **_ratios(seconds), "sharded_ratio": seconds["sharded"] / seconds["ours"], "max_difference": difference,
        "seconds": seconds, "videos": each.at_once, "passes": config.sampler.calls(load.frames),
        **profiled(ours, device, profile), **described(config),
    }  # fmt: skip


def update_against(
    config: RunConfig, repeats: int, device: torch.device, profile: bool, folder: Path
) -> dict[str, Any]:
    """Forward and backward of the teacher-forcing pass on a micro-batch, the gradient through the clean chunks too.

    `max_difference` is the largest among the velocity and each weight's gradient.
    """
    check_training(config)
    _check_floor(config)
    check_checkout(folder)
    load = workload(config, 1)
    each = pass_of(config, load, kind="velocity", gradient=True)
    student = build_policy(config, Plain(config, device), each.role)
    peer = SelfForcing(folder, config, spread(student.network, config.seed), device)
    text, shape = _inputs(config, each.at_once, device)
    clean = torch.randn(each.at_once, *shape, device=device)
    noisy = torch.randn_like(clean.repeat_interleave(each.states, dim=0))
    timestep = torch.full(noisy.shape[:2], 500.0, device=device)

    def velocity() -> Tensor:
        return student(noisy, timestep, text, clean=clean, clean_gradient=True)

    def peers_velocity() -> Tensor:
        return peer.velocity(noisy, timestep, text, clean)

    def ours() -> None:
        velocity().square().mean().backward()

    def theirs() -> None:
        peers_velocity().square().mean().backward()

    network, model = student.network, peer.model
    differences = {"velocity": relative_difference(velocity().detach(), peers_velocity().detach())}
    for each_network, run in ((network, ours), (model, theirs)):
        each_network.zero_grad()
        run()
    other = dict(model.named_parameters())
    for name, parameter in network.named_parameters():
        differences[name] = relative_difference(parameter.grad, other[name].grad)
    variants: dict[str, Run] = {"ours": ours, "theirs": theirs, "floor": record(ours, network.parameters())}
    seconds = _medians(variants, repeats, device)
    note = {"note": FLEX_NOTE} if device.type == "cpu" else {}
    worst = max(differences, key=lambda name: differences[name])
    return {**_ratios(seconds), "max_difference": differences[worst], "largest_in": worst, "seconds": seconds,
            "videos": each.at_once, "states": each.states, **note, **profiled(ours, device, profile),
            **described(config)}  # fmt: skip


def build_policy(config: RunConfig, kind: Kind, name: str) -> Any:
    """The engine of one role alone, with a network of its own."""
    (role,) = (role for role in config.cast if role.name == name)

    def build(adapters: Adapters | None) -> Network:
        return build_network(config, role.network, kind.ops(role.network, adapters))

    return kind.engine(role, kind.place(build, None, kind.load(role)))


@torch.no_grad()
def spread(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """Add a little noise to every weight; all of them, by name."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.add_(SPREAD * torch.randn(parameter.shape, generator=generator).to(parameter))
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def relative_difference(ours: Tensor | None, theirs: Tensor | None) -> float:
    """Largest difference over the largest value of theirs."""
    assert ours is not None
    assert theirs is not None
    largest = theirs.abs().max().double()
    return float((ours.double() - theirs.double()).abs().max() / largest)


def _check_floor(config: RunConfig) -> None:
    if config.attention in ("flex", "fa4"):
        raise ValueError(f"attention ({config.attention}) must be auto, sdpa or flash beside another's: the floor does "
                         "not see what a compiled kernel computes")  # fmt: skip


def _medians(variants: Mapping[str, Run], repeats: int, device: torch.device) -> dict[str, float]:
    """Of one thread of a CPU its own time: turns of seconds are too long for other work to slow all of them alike."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return medians(lambda run: run(), variants, repeats, device, time.process_time if alone else time.perf_counter)


def _ratios(seconds: Mapping[str, float]) -> dict[str, float]:
    return {"ratio": seconds["ours"] / seconds["theirs"], "floor_ratio": seconds["ours"] / seconds["floor"]}


def _inputs(config: RunConfig, videos: int, device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
    """Texts, and the (F, C, H, W) of a video."""
    batch = random_batch(config, videos, device).teacher
    return batch.prompts.embeddings, tuple(batch.latents.shape[1:])


def _gathered(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"weights": "gathered"})})


@contextlib.contextmanager
def _one_rank() -> Iterator[Ranks]:
    """A process group of this process alone; the environment and the threads stay as they are."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    try:
        with start_ranks(launched_as({}), timeout_minutes=2) as ranks:
            torch.set_num_threads(threads)
            yield ranks
    finally:
        os.environ.clear()
        os.environ.update(environment)
