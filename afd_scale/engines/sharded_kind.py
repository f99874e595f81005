"""The sharded kind of `cast.Kind`: every network over all ranks by DeepSpeed ZeRO-3."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

from afd_scale.config import RunConfig
from afd_scale.config.cast import NetworkConfig, Role
from afd_scale.config.models import StudentConfig, WanConfig
from afd_scale.engines.captured import choose_capture
from afd_scale.engines.cast import Build, State
from afd_scale.engines.sharded import AveragedPolicy, ShardedNetwork, TrainedNetwork, build_sharded, freeze
from afd_scale.engines.shards import GatherCounter, Residency
from afd_scale.engines.weightless import WeightlessNetwork
from afd_scale.layers.attention import Backend, choose_backend
from afd_scale.layers.choose_compile import choose_compile
from afd_scale.layers.choose_precision import choose_precision, parameter_dtype
from afd_scale.layers.lora import Adapters
from afd_scale.layers.network import Network
from afd_scale.layers.ops import ModelOps
from afd_scale.parallel.ranks import Ranks
from afd_scale.parallel.ulysses import ops_over


class Sharded:
    """All networks of a run.

    Args:
        load: start weights of a role, on the main rank.
        cache_bytes: of a rank's KV cache in a rollout, for the choice of residency.

    Attributes:
        counter: of the weights gathered on this rank.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, load: Callable[[Role], State], cache_bytes: int):
        self.config, self.ranks, self.load, self.counter = config, ranks, load, GatherCounter()
        self.precision = choose_precision(
            config.precision, config.fp8_scaling, ranks.device, keep_blocks=config.fp8_keep_blocks
        )
        self.compile = choose_compile(config.compile, ranks.device)
        self.capture = choose_capture(config.rollout.graphs, ranks.device, ranks.sequence_group is not None)
        self.attention = cache(self._attention)
        self.builders: dict[Network, tuple[Build, Adapters | None]] = {}
        self.residency = Residency(config.rollout.weights, cache_bytes, ranks.local_size, ranks.any)

    def ops(self, network: NetworkConfig, adapters: Adapters | None) -> ModelOps:
        if not isinstance(network, WanConfig):
            return ModelOps(adapters=adapters)
        attend = self.attention(network.dim // network.num_heads).attend
        return ops_over(self.ranks.sequence_group, precision=self.precision, attend=attend, adapters=adapters,
                        compile=self.compile)  # fmt: skip

    def place(self, build: Build, adapters: Adapters | None, state: State) -> Network:
        network = build_sharded(self.config, lambda: build(adapters), state)
        self.counter.watch(network.parameters())
        self.builders[network] = build, adapters
        return network

    def engine(self, role: Role, network: Network) -> ShardedNetwork | WeightlessNetwork:
        if not any(True for _ in network.parameters()):
            return WeightlessNetwork(network, self.ranks, self.config.train.micro_batch)
        options = self._options(role, network)
        if role.optimizer is not None:
            group = self.ranks.sequence_group
            return TrainedNetwork(self.config, network, role.optimizer, group, adapter=role.adapter, **options)
        return (AveragedPolicy if role.follows else ShardedNetwork)(freeze(self.config, network), **options)

    def share(self, role: Role, leader: ShardedNetwork) -> ShardedNetwork:
        options = self._options(role, leader.network)
        if not role.follows:
            return ShardedNetwork(leader.engine, role.adapter, **options)
        average = AveragedPolicy(leader.engine, role.adapter, **options)
        average.follow(leader, 0.0)
        return average

    def _options(self, role: Role, network: Network) -> dict[str, Any]:
        """Of a network. Only policies have so many passes in a phase that whole weights pay."""
        options: dict[str, Any] = {"micro_batch": self.config.train.micro_batch}
        if isinstance(role.network, StudentConfig):
            options["residency"] = self.residency
            if self.config.precision != "fp8":  # whose linears may keep a state of their own
                options["build"] = partial(self._again, network)
                options["capture"] = self.capture
        if not isinstance(role.network, WanConfig):  # which share the tokens of each video
            options["sharing"] = self.ranks.sequence_group
        return options

    def _again(self, network: Network, adapter: str | None) -> Network:
        build, adapters = self.builders[network]
        return build(None if adapter is None or adapters is None else replace(adapters, names=(adapter,)))

    def _attention(self, head_dim: int) -> Backend:
        dtype = parameter_dtype(self.config.precision)
        return choose_backend(self.config.attention, device=self.ranks.device, dtype=dtype, head_dim=head_dim)
