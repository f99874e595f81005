"""A plan: what a run costs on so many GPUs of a kind, whether it fits, and what would."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product
from operator import ne
from typing import Any

from afd_scale.config import ConfigError, RunConfig
from afd_scale.config.cast import Pass
from afd_scale.planning.communication import Traffic, step_traffic
from afd_scale.planning.flops import Flops, step_flops
from afd_scale.planning.gpus import COMPUTE_FRACTION, Gpu
from afd_scale.planning.host import host_seconds
from afd_scale.planning.memory import Memory, cache_bytes, itemsize, rank_memory
from afd_scale.planning.parameters import NetworkSize, network_sizes
from afd_scale.planning.samples import Samples, decoding_seconds, plan_samples
from afd_scale.planning.stopping import Stopping, plan_stopping
from afd_scale.planning.workload import Workload, valid_degrees, workload

SEARCH = (*range(1, 65), *range(72, 4097, 8))  # numbers of GPUs: beyond 64, whole nodes


@dataclass(frozen=True)
class Seconds:
    """Predicted time of a phase on one rank.

    Attributes:
        compute: of its FLOPs.
        reading: of weights and KV cache from the GPU's memory, the floor of small passes.
        zero: of ZeRO's collectives.
        ulysses: of Ulysses' all-to-all, which do not overlap.
        host: of the Python that launches it all, beside it.
        decoding: of videos for who judges their pixels, before the rest.
        overlaps: ZeRO's collectives run beside compute and reading; weights are fetched ahead.
    """

    compute: float
    reading: float
    zero: float
    ulysses: float
    host: float = 0.0
    decoding: float = 0.0
    overlaps: bool = True

    @property
    def total(self) -> float:
        busy = max(self.compute, self.reading, self.host)
        return (max(busy, self.zero) if self.overlaps else busy + self.zero) + self.ulysses + self.decoding


@dataclass(frozen=True)
class Plan:
    """One rank's share of one step.

    Attributes:
        networks: sizes by the role that has a network of its own.
    """

    config: RunConfig
    gpu: Gpu
    load: Workload
    networks: dict[str, NetworkSize]
    memory: Memory
    flops: dict[str, Flops]
    traffic: dict[str, Traffic]
    seconds: dict[str, Seconds]
    samples: Samples | None
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.gpu.usable_bytes

    @property
    def step_seconds(self) -> float:
        return sum(seconds.total for seconds in self.seconds.values())

    @property
    def stopping(self) -> Stopping:
        seconds = {phase: each.total for phase, each in self.seconds.items()}
        return plan_stopping(seconds, self.load.phases, self.memory.snapshot)


def make_plan(config: RunConfig, gpus: int, gpu: Gpu, networks: Mapping[str, NetworkSize] | None = None) -> Plan:
    """The plan of a config; where its sequence degree does not divide the GPUs, that of the next smaller one.

    Args:
        networks: its sizes by role, where they are known.
    Raises:
        ConfigError: the batch does not divide among the data ranks.
    """
    config, notes = _with_possible_degree(config, gpus)
    load, networks = workload(config, gpus), networks or network_sizes(config)
    memory = rank_memory(config, load, networks, gpu.usable_bytes)
    flops, traffic = step_flops(config, load), step_traffic(config, load, networks, memory.gathered_rollout)
    # Roles that take turns in one network, as adapters do, make DeepSpeed lose the trace of its modules.
    running = {each.role for each in load.passes}
    owners = [role.of or role.name for role in config.cast if role.name in running]
    shared = {name for name in running if networks[name].adapter and owners.count(config.role(name).of or name) > 1}
    decoded = _decoded(config, load)
    seconds = {
        phase: Seconds(
            compute=flops[phase].total / (COMPUTE_FRACTION * gpu.matmul_tflops * 1e12),
            reading=_bytes_read(config, load, networks, passes) / (gpu.memory_gb_per_second * 1e9),
            zero=(traffic[phase].gather + traffic[phase].reduce) / gpu.gather_rate(gpus),
            ulysses=traffic[phase].exchange / gpu.exchange_rate(load.sequence),
            host=host_seconds(config, load, passes, memory.gathered_rollout),
            decoding=decoding_seconds(config, decoded[phase], gpu, passes[0].frames),
            overlaps=not any(each.kind in ("velocity", "bidirectional") and each.role in shared for each in passes),
        )
        for phase, passes in load.phases.items()
    }
    leaders = {role.name: networks[role.name] for role in config.cast if role.of is None}
    samples = plan_samples(config, load, networks, gpu, sum(each.total for each in seconds.values()))
    return Plan(config, gpu, load, leaders, memory, flops, traffic, seconds, samples, notes)


def _decoded(config: RunConfig, load: Workload) -> dict[str, int]:
    """Videos that a rank decodes in each phase; each video once a step, whoever sees it."""
    before, decoded = 0, {}
    for phase, seen in load.pixels_seen(config).items():
        decoded[phase] = max(0, math.ceil(seen / load.sequence) - before)
        before = max(before, math.ceil(seen / load.sequence))
    return decoded


def _bytes_read(config: RunConfig, load: Workload, networks: Mapping[str, NetworkSize], passes: list[Pass]) -> float:
    """By all rollouts of a phase on one rank: each pass reads all weights, and half the cache on average."""
    return sum(
        each.runs / each.every * load.calls_of(each)
        * (networks[each.role].base * itemsize(config) + cache_bytes(config, load, each.at_once, each.frames) / 2)
        for each in passes if each.kind == "rollout"
    )  # fmt: skip


def _with_possible_degree(config: RunConfig, gpus: int) -> tuple[RunConfig, tuple[str, ...]]:
    wanted = config.parallel.sequence
    if gpus < 1 or gpus % wanted == 0:
        return config, ()
    shared_evenly = [d for d in valid_degrees(config, gpus) if config.data.global_batch % (gpus // d) == 0]
    degree = max((d for d in shared_evenly if d < wanted), default=None)
    if degree is None:
        return config, ()
    note = f"planned with parallel.sequence={degree}: {wanted} does not divide the number of GPUs, {gpus}"
    return _changed(config, "parallel", sequence=degree), (note,)


@dataclass(frozen=True)
class Suggestion:
    """A way to run that fits: so many GPUs, under these overrides (none: the config as it is)."""

    gpus: int
    overrides: tuple[str, ...]
    peak: int


def remedies(config: RunConfig, gpus: int, gpu: Gpu) -> dict[str, Suggestion | None]:
    """What would fit where a config does not: overrides on these GPUs, the fewest GPUs as configured, and with both."""
    networks = network_sizes(config)

    def smallest(overrides: bool) -> Suggestion | None:
        fits = (fit_on(config, networks, number, gpu, overrides) for number in SEARCH)
        return next((fit for fit in fits if fit is not None), None)

    here = fit_on(config, networks, gpus, gpu, overrides=True)
    return {"here": here, "as_configured": smallest(overrides=False), "smallest": smallest(overrides=True)}


def fit_on(
    config: RunConfig, networks: Mapping[str, NetworkSize], gpus: int, gpu: Gpu, overrides: bool
) -> Suggestion | None:
    """The fewest overrides under which a run fits on these GPUs; among equals the least shared, largest passes.

    Args:
        networks: its sizes by role.
        overrides: other sequence degrees and micro-batches may be chosen, not the batch.
    """
    wanted = degree, micro_batch = config.parallel.sequence, config.train.micro_batch
    degrees = sorted(valid_degrees(config, gpus), key=lambda other: other != degree)
    candidates = [wanted] if not overrides else sorted(
        product(degrees, dict.fromkeys((micro_batch, 8, 4, 2, 1))),
        key=lambda candidate: sum(map(ne, candidate, wanted)),
    )  # fmt: skip
    for candidate in candidates:
        changed = _changed(_changed(config, "parallel", sequence=candidate[0]), "train", micro_batch=candidate[1])
        try:
            memory = rank_memory(changed, workload(changed, gpus), networks, gpu.usable_bytes)
        except ConfigError:  # this number of ranks does not divide
            continue
        if memory.peak <= gpu.usable_bytes:
            named = zip(("parallel.sequence", "train.micro_batch"), candidate, wanted, strict=True)
            return Suggestion(gpus, tuple(f"{name}={ours}" for name, ours, was in named if ours != was), memory.peak)
    return None


def _changed(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def plan_as_dict(plan: Plan, remedies: dict[str, Suggestion | None]) -> dict[str, Any]:
    """Everything, for JSON; bytes and seconds, one rank's share of one step."""
    load, memory, gpu = plan.load, plan.memory, plan.gpu
    phases: dict[str, dict[str, Any]] = {}
    for phase, held in memory.phases.items():
        flops, traffic, seconds = plan.flops[phase], plan.traffic[phase], plan.seconds[phase]
        phases[phase] = {
            "memory": {"parts": held.parts, "optimizer_step": held.step, "peak": held.peak},
            "flops": {**asdict(flops), "total": flops.total},
            "bytes_received": {**asdict(traffic), "total": traffic.total},
            "seconds": {**asdict(seconds), "total": seconds.total},
        }
    return {
        "run": plan.config.name,
        "gpu": gpu.name,
        "gpus": load.gpus,
        "fits": plan.fits,
        "peak_bytes": memory.peak,
        "usable_bytes": gpu.usable_bytes,
        "sequence": load.sequence,
        "valid_sequence_degrees": valid_degrees(plan.config, load.gpus),
        "data_ranks": load.data_ranks,
        "videos_per_data_rank": load.videos,
        "micro_batch": load.together,
        "rollout_weights": "gathered" if memory.gathered_rollout else "sharded",
        "parameters": {role: {**asdict(size), "total": size.total} for role, size in plan.networks.items()},
        "shards_bytes": memory.shards,
        "host_bytes": memory.host,
        "checkpoint_host_bytes": memory.snapshot,
        "kept_host_bytes": memory.kept,
        "phases": phases,
        "step_seconds": plan.step_seconds,
        "stopping": {**asdict(plan.stopping), "seconds": plan.stopping.seconds, "lead": plan.stopping.lead},
        "samples": plan.samples
        and {
            **asdict(plan.samples),
            "seconds": plan.samples.seconds,
            "peak_bytes": plan.memory.all_phases["sample videos"].peak,
        },
        "would_fit": {name: fit and asdict(fit) for name, fit in remedies.items()},
        "notes": list(plan.notes),
        "assumptions": gpu.assumptions(),
    }
