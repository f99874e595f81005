"""Low-rank adapters: one frozen linear, several named small ones beside it, and a caller who says which counts.

    y = W x + b + alpha / rank  up (down x)

`up` starts at zero, so a new adapter changes nothing. A policy is a base and the name of an adapter, or None for the
base itself; the name travels down to the linear as an argument and nothing remembers it.

Source: LoRA, arXiv:2106.09685.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOLDER = "adapters"  # of a linear's children; what a parameter's name has before the adapter's


@dataclass(frozen=True)
class Adapters:
    """The adapters that every linear of a network gets.

    Attributes:
        names: of the policies that share the base.
        rank: width of the bottleneck.
        scale: alpha / rank.
    """

    names: tuple[str, ...]
    rank: int
    scale: float

    def attach(self, linear: nn.Module, in_features: int, out_features: int) -> None:
        """Put the adapters beside a linear's weight, which they leave as it is, name and all."""
        adapters = {name: Adapter(in_features, out_features, self.rank, self.scale) for name in self.names}
        linear.add_module(FOLDER, nn.ModuleDict(adapters))

    def insert(self, linear: nn.Linear) -> None:
        """The same into a linear that code of others calls: it adds the adapter, the only one, by itself."""
        (name,) = self.names
        self.attach(linear, linear.in_features, linear.out_features)
        linear.register_forward_hook(lambda module, inputs, y: getattr(module, FOLDER)[name](inputs[0], y))


class Adapter(nn.Module):
    """One low-rank product."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y and the adapter's product of x."""
        return self.add(y, F.linear(x, self.down))

    def add(self, y: Tensor, down_x: Tensor) -> Tensor:
        """y and the adapter's product of what its first half has made of x."""
        return torch.addmm(
            y.flatten(0, -2), down_x.flatten(0, -2).to(y.dtype), self.up.T, alpha=self.scale
        ).unflatten(0, y.shape[:-1])  # fmt: skip


def adapted(linear: nn.Module, x: Tensor, adapter: str | None) -> Tensor:
    """A linear with the named one of its adapters; with none where `adapter` is None."""
    y: Tensor = linear(x)
    return y if adapter is None else getattr(linear, FOLDER)[adapter](x, y)


def add_together(
    linears: Sequence[nn.Module], x: Tensor, products: Sequence[Tensor], adapter: str | None
) -> Sequence[Tensor]:
    """Several linears' products of one input, each with its adapter's: the first halves of these are one product."""
    if adapter is None:
        return products
    adapters = [getattr(linear, FOLDER)[adapter] for linear in linears]
    downs = F.linear(x, torch.cat([each.down for each in adapters])).split([len(each.down) for each in adapters], -1)
    return [each.add(y, down_x) for each, y, down_x in zip(adapters, products, downs, strict=True)]


def merged_weight(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """A linear's weight with an adapter's product added, in float32."""
    return torch.addmm(weight.float(), up.float(), down.float(), alpha=scale)


def adapter_of(parameter_name: str) -> str | None:
    """The adapter that a parameter belongs to, by its name; None for a parameter of the base."""
    parts: Sequence[str] = parameter_name.split(".")
    return parts[parts.index(FOLDER) + 1] if FOLDER in parts else None
