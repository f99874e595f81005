"""A plan: what a run costs on so many GPUs of a kind, whether it fits, and what would."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from afd_scale.config import ConfigError, RunConfig
from afd_scale.config.cast import Pass
from afd_scale.planning.communication import Traffic, step_traffic
from afd_scale.planning.flops import Flops, step_flops
from afd_scale.planning.gpus import COMPUTE_FRACTION, Gpu
from afd_scale.planning.memory import Memory, cache_bytes, itemsize, rank_memory
from afd_scale.planning.parameters import NetworkSize, network_sizes
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
        overlaps: ZeRO's collectives run beside the two first; weights are fetched ahead.
    """

    compute: float
    reading: float
    zero: float
    ulysses: float
    overlaps: bool = True

    @property
    def total(self) -> float:
        busy = max(self.compute, self.reading)
        return (max(busy, self.zero) if self.overlaps else busy + self.zero) + self.ulysses


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
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.gpu.usable_bytes

    @property
    def step_seconds(self) -> float:
        return sum(seconds.total for seconds in self.seconds.values())


def make_plan(config: RunConfig, gpus: int, gpu: Gpu) -> Plan:
    """The plan of a config; where its sequence degree does not divide the GPUs, that of the next smaller one.

    Raises:
        ConfigError: the batch does not divide among the data ranks.
    """
    config, notes = _with_possible_degree(config, gpus)
    load, networks = workload(config, gpus), network_sizes(config)
    memory = rank_memory(config, load, networks, gpu.usable_bytes)
    flops, traffic = step_flops(config, load), step_traffic(config, load, networks, memory.gathered_rollout)
    # Policies that are adapters of one network share its modules, whose trace DeepSpeed then loses.
    shared = {role.name for role in config.cast if networks[role.name].num_adapters > 1}
    seconds = {
        phase: Seconds(
            compute=flops[phase].total / (COMPUTE_FRACTION * gpu.matmul_tflops * 1e12),
            reading=_bytes_read(config, load, networks, passes) / (gpu.memory_gb_per_second * 1e9),
            zero=(traffic[phase].gather + traffic[phase].reduce) / gpu.gather_rate(gpus),
            ulysses=traffic[phase].exchange / gpu.exchange_rate(load.sequence),
            overlaps=not any(each.kind == "velocity" and each.role in shared for each in passes),
        )
        for phase, passes in load.phases.items()
    }
    leaders = {role.name: networks[role.name] for role in config.cast if role.of is None}
    return Plan(config, gpu, load, leaders, memory, flops, traffic, seconds, notes)


def _bytes_read(config: RunConfig, load: Workload, networks: Mapping[str, NetworkSize], passes: list[Pass]) -> float:
    """By all rollouts of a phase on one rank: each pass reads all weights, and half the cache on average."""
    return sum(
        each.runs * sum(config.sampler.passes(load.frames))
        * (networks[each.role].base * itemsize(config) + cache_bytes(config, load, each.at_once) / 2)
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
    changed = config.model_copy(update={"parallel": config.parallel.model_copy(update={"sequence": degree})})
    return changed, (f"planned with parallel.sequence={degree}: {wanted} does not divide the number of GPUs, {gpus}",)


@dataclass(frozen=True)
class Suggestion:
    """A way to run that fits: so many GPUs, under these overrides (none: the config as it is)."""

    gpus: int
    overrides: tuple[str, ...]
    peak: int


def remedies(config: RunConfig, gpus: int, gpu: Gpu) -> dict[str, Suggestion | None]:
    """What would fit where a config does not: overrides on these GPUs, more GPUs, and both."""
    return {
        "here": fit_on(config, gpus, gpu),
        "as_configured": smallest_fit(config, gpu, overrides=False),
        "smallest": smallest_fit(config, gpu, overrides=True),
    }


def smallest_fit(config: RunConfig, gpu: Gpu, overrides: bool) -> Suggestion | None:
    """The smallest number of GPUs on which a run fits.

    Args:
        overrides: other sequence degrees, micro-batches and rollout weights may be chosen, not the batch.
    """
    networks = network_sizes(config)
    for gpus in SEARCH:
        found = _fit_on(config, networks, gpus, gpu) if overrides else _fit_as_it_is(config, networks, gpus, gpu)
        if found is not None:
            return found
    return None


def fit_on(config: RunConfig, gpus: int, gpu: Gpu) -> Suggestion | None:
    """The fewest overrides under which a run fits on these GPUs; among equals the least shared, largest passes."""
    return _fit_on(config, network_sizes(config), gpus, gpu)


def _fit_on(config: RunConfig, networks: Mapping[str, NetworkSize], gpus: int, gpu: Gpu) -> Suggestion | None:
    micro_batches = [config.train.micro_batch, *(m for m in (8, 4, 2, 1) if m != config.train.micro_batch)]
    candidates = [
        (degree, micro)
        for degree in sorted(valid_degrees(config, gpus), key=lambda d: (d != config.parallel.sequence, d))
        for micro in micro_batches
    ]
    candidates.sort(key=lambda c: (c[0] != config.parallel.sequence) + (c[1] != config.train.micro_batch))
    for degree, micro in candidates:
        changed = config.model_copy(
            update={
                "parallel": config.parallel.model_copy(update={"sequence": degree}),
                "train": config.train.model_copy(update={"micro_batch": micro}),
            }
        )
        found = _fit_as_it_is(changed, networks, gpus, gpu)
        if found is not None:
            chosen = []
            if degree != config.parallel.sequence:
                chosen.append(f"parallel.sequence={degree}")
            if micro != config.train.micro_batch:
                chosen.append(f"train.micro_batch={micro}")
            return Suggestion(gpus, tuple(chosen), found.peak)
    return None


def _fit_as_it_is(config: RunConfig, networks: Mapping[str, NetworkSize], gpus: int, gpu: Gpu) -> Suggestion | None:
    try:
        memory = rank_memory(config, workload(config, gpus), networks, gpu.usable_bytes)
    except ConfigError:  # this number of ranks does not divide
        return None
    return Suggestion(gpus, (), memory.peak) if memory.peak <= gpu.usable_bytes else None


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
        "phases": phases,
        "step_seconds": plan.step_seconds,
        "would_fit": {name: fit and asdict(fit) for name, fit in remedies.items()},
        "notes": list(plan.notes),
        "assumptions": gpu.assumptions(),
    }
