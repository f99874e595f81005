"""The least that a pass can take: its matrix products and attention calls alone, replayed on tensors that are there."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from afd_scale.layers.attention.operators import is_attention

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_scaled_mm"}  # what linears and matmul come down to
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Floor(TorchDispatchMode):
    """While it is entered, records the products and attention calls of what runs, forward and backward.

    Weights are kept as they are; of activations one copy stands for all of the same shape, strides and dtype.
    Calling it runs all of them again, in their order, products into tensors that are there already. Kernels inside
    `torch.compile` are not seen.

    Args:
        weights: parameters of what will run.

    Attributes:
        calls: operator, arguments and options of each.
    """

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__()
        self.weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self.calls: list[Call] = []
        self.stand_ins: dict[Any, Tensor] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        result = operator(*arguments, **options)
        if is_product(operator) or is_attention(operator):
            arguments, options = tree_map_only(Tensor, self._stand_in, (arguments, options))
            if is_product(operator) and "out" in operator.overloadpacket.overloads() and not options:
                operator, options = operator.overloadpacket.out, {"out": self._stand_in(result, "out")}
            self.calls.append((operator, tuple(arguments), options))
        return result

    @torch.no_grad()
    def __call__(self) -> None:
        for operator, arguments, options in self.calls:
            operator(*arguments, **options)

    def products(self) -> list[tuple[int, ...]]:
        """(rows, inner, columns) of each matrix product, (batch, rows, inner, columns) of batched ones."""
        shapes = []
        for operator, arguments, _ in self.calls:
            if is_product(operator):
                a, b = [x for x in arguments if isinstance(x, Tensor)][-2:]
                shapes.append((*a.shape, b.shape[-1]))
        return shapes

    def _stand_in(self, x: Tensor, use: str = "in") -> Tensor:
        if use == "in" and x.untyped_storage().data_ptr() in self.weights:
            return x.detach()
        key = (use, x.shape, x.stride(), x.dtype, x.device)
        if key not in self.stand_ins:
            self.stand_ins[key] = _copy(x)
        return self.stand_ins[key]


def is_product(operator: Any) -> bool:
    return operator.namespace == "aten" and operator.overloadpacket.__name__ in PRODUCTS


def _copy(x: Tensor) -> Tensor:
    """The same values, and strides where no two elements share a place."""
    x = x.detach()
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        return x.clone()
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def record(run: Callable[[], Any], weights: Iterable[Tensor]) -> Floor:
    """The floor of what a function runs."""
    floor = Floor(weights)
    with floor:
        run()
    assert floor.calls, "no product and no attention was seen"
    return floor
