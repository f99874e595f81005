"""Bytes that one rank receives in a step, by phase: ZeRO-3's collectives over all ranks, Ulysses' within a sequence."""

from collections.abc import Mapping
from dataclasses import dataclass

from afd_scale.config import RunConfig
from afd_scale.config.cast import Pass
from afd_scale.config.models import WanConfig
from afd_scale.planning.flops import has_frozen_trunk
from afd_scale.planning.memory import is_resident, itemsize, reduced_itemsize, tokens_of
from afd_scale.planning.parameters import NetworkSize
from afd_scale.planning.workload import Workload

TRAINING_GATHERS = 2  # of all weights, for a forward and a backward pass


@dataclass(frozen=True)
class Traffic:
    """Bytes received.

    Attributes:
        gather: weights, before each forward and each backward pass of a network; a recomputation's serve its backward
            pass too. An upper bound: what stage3_max_live_parameters keeps whole is not gathered again.
        reduce: gradients, after each backward pass.
        exchange: q, k, v and outputs of self-attention, between the ranks of a sequence.
    """

    gather: float = 0.0
    reduce: float = 0.0
    exchange: float = 0.0

    @property
    def total(self) -> float:
        return self.gather + self.reduce + self.exchange

    def __rmul__(self, times: float) -> "Traffic":
        return Traffic(times * self.gather, times * self.reduce, times * self.exchange)

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.gather + other.gather, self.reduce + other.reduce, self.exchange + other.exchange)


def step_traffic(
    config: RunConfig, load: Workload, sizes: Mapping[str, NetworkSize], gathered_rollout: bool
) -> dict[str, Traffic]:
    """What one rank receives in a step, by phase.

    Args:
        gathered_rollout: policies' weights are fetched once for all their passes of a phase without gradient.
    """

    def of_pass(each: Pass) -> Traffic:
        once = gathered_rollout and is_resident(config, each)
        return _pass_traffic(config, load, each, sizes[each.role], once)

    return {phase: sum(map(of_pass, passes), Traffic()) for phase, passes in load.phases.items()}


def _pass_traffic(config: RunConfig, load: Workload, each: Pass, size: NetworkSize, once: bool) -> Traffic:
    network, seen = config.role(each.role).network, tokens_of(load, each, each.videos)
    gathers, exchanges = 1, 1.0
    if each.kind == "rollout":
        gathers, frames, sampler = load.calls_of(each), load.frames_of(each), config.sampler
        passed = zip(sampler.passes(frames, each.given), sampler.chunks.lengths(frames), strict=True)
        exchanges = sum(passes * length for passes, length in passed) / load.frames_at_once
    if each.gradient and not (each.trains and has_frozen_trunk(network)):  # forward, perhaps again, and backward
        recomputed = isinstance(network, WanConfig) and network.activation_checkpointing != "none"
        gathers, exchanges = TRAINING_GATHERS, 3 if recomputed else 2
    if seen.past:  # the clean context is a pass of its own
        gathers += 1
    exchanged = exchanges * seen.own + seen.past
    gathered = size.whole(config.role(each.role)) if once else each.runs * gathers * size.total
    return (1 / each.every) * Traffic(
        gather=_received(load, gathered * itemsize(config)),
        reduce=each.runs * _received(load, size.trained * reduced_itemsize(config)) if each.trains else 0.0,
        exchange=_exchange(config, load, network, exchanged) if isinstance(network, WanConfig) else 0.0,
    )


def _received(load: Workload, size: int) -> float:
    """Of an all-gather, or a reduce-scatter, of so many bytes: all of them but the own shard's."""
    return size * (load.gpus - 1) / load.gpus


def _exchange(config: RunConfig, load: Workload, network: WanConfig, tokens: float) -> float:
    """Of the two all-to-all of every block on so many of this rank's tokens: q, k, v, and the output."""
    elsewhere = (load.sequence - 1) / load.sequence
    return 4 * tokens * network.layers_run * network.dim * itemsize(config) * elsewhere
