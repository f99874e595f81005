"""A policy's plain twin: the same network without DeepSpeed's hooks, its weights whole in buffers of its own.

Half of a small pass is spent in the hooks that DeepSpeed puts on every module, also where all weights are whole. The
twin's weights are gathered at the start of a phase, unit by unit, and stay where they are until its end; beside them a
rank holds no more than one unit.

An adapter may be merged into its base: passes then cost what the base's cost. Merged in bf16, W + s U D would lose what
is smaller than half a unit in the last place of W, always and everywhere: a young adapter would vanish. So the sum is
rounded up or down with the odds of where it lies between the two, by random numbers that are the same on all ranks and
in every phase: the mean over weights is right. Predictions that are compared with the student's keep the adapter apart.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from afd_scale.engines.captured import CapturedPasses, NewCapture
from afd_scale.engines.shards import by_unit, gathered
from afd_scale.layers.lora import FOLDER, adapter_of, merged_weight
from afd_scale.layers.network import Network


class Twin:
    """Called like the network.

    Args:
        build: makes the network, with no adapter but this policy's, and without that where it is merged.
        adapter: of the policy; None is the base.
        sampling: its adapter is merged, and its products are fused. Predictions that are compared with the student's
            come from the same kernels as those.
        capture: replays its cached passes; None runs them as they are.
    """

    def __init__(
        self, build: Callable[[], Network], adapter: str | None, sampling: bool, dtype: torch.dtype,
        capture: NewCapture | None = None,
    ):  # fmt: skip
        with torch.device("meta"):
            self.network: Any = build().to(dtype)
        self.adapter, self.sampling, self.capture = adapter, sampling, capture
        self.calls: Any = self.network

    def __call__(self, *arguments: Any, adapter: str | None = None, **options: Any) -> Tensor:
        prediction: Tensor = self.calls(*arguments, adapter=None if self.sampling else adapter, **options)
        return prediction

    def new_cache(self, frames: int | None) -> Any:
        return self.calls.new_cache(frames)

    @contextmanager
    def filled(self, source: Network, device: torch.device) -> Iterator[None]:
        """While it lasts, the weights are here; on all ranks together.

        Args:
            source: the sharded network, none of whose parameters is whole now.
        """
        try:
            self._allocate(device)
            self._fill(source)
            self.calls = self.network if self.capture is None else CapturedPasses(self.network, self.capture)
            yield
        finally:
            self.calls = self.network
            self.network.to_empty(device="meta")

    def _allocate(self, device: torch.device) -> None:
        """Unit by unit, so that what one lets go of when it is fused is what the next one takes."""
        for unit in self.network.units():
            unit.to_empty(device=device)
            if self.sampling:
                unit.fuse()
        for module in self.network.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.to_empty(device=device, recurse=False)
        self.network.requires_grad_(False)
        if self.sampling:
            self.network.fuse()

    @torch.no_grad()
    def _fill(self, source: Network) -> None:
        ours = dict(self.network.named_parameters())
        wanted = {name: p for name, p in source.named_parameters() if adapter_of(name) in (None, self.adapter)}
        names_of = {parameter: name for name, parameter in wanted.items()}
        for group in by_unit(list(wanted.values()), source.units()):
            with gathered(group):
                for name in (names_of[parameter] for parameter in group):
                    if name in ours:  # not an adapter that is merged
                        ours[name].copy_(self._weight(source, name, wanted[name], ours[name].dtype))

    def _weight(self, source: Network, name: str, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        path, _, kind = name.rpartition(".")
        adapters = getattr(source.get_submodule(path), FOLDER, None)
        if not self.sampling or self.adapter is None or adapters is None or kind != "weight":
            return parameter.data
        adapter = adapters[self.adapter]
        both = merged_weight(parameter.data, adapter.down.data, adapter.up.data, adapter.scale)
        return both if dtype == torch.float32 else round_to_bfloat16(both, seed=zlib.crc32(name.encode()))


def round_to_bfloat16(x: Tensor, seed: int) -> Tensor:
    """float32 to one of the two neighbours in bfloat16, with the odds of where it lies between them."""
    generator = torch.Generator(x.device).manual_seed(seed)
    odds = torch.randint(1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return ((x.view(torch.int32) + odds) & -(1 << 16)).view(torch.float32).bfloat16()
