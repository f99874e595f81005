"""From a method's cast to its engines, of either kind."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from afd_scale.config import RunConfig
from afd_scale.config.cast import NetworkConfig, Role
from afd_scale.layers.lora import Adapters
from afd_scale.layers.network import Network
from afd_scale.layers.ops import ModelOps
from afd_scale.models.build import adapters_of, build_network, train_part

State = Mapping[str, Tensor] | None  # start weights by parameter name; None starts at random
Build = Callable[[Adapters | None], Network]


class Kind(Protocol):
    """How networks are held and stepped: `sharded_kind.Sharded` or `plain.Plain`."""

    def load(self, role: Role) -> State:
        """Start weights."""
        ...

    def ops(self, network: NetworkConfig, adapters: Adapters | None) -> ModelOps:
        """What a network is made of here."""
        ...

    def place(self, build: Build, adapters: Adapters | None, state: State) -> Network:
        """Make a network where it will live; its random numbers are those of the run's seed."""
        ...

    def engine(self, role: Role, network: Network) -> Any:
        """An engine of its own for a placed network: trained, averaged or frozen."""
        ...

    def share(self, role: Role, leader: Any) -> Any:
        """A role that is another adapter of a leader's network, or its base."""
        ...


def build_cast(config: RunConfig, kind: Kind) -> dict[str, Any]:
    """Every engine of a run, by role."""
    engines: dict[str, Any] = {}
    for leader in (role for role in config.cast if role.of is None):
        engines |= _build_group(config, kind, leader)
    return engines


def _build_group(config: RunConfig, kind: Kind, leader: Role) -> dict[str, Any]:
    """A network and its copies, made one after the other: start weights are read once, and let go at the end."""
    adapters, state = adapters_of(config, leader), kind.load(leader)

    def build(adapters: Adapters | None) -> Network:
        return build_network(config, leader.network, kind.ops(leader.network, adapters))

    network = kind.place(build, adapters, state)
    if leader.is_partly_trained:
        train_part(network, leader.adapter)
    engines = {leader.name: kind.engine(leader, network)}
    for role in (role for role in config.cast if role.of == leader.name):
        if adapters is not None:
            engines[role.name] = kind.share(role, engines[leader.name])
        else:
            engines[role.name] = kind.engine(role, kind.place(build, None, state))
    return engines
