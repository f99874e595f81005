"""Networks sharded by DeepSpeed ZeRO-3: trained ones, and frozen ones that may follow a trained one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param, set_z3_leaf_module
from safetensors.torch import load_file, save_file
from torch import Tensor

from afd_scale.config import RunConfig
from afd_scale.config.models import OptimizerConfig
from afd_scale.layers.network import Network
from afd_scale.parallel.deepspeed_config import deepspeed_config


def build_sharded(config: RunConfig, build: Callable[[], Network], state: dict[str, Tensor] | None) -> Network:
    """Construct a network shard by shard, so that no rank ever holds all of it, and fill it.

    Args:
        build: makes the network; its random numbers come from a generator seeded with config.seed, alike on all ranks.
        state: weights by parameter name (needed on the main rank only), or None to keep the initial ones.
    """
    # No dtype argument: DeepSpeed 0.19 takes bf16 for any that is given where the accelerator has no fp16. It follows
    # the configuration when none is.
    sharding = deepspeed.zero.Init(config_dict_or_path=deepspeed_config(config), mem_efficient_linear=False)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), sharding:
        torch.manual_seed(config.seed)
        network = build()
    for unit in network.units():
        set_z3_leaf_module(unit, True)
    if state is not None:
        for name, parameter in network.named_parameters():
            with GatheredParameters([parameter], modifier_rank=0):
                if torch.distributed.get_rank() == 0:
                    parameter.data.copy_(state[name])
    return network


class ShardedNetwork:
    """A network behind a DeepSpeed engine; calls go through it, so that shards are gathered and released."""

    def __init__(self, engine: Any):
        self.engine = engine

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        return self.engine(*arguments, **options)

    def new_cache(self, frames: int) -> Any:
        return self.engine.module.new_cache(frames)

    @property
    def parameters(self) -> list[Any]:
        """ZeRO-3 parameters: `ds_tensor` is this rank's shard."""
        return list(self.engine.module.parameters())


class TrainedNetwork(ShardedNetwork):
    """A network with its optimizer."""

    def __init__(self, config: RunConfig, network: Network, optimizer: OptimizerConfig):
        torch_optimizer = torch.optim.AdamW(
            network.parameters(), lr=optimizer.learning_rate, betas=optimizer.betas,
            eps=optimizer.epsilon, weight_decay=optimizer.weight_decay, fused=True,
        )  # fmt: skip
        engine, *_ = deepspeed.initialize(
            model=network, optimizer=torch_optimizer,
            config=deepspeed_config(config, gradient_norm=optimizer.gradient_norm),
        )  # fmt: skip
        super().__init__(engine)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, learning_rate: float) -> Tensor:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.zeros(()) if norm is None else torch.as_tensor(norm)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole float32 weight of each parameter, one at a time; on all ranks together."""
        for name, parameter in self.engine.module.named_parameters():
            yield name, safe_get_full_fp32_param(parameter)

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag="engine", save_latest=False)

    def load(self, folder: Path) -> None:
        self.engine.load_checkpoint(str(folder), tag="engine", load_lr_scheduler_states=False)


class FrozenNetwork(ShardedNetwork):
    """A network without optimizer, sharded like the trained ones."""

    def __init__(self, config: RunConfig, network: Network):
        network.requires_grad_(False)
        network.eval()
        engine, *_ = deepspeed.initialize(model=network, config=deepspeed_config(config, frozen=True))
        super().__init__(engine)


class AverageNetwork(FrozenNetwork):
    """A frozen network whose shards are a running average of a trained one's.

    The average is kept in float32 beside bf16 shards: a small step would vanish in bf16.
    """

    def __init__(self, config: RunConfig, network: Network):
        super().__init__(config, network)
        self.shards: list[Tensor] = [p.ds_tensor.detach().float() for p in self.parameters]  # float32: no copy

    @torch.no_grad()
    def follow(self, trained: ShardedNetwork, decay: float) -> None:
        """weights <- decay weights + (1 - decay) trained weights, on this rank's shards."""
        for shard, source in zip(self.shards, trained.parameters, strict=True):
            shard.lerp_(safe_get_local_fp32_param(source).view_as(shard), 1 - decay)
        self._write_shards()

    def _write_shards(self) -> None:
        # Whole copies that a forward pass may have left behind would hide the new shards. Not by the engine's method of
        # the same name, which also collects garbage and empties the allocator.
        self.engine.optimizer.empty_partition_cache()
        for shard, parameter in zip(self.shards, self.parameters, strict=True):
            parameter.ds_tensor.copy_(shard)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole float32 average of each parameter, one at a time; on all ranks together."""
        for (name, parameter), shard in zip(self.engine.module.named_parameters(), self.shards, strict=True):
            shards = [torch.empty_like(shard) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(shards, shard)
            yield name, torch.cat(shards)[: parameter.ds_numel].view(parameter.ds_shape)

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_file(self._named_shards(), self._file(folder))

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        saved = load_file(self._file(folder))
        for name, shard in self._named_shards().items():
            shard.copy_(saved[name])
        self._write_shards()

    def _named_shards(self) -> dict[str, Tensor]:
        """This rank's float32 shards by parameter name."""
        names = [name for name, _ in self.engine.module.named_parameters()]
        return dict(zip(names, self.shards, strict=True))

    @staticmethod
    def _file(folder: Path) -> Path:
        return folder / f"rank_{torch.distributed.get_rank():05d}.safetensors"
