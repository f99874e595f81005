"""The engines that a method asks for, in plain torch: one device, one process, whole weights."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from afd_scale.config.models import OptimizerConfig
from afd_scale.layers.lora import adapter_of


class PlainNetwork:
    """A network, seen through one of its adapters."""

    network: Any

    def __init__(self, network: nn.Module, adapter: str | None = None):
        self.network, self.adapter = network, adapter

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        if self.adapter is not None:
            options["adapter"] = self.adapter
        output: Tensor = self.network(*arguments, **options)
        return output

    def new_cache(self, frames: int) -> Any:
        return self.network.new_cache(frames)

    def resident(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the adapter, or of the base."""
        return (p for name, p in self.network.named_parameters() if adapter_of(name) == self.adapter)


class PlainTrained(PlainNetwork):
    """A network with AdamW on what needs a gradient."""

    def __init__(self, network: nn.Module, optimizer: OptimizerConfig, adapter: str | None = None):
        super().__init__(network, adapter)
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.norm = optimizer.gradient_norm or float("inf")
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=optimizer.learning_rate, betas=optimizer.betas, eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay, fused=True,
        )  # fmt: skip

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = nn.utils.clip_grad_norm_(self.trained, self.norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


class PlainAverage(PlainNetwork):
    """A frozen network, or adapter, that follows a trained one."""

    @torch.no_grad()
    def follow(self, student: PlainNetwork, decay: float) -> None:
        for ours, theirs in zip(self.parameters(), student.parameters(), strict=True):
            ours.lerp_(theirs, 1 - decay)
