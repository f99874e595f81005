"""What every model tells the engines."""

from torch import nn


class Network(nn.Module):
    """A model that may be sharded."""

    def units(self) -> list[nn.Module]:
        """Modules that run as a whole, whose parameters are gathered in one collective; others are gathered singly.

        Each must have an input with gradient: ZeRO-3 takes the gradient of its inputs for the end of its backward pass.
        """
        return []

    def fuse(self) -> None:
        """Arrange whole weights for passes without gradient: fewer and larger products, the same numbers.

        Parameters may become parts of larger tensors; editing them in place stays possible. Moving, converting or
        loading the network undoes it; a deep copy must be fused anew.
        """

    def starts_anew(self, parameter: str) -> bool:
        """Whether no start weights have this parameter, which is then trained also where adapters are."""
        return False
