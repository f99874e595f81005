"""What every model tells the engines."""

from collections.abc import Iterable

from torch import Tensor, nn


class Network(nn.Module):
    """A model that may be sharded."""

    def units(self) -> list[nn.Module]:
        """Modules that run as a whole, whose parameters are gathered in one collective; others are gathered singly.

        Each must have an input with gradient: ZeRO-3 takes the gradient of its inputs for the end of its backward pass.
        """
        return []

    def borrow(self, weights: Iterable[Tensor]) -> None:
        """Compute with other tensors as parameters, one for each in their order, without gradient."""
        own = [(module, name) for module in self.modules() for name, _ in module.named_parameters(recurse=False)]
        for (module, name), weight in zip(own, weights, strict=True):
            setattr(module, name, nn.Parameter(weight, requires_grad=False))

    def starts_anew(self, parameter: str) -> bool:
        """Whether no start weights have this parameter, which is then trained also where adapters are."""
        return False
