"""How many parameters the networks of a cast have: counted on the networks themselves, built without memory."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from afd_scale.config import RunConfig
from afd_scale.config.cast import Role
from afd_scale.layers.lora import adapter_of
from afd_scale.layers.ops import ModelOps
from afd_scale.models.build import adapters_of, build_network, train_part


@dataclass(frozen=True)
class NetworkSize:
    """Parameters of one network, in elements.

    Attributes:
        base: weights of the architecture.
        adapter: of one adapter; 0 without LoRA.
        num_adapters: held beside the base.
        trained: with an optimizer.
        unit: the largest set that is gathered in one collective, a block with its adapters.
        unit_trained: those of it that get gradients.
    """

    base: int
    adapter: int
    num_adapters: int
    trained: int
    unit: int
    unit_trained: int

    @property
    def total(self) -> int:
        return self.base + self.num_adapters * self.adapter

    def whole(self, role: Role) -> int:
        """What a rank gathers once to keep a policy whole: no adapter of others."""
        return self.base + (self.adapter if role.adapter else 0)


def network_sizes(config: RunConfig) -> dict[str, NetworkSize]:
    """Of the network behind each role; roles that are adapters of one base share it."""
    sizes: dict[str, NetworkSize] = {}
    for role in config.cast:
        if role.of is None:
            sizes[role.name] = _size(config, role)
        else:
            shared = sizes[role.of]
            unit = shared.unit
            sizes[role.name] = shared if shared.adapter else NetworkSize(shared.base, 0, 0, 0, unit, 0)
    return sizes


def _size(config: RunConfig, role: Role) -> NetworkSize:
    adapters = adapters_of(config, role)
    with torch.device("meta"), _Uninitialised():
        network = build_network(config, role.network, ModelOps(adapters=adapters))
    network.requires_grad_(role.optimizer is not None)
    if role.is_partly_trained:
        train_part(network, role.adapter)
    names = dict(network.named_parameters())
    units = network.units() or [network]
    return NetworkSize(
        base=_elements(p for name, p in names.items() if adapter_of(name) is None),
        adapter=_elements(p for name, p in names.items() if adapter_of(name) == role.name),
        num_adapters=len(adapters.names) if adapters else 0,
        trained=_trained(network),
        unit=max(_elements(unit.parameters()) for unit in units),
        unit_trained=max(_trained(unit) for unit in units),
    )


class _Uninitialised(TorchFunctionMode):
    """Computes no start weights: torch would import for seconds to do nothing on a meta device."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function in (Tensor.uniform_, Tensor.normal_, Tensor.div):
            return arguments[0]
        return (torch.empty if function is torch.randn else function)(*arguments, **(options or {}))


def _trained(module: nn.Module) -> int:
    return _elements(p for p in module.parameters() if p.requires_grad)


def _elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
