"""Engines in plain torch: one device, one process, whole weights; for tests and benchmarks.

They keep no float32 copies of bf16 weights, so long runs in bf16 are not what they are for.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from afd_scale.config import RunConfig
from afd_scale.config.cast import NetworkConfig, Role
from afd_scale.config.models import OptimizerConfig, WanConfig
from afd_scale.engines.cast import Build, State
from afd_scale.layers.attention import choose_backend
from afd_scale.layers.choose_compile import choose_compile
from afd_scale.layers.choose_precision import choose_precision, parameter_dtype
from afd_scale.layers.lora import Adapters, adapter_of
from afd_scale.layers.network import Network
from afd_scale.layers.ops import ModelOps
from afd_scale.protocols import Unwatched, Watch
from afd_scale.types import Videos


class PlainNetwork:
    """A network, seen through one of its adapters.

    Args:
        calls: what is called, `CapturedPasses` say; None is the network.
    """

    network: Any
    calls: Any
    watch: Watch = Unwatched()

    def __init__(
        self, network: nn.Module, adapter: str | None = None, micro_batch: int | None = None, calls: Any = None
    ):  # fmt: skip
        self.network, self.adapter, self.micro_batch, self.calls = network, adapter, micro_batch, calls or network
        self._adapter_option = {} if adapter is None else {"adapter": adapter}

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        return self.calls(*arguments, **options, **self._adapter_option)

    def new_cache(self, frames: int | None) -> Any:
        return self.calls.new_cache(frames)

    def resident(self, sampling: bool = False) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the adapter, or of the base."""
        return (p for name, p in self.network.named_parameters() if adapter_of(name) == self.adapter)


class PlainTrained(PlainNetwork):
    """A network with AdamW on what needs a gradient."""

    def __init__(self, network: nn.Module, optimizer: OptimizerConfig, **options: Any):
        super().__init__(network, **options)
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.norm = optimizer.gradient_norm or float("inf")
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=optimizer.learning_rate, betas=optimizer.betas, eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay, fused=True,
        )  # fmt: skip

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def input_gradient(self, videos: Videos, loss_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        latents = videos.latents.detach().requires_grad_()
        loss = loss_of(self(videos.of(latents)))
        return loss.detach(), torch.autograd.grad(loss, latents)[0]

    def step(self, learning_rate: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.watch.updating(self)
        norm = nn.utils.clip_grad_norm_(self.trained, self.norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


class PlainAverage(PlainNetwork):
    """A frozen network, or adapter, that follows a trained one."""

    @torch.no_grad()
    def follow(self, student: PlainNetwork, decay: float) -> None:
        self.watch.updating(self)
        for ours, theirs in zip(self.parameters(), student.parameters(), strict=True):
            ours.lerp_(theirs, 1 - decay)


class Plain:
    """The plain kind of `cast.Kind`.

    Args:
        load: start weights of a role; None starts all at random.
    """

    def __init__(self, config: RunConfig, device: torch.device, load: Callable[[Role], State] | None = None):
        self.config, self.device = config, device
        self.load = load or (lambda role: None)
        self.precision = choose_precision(
            config.precision, config.fp8_scaling, device, keep_blocks=config.fp8_keep_blocks
        )
        self.dtype = parameter_dtype(config.precision)

    def ops(self, network: NetworkConfig, adapters: Adapters | None) -> ModelOps:
        if not isinstance(network, WanConfig):
            return ModelOps(adapters=adapters)
        head_dim = network.dim // network.num_heads
        backend = choose_backend(self.config.attention, device=self.device, dtype=self.dtype, head_dim=head_dim)
        return ModelOps(self.precision, backend.attend, adapters, choose_compile(self.config.compile, self.device))

    def place(self, build: Build, adapters: Adapters | None, state: State) -> Network:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices), self.device:
            torch.manual_seed(self.config.seed)
            network = build(adapters)
        if state is not None:
            network.load_state_dict(state, strict=False)
        network.to(self.dtype).fuse()
        return network

    def engine(self, role: Role, network: Network) -> PlainNetwork:
        options: dict[str, Any] = {"micro_batch": self.config.train.micro_batch}
        if role.optimizer is not None:
            return PlainTrained(network, role.optimizer, adapter=role.adapter, **options)
        return (PlainAverage if role.follows else PlainNetwork)(network.requires_grad_(False), **options)

    def share(self, role: Role, leader: PlainNetwork) -> PlainNetwork:
        if not role.follows:
            return PlainNetwork(leader.network, role.adapter, leader.micro_batch)
        average = PlainAverage(leader.network, role.name, leader.micro_batch)
        average.follow(leader, 0.0)
        return average
