"""What a piece of torch code asks of a GPU: kernels, bytes that they move, waits of the host, mixed devices.

An operator is one kernel; views and allocations are none. An operator that nobody here has heard of is elementwise: it
reads its inputs and writes its outputs once.
"""

import math
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.budgets.fake_cuda import on_gpu

# Matrix products, convolutions and attention; everything else moves bytes and computes next to nothing.
PRODUCTS = {
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "linear",
    "_scaled_mm",
    "_grouped_mm",
    "convolution",
    "convolution_backward",
}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
UNSAID_VIEWS = {"_unsafe_view"}  # whose schemas do not say so
OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_"}  # what they change, they do not read
COPIES = {"_to_copy", "copy_", "copy"}


@dataclass
class Tally:
    """Of a piece of code.

    Attributes:
        kernels: how often each operator ran.
        moved: bytes that each operator read and wrote.
        syncs: where the host waits for the GPU: operator and line.
        mixed: where an operator has tensors on several devices; copies from one to another are not meant.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)
    syncs: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)

    def __sub__(self, other: "Tally") -> "Tally":
        """What this has and the other has not, negative numbers too; where things happen stays as here."""
        return Tally(
            _added(self.kernels, other.kernels, -1), _added(self.moved, other.moved, -1), self.syncs, self.mixed
        )

    def more(self, other: "Tally", times: int) -> "Tally":
        """This and so many of the other."""
        return Tally(
            _added(self.kernels, other.kernels, times), _added(self.moved, other.moved, times), self.syncs, self.mixed
        )

    @property
    def num_kernels(self) -> int:
        return self.kernels.total()

    @property
    def num_products(self) -> int:
        return sum(count for name, count in self.kernels.items() if is_product(name))

    @property
    def elementwise_gb(self) -> float:
        """All but matrix products and attention, in 1e9 bytes."""
        return sum(size for name, size in self.moved.items() if not is_product(name)) / 1e9

    def words(self, count: int = 10) -> str:
        """Totals and the operators that matter most; for the message of a test that fails."""
        elementwise = Counter({name: size for name, size in self.moved.items() if not is_product(name)})
        lines = [
            f"kernels: {self.num_kernels}, {self.num_products} of them products",
            *(f"    {times:5} {name}" for name, times in self.kernels.most_common(count)),
            f"elementwise GB: {self.elementwise_gb:.2f}",
            *(f"    {size / 1e9:8.2f} {name}" for name, size in elementwise.most_common(count)),
            f"the host waits: {_folded(self.syncs) or 'never'}",
            f"mixed devices: {_folded(self.mixed) or 'nowhere'}",
        ]
        return "\n".join(lines)


def is_product(name: str) -> bool:
    """Of an operator as a tally names it: `aten.addmm`."""
    short = name.rpartition(".")[2]
    return short in PRODUCTS or "attention" in short or "attn" in short


class Counting(TorchDispatchMode):
    """Counts what runs inside: `with Counting() as tally`. Enter it inside of `fake_gpu`."""

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()

    def __enter__(self) -> Tally:
        super().__enter__()
        return self.tally

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        space, _, name = function.name().split(".")[0].partition("::")
        inputs = _tensors((args, kwargs))
        if name not in COPIES and len({x.device.type for x in inputs}) > 1:
            self.tally.mixed.append(f"{name} at {_line()}")
        try:
            result = function(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            return self._without_values(name, inputs, error)
        outputs = _tensors(result)
        if name in COPIES and _waits(inputs, outputs, name, args, kwargs):
            self.tally.syncs.append(f"{name} at {_line()}")
        does_something = outputs or function._schema.is_mutable
        if does_something and space != "prim" and name not in ALLOCATIONS | UNSAID_VIEWS and not function.is_view:
            label = f"{space}.{name}"
            self.tally.kernels[label] += 1
            self.tally.moved[label] += _moved(function, name, args, kwargs, result)
        return result

    def _without_values(self, name: str, inputs: list[Tensor], error: Exception) -> Any:
        """Of an operator whose result only values can tell, which the host has to wait for: goes on where it can."""
        if any(map(on_gpu, inputs)):
            self.tally.syncs.append(f"{name} at {_line()}")
        if name == "equal":
            return True
        if name == "_local_scalar_dense":
            (x,) = inputs
            return 1.0 if x.is_floating_point() else x.dtype == torch.bool or 1
        raise AssertionError(f"{name} at {_line()}: what comes out depends on values, the host waits") from error


def num_bytes(x: Tensor) -> int:
    """Of the elements in memory: a dimension that is broadcast is there once."""
    return math.prod(size for size, step in zip(x.shape, x.stride()) if step) * x.element_size()


def _moved(function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Bytes of an operator; of what it changes, that is read and written, but for what is called out."""
    schema, total = function._schema, 0
    given = [*zip(schema.arguments, args), *((each, kwargs.get(each.name)) for each in schema.arguments[len(args) :])]
    for argument, value in given:
        size = sum(map(num_bytes, _tensors(value)))
        if _is_changed(argument):
            overwritten = name in OVERWRITES or "out" in argument.name.split("_")
            total += size if overwritten else 2 * size
        else:
            total += size
    made = result if isinstance(result, tuple) and len(schema.returns) > 1 else (result,)
    return total + sum(
        num_bytes(x) for each, value in zip(schema.returns, made) if not _is_changed(each) for x in _tensors(value)
    )


def _is_changed(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _waits(inputs: list[Tensor], outputs: list[Tensor], name: str, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Whether the host waits for a copy: for all that it takes from the GPU, for all that it gives and does not say
    non_blocking."""
    source, target = inputs[-1], outputs[0]
    if on_gpu(source) == on_gpu(target):
        return False
    given = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
    return on_gpu(source) or not given


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in _pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _line() -> str:
    """Of the package, where it has part in it."""
    frames = [frame for frame in traceback.extract_stack() if not _is_inner(Path(frame.filename))]
    ours = [frame for frame in frames if "afd_scale" in Path(frame.filename).parts] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"


def _folded(places: list[str]) -> str:
    return ", ".join(f"{times} x {place}" for place, times in Counter(places).items())


def _is_inner(path: Path) -> bool:
    """torch's, or one of those that count."""
    return "torch" in path.parts or (path.parent == Path(__file__).parent and not path.name.startswith("test_"))


def _added(a: Counter[str], b: Counter[str], times: int) -> Counter[str]:
    return Counter({name: total for name in a | b if (total := a[name] + times * b[name])})
