"""Operations on ZeRO-3 shards: count what is gathered, keep weights whole for a while, give them whole.

A ZeRO-3 parameter has `ds_tensor` (this rank's shard, padded), `ds_numel` and `ds_shape` (of the whole).
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from afd_scale.layers.lora import FOLDER, adapter_of, merged_weight

log = logging.getLogger(__name__)

_RESIDENT = "resident"  # stands among the modules that are using a parameter, so that none of them releases it
_HEADROOM = 1.2  # what a rollout takes besides weights and cache: activations of a chunk, text, fragmentation


class GatherCounter:
    """Bytes of weights that this rank has made whole, its own shards included.

    Every gather of DeepSpeed's hooks and of ours goes through the parameter's own `all_gather_coalesced`.
    """

    def __init__(self) -> None:
        self.bytes = 0

    def watch(self, parameters: Iterable[Any]) -> None:
        for parameter in parameters:
            parameter.all_gather_coalesced = self._counted(parameter.all_gather_coalesced)

    def _counted(self, gather: Callable[..., Any]) -> Callable[..., Any]:
        def gather_and_count(parameters: Iterable[Any], *arguments: Any, **options: Any) -> Any:
            parameters = list(parameters)
            self.bytes += whole_bytes(parameters)
            return gather(parameters, *arguments, **options)

        return gather_and_count


def whole_bytes(parameters: Iterable[Any]) -> int:
    """Bytes of parameters that are whole."""
    return sum(p.ds_numel * p.ds_tensor.element_size() for p in parameters)


class Residency:
    """Whether a policy's weights stay whole on every rank during a phase without gradient.

    Args:
        choice: `sharded`, `gathered` or `auto`, which gathers where it fits on all ranks, decided at the first phase.
        cache_bytes: of a rank's KV cache.
        ranks_of_machine: that share a CPU's memory.
        any_rank: whether a condition holds on some rank, the same answer on all.
    """

    def __init__(self, choice: str, cache_bytes: int, ranks_of_machine: int, any_rank: Callable[[bool], bool]):
        self.choice, self.decision, self.cache_bytes = choice, None if choice == "auto" else choice, cache_bytes
        self.ranks_of_machine, self.any_rank = ranks_of_machine, any_rank

    def gathers(self, parameters: Sequence[Any]) -> bool:
        """The decision; a collective the first time."""
        if self.decision is None:
            needed = _HEADROOM * (whole_bytes(parameters) + self.cache_bytes)
            fits = not self.any_rank(needed > _free_bytes(self.ranks_of_machine))
            self.decision = "gathered" if fits else "sharded"
            log.info("rollout.weights auto: %s (weights and KV cache take %.3g GiB)", self.decision, needed / 2**30)
        return self.decision == "gathered"


def by_unit(parameters: Sequence[Any], units: Iterable[nn.Module]) -> list[list[Any]]:
    """Parameters that are gathered together: those of each unit, then all others."""
    left = dict.fromkeys(parameters)
    groups = []
    for unit in units:
        groups.append([p for p in unit.parameters() if p in left])
        for parameter in groups[-1]:
            del left[parameter]
    return [group for group in (*groups, list(left)) if group]


@contextmanager
def gathered(parameters: Sequence[Any]) -> Iterator[None]:
    """Make parameters whole, to be read; on all ranks together. None of them is whole now."""
    parameters[0].all_gather_coalesced(parameters).wait()
    try:
        yield
    finally:
        parameters[0].partition(param_list=list(parameters), has_been_updated=False)


@contextmanager
def kept_whole(parameters: Sequence[Any], units: Iterable[nn.Module]) -> Iterator[None]:
    """Gather parameters once and keep them whole until the end, whatever passes run meanwhile; on all ranks together.

    Args:
        parameters: none of which is whole now.
        units: whose parameters are gathered together, which bounds the buffers.
    """
    for group in by_unit(parameters, units):
        group[0].all_gather_coalesced(group).wait()
    for parameter in parameters:
        parameter.ds_active_sub_modules.add(_RESIDENT)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.ds_active_sub_modules.discard(_RESIDENT)
        parameters[0].partition(param_list=list(parameters), has_been_updated=False)


@contextmanager
def unreduced(units: Iterable[nn.Module]) -> Iterator[None]:
    """Passes through leaf modules whose backward leaves the gradients of their weights alone.

    DeepSpeed (0.19) hooks a leaf module's backward: gradients that are not there it takes for zeros, and reduces them.
    """
    hooks = [unit._backward_hooks for unit in units]
    kept = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, old in zip(hooks, kept, strict=True):
            each.update(old)


def whole_weight(parameter: Any) -> Tensor:
    """A parameter's whole float32 weight: the optimizer's where it is trained; on all ranks together."""
    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter)
    with GatheredParameters([parameter]):
        return parameter.data.float().clone()


def merged_weights(
    network: nn.Module, adapter: str | None, whole: Callable[[str, Any], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Name and whole float32 weight of each parameter of the base, the adapter's product added; one at a time.

    Args:
        whole: the whole weight of a named parameter; on all ranks together.
    """
    for name, parameter in network.named_parameters():
        if adapter_of(name) is not None:
            continue
        weight = whole(name, parameter)
        path, _, kind = name.rpartition(".")
        adapters = getattr(network.get_submodule(path), FOLDER, None)
        if adapter is not None and adapters is not None and kind == "weight":
            product = adapters[adapter]
            down, up = (whole(f"{path}.{FOLDER}.{adapter}.{side}", getattr(product, side)) for side in ("down", "up"))
            weight = merged_weight(weight, down.to(weight), up.to(weight), product.scale)
        yield name, weight


def _free_bytes(ranks_of_machine: int) -> float:
    """What this rank may still allocate."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return float(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    return float(psutil.virtual_memory().available / ranks_of_machine)
