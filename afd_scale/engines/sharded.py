"""Engines sharded by DeepSpeed ZeRO-3: trained ones, and frozen ones, which may be adapters of a trained one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_module,
)
from torch import Tensor

from afd_scale.config import RunConfig
from afd_scale.config.models import OptimizerConfig
from afd_scale.engines.captured import NewCapture
from afd_scale.engines.cast import State
from afd_scale.engines.deepspeed_config import deepspeed_config
from afd_scale.engines.resharding import SavedShards, Shards, snapshot
from afd_scale.engines.shards import Residency, kept_whole, merged_weights, unreduced, whole_weight
from afd_scale.engines.twin import Twin
from afd_scale.layers.lora import FOLDER, adapter_of
from afd_scale.layers.network import Network
from afd_scale.parallel.sharing import share_videos
from afd_scale.protocols import Unwatched, Watch
from afd_scale.types import Videos

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")  # what is saved of a trained parameter
_NVME_TAG = "engine"


def build_sharded(config: RunConfig, build: Callable[[], Network], state: State) -> Network:
    """Construct a network shard by shard, so that no rank ever holds all of it, and fill it.

    Args:
        build: makes the network; its random numbers come from a generator seeded with config.seed, alike on all ranks.
        state: weights by parameter name (needed on the main rank only), or None to keep the initial ones; a parameter
            that it lacks keeps its initial weight.
    """
    # No dtype argument: DeepSpeed 0.19 takes bf16 for any that is given where the accelerator has no fp16. It follows
    # the configuration when none is.
    settings = deepspeed_config(config, ranks=dist.get_world_size())
    sharding = deepspeed.zero.Init(config_dict_or_path=settings, mem_efficient_linear=False)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), sharding:
        torch.manual_seed(config.seed)
        network = build()
    for unit in network.units():
        set_z3_leaf_module(unit, True)
    if state is not None:
        for name, parameter in network.named_parameters():
            with GatheredParameters([parameter], modifier_rank=0):
                if name in state:
                    parameter.data.copy_(state[name])
    return network


class ShardedNetwork:
    """A network behind a DeepSpeed engine; calls go through it, so that shards are gathered and released.

    Args:
        adapter: that counts in its passes; None is the weights themselves.
        residency: of its weights during phases without gradient; None keeps them sharded.
        sharing: ranks that hold the same videos, each of which judges its part of them; None where each judges all.
        micro_batch: videos that pass through together; None is all.
        build: makes the network again with one of its adapters, or none, for a plain twin; None has no twin.
        capture: of the twin's cached passes.
    """

    watch: Watch = Unwatched()
    on_nvme = False

    def __init__(
        self, engine: Any, adapter: str | None = None, residency: Residency | None = None,
        micro_batch: int | None = None, build: Callable[[str | None], Network] | None = None,
        capture: NewCapture | None = None, sharing: dist.ProcessGroup | None = None,
    ):  # fmt: skip
        self.sharing = sharing
        self.engine, self.adapter, self.residency, self.micro_batch = engine, adapter, residency, micro_batch
        self._adapter_option = {} if adapter is None else {"adapter": adapter}
        self._build, self._capture, self._calls = build, capture, engine
        self._twins: dict[bool, Twin] = {}
        self._all = list(self.network.parameters())

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        return self._run(self._calls, *arguments, **options)

    def _run(self, calls: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
        if self.sharing is None:
            return calls(*arguments, **options, **self._adapter_option)
        (videos,) = arguments
        return share_videos(videos, lambda own: calls(own, **self._adapter_option), self.sharing)

    def new_cache(self, frames: int | None) -> Any:
        calls: Any = self.network if self._calls is self.engine else self._calls
        return calls.new_cache(frames)

    @property
    def network(self) -> Network:
        return self.engine.module

    def parameters(self, adapter: str | None) -> dict[str, Any]:
        """ZeRO-3 parameters of one adapter, or of the base, by name."""
        return {name: p for name, p in self.network.named_parameters() if adapter_of(name) == adapter}

    @contextmanager
    def resident(self, sampling: bool = False) -> Iterator[None]:
        """While it lasts, weights stay whole here if so configured; without gradient, on all ranks together.

        Args:
            sampling: the adapter may be merged into its base.
        """
        self.release()
        if self.residency is None or not self.residency.gathers(self._kept()):
            yield
        elif self._build is None:
            with kept_whole(self._all, self.network.units()):
                yield
        else:
            twin = self._twin(sampling)
            with twin.filled(self.network, torch.device(get_accelerator().current_device_name())):
                self._calls = twin
                try:
                    yield
                finally:
                    self._calls = self.engine
        self.release()

    def _kept(self) -> list[Any]:
        """What is whole in such a phase: in a twin, no adapters of others."""
        own = (p for name, p in self.network.named_parameters() if adapter_of(name) in (None, self.adapter))
        return self._all if self._build is None else list(own)

    def _twin(self, sampling: bool) -> Twin:
        if sampling not in self._twins:
            assert self._build is not None
            network = partial(self._build, None if sampling else self.adapter)
            self._twins[sampling] = Twin(network, self.adapter, sampling, self._all[0].dtype, self._capture)
        return self._twins[sampling]

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole float32 weight of each parameter, the adapter merged; on all ranks together."""
        return merged_weights(self.network, self.adapter, self._whole)

    def adapter_weights(self) -> Iterator[tuple[str, Tensor]]:
        """`LINEAR.down` and `LINEAR.up` of each adapter of this role, whole and float32; on all ranks together."""
        for name, parameter in self.parameters(self.adapter).items():
            yield name.replace(f".{FOLDER}.{self.adapter}.", "."), self._whole(name, parameter)

    def _whole(self, name: str, parameter: Any) -> Tensor:
        """The whole float32 weight of a named parameter; on all ranks together."""
        return whole_weight(parameter)

    def release(self) -> None:
        """Let go of whole copies that passes have left behind for reuse, and of those fetched ahead."""
        # Not by the engine's method of the same name, which also collects garbage and empties the allocator.
        self.engine.optimizer.empty_partition_cache()


class TrainedNetwork(ShardedNetwork):
    """A network with its optimizer; what needs no gradient is frozen.

    Args:
        sequence_group: of the ranks that share a video; None where each has its own.
    """

    def __init__(
        self, config: RunConfig, network: Network, optimizer: OptimizerConfig,
        sequence_group: dist.ProcessGroup | None = None, **options: Any,
    ):  # fmt: skip
        trained = [p for p in network.parameters() if p.requires_grad]
        torch_optimizer = torch.optim.AdamW(
            trained, lr=optimizer.learning_rate, betas=optimizer.betas,
            eps=optimizer.epsilon, weight_decay=optimizer.weight_decay, fused=True,
        )  # fmt: skip
        norm, ranks = optimizer.gradient_norm, dist.get_world_size()
        partly = any(not p.requires_grad for p in network.parameters())
        engine, *_ = deepspeed.initialize(
            model=network, optimizer=torch_optimizer,
            config=deepspeed_config(config, ranks=ranks, gradient_norm=norm, edited=partly),
        )  # fmt: skip
        super().__init__(engine, **options)
        self.sequence_group = sequence_group

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def input_gradient(self, videos: Videos, loss_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Of this rank's videos; on all ranks together."""
        latents = videos.latents.detach().requires_grad_()
        with unreduced(self.network.units()):
            # Not through the engine, which takes what follows its forward pass for a backward pass of the weights.
            loss = loss_of(self._run(self.network, videos.of(latents)))
            (gradient,) = torch.autograd.grad(loss, latents)
        self.release()
        if self.sequence_group is not None:
            # Each rank has what the sum of the ranks' losses, all the same, says of its own tokens.
            dist.all_reduce(gradient, group=self.sequence_group)
            gradient /= dist.get_world_size(self.sequence_group)
        return loss.detach(), gradient

    def step(self, learning_rate: float) -> Tensor:
        """As the protocol says; on all ranks alike nothing changes where the gradient's norm is not finite."""
        self.watch.updating(self)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        if self.engine.optimizer.overflow:  # DeepSpeed's word for it, whatever the precision
            self.watch.skipping(self)
        get_accelerator().synchronize()  # a stream of its own gathers, and does not wait for the new weights
        self.release()
        norm = self.engine.get_global_grad_norm()
        return torch.zeros(()) if norm is None else torch.as_tensor(norm)

    def trained(self) -> dict[str, Any]:
        """ZeRO-3 parameters that the optimizer steps, by name."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def snapshot(self, folder: Path) -> Shards:
        """This rank's shards of weights and optimizer; frozen weights are the start's, a run builds them again.

        Args:
            folder: optimizer states on NVMe are written into it at once, on all ranks together.
        """
        if self.on_nvme:
            self.engine.save_checkpoint(str(folder), tag=_NVME_TAG, save_latest=False, exclude_frozen_parameters=True)
            # DeepSpeed puts scripts beside it that unpickle; the weights lie in safetensors next door.
            for script in ("zero_to_fp32.py", "zero_to_torch.py"):
                (folder / script).unlink(missing_ok=True)
        return snapshot(self._saved_shards(), optimizer_steps=self._optimizer_steps(), nvme=self.on_nvme)

    def _saved_shards(self) -> Iterator[tuple[str, Tensor]]:
        """One at a time on the device; before the first step moments are zeros, which AdamW makes in it."""
        begun = self._optimizer_steps() > 0
        for name, parameter in self.trained().items():
            weight = safe_get_local_fp32_param(parameter)
            yield f"{WEIGHT}/{name}", weight
            for moment in () if self.on_nvme else MOMENTS:
                state = safe_get_local_optimizer_state(parameter, moment) if begun else torch.zeros_like(weight)
                yield f"{moment}/{name}", state

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """What any number of ranks saved, or with optimizer states on NVMe as many.

        Raises:
            ValueError: files are absent or damaged, or of another network.
        """
        rank, ranks = dist.get_rank(), dist.get_world_size()
        with SavedShards(folder, first=rank) as saved:
            self._check_nvme(folder, saved.facts, ranks)
            if self.on_nvme:
                self.engine.load_checkpoint(str(folder), tag=_NVME_TAG, load_lr_scheduler_states=False,
                                            load_module_strict=False)  # fmt: skip
                return
            self._begin_optimizer(saved.facts["optimizer_steps"])
            for name, parameter in self.trained().items():
                weight = saved.part(f"{WEIGHT}/{name}", parameter.ds_numel, rank, ranks)
                safe_set_local_fp32_param(parameter, weight)
                parameter.ds_tensor.copy_(weight)  # what passes gather; DeepSpeed sets the optimizer's copy alone
                for moment in MOMENTS:
                    part = saved.part(f"{moment}/{name}", parameter.ds_numel, rank, ranks)
                    safe_set_local_optimizer_state(parameter, part, moment)
        self.release()
        get_accelerator().synchronize()

    def _check_nvme(self, folder: Path, facts: dict[str, Any], ranks: int) -> None:
        if facts["nvme"] != self.on_nvme:
            there, here = ("", " not") if facts["nvme"] else (" not", "")
            raise ValueError(f"engine.offload_optimizer must{there} be nvme, as when {folder} was written: it is{here}")
        if self.on_nvme and facts["ranks"] != ranks:
            raise ValueError(f"ranks ({ranks}) must be {facts['ranks']}, as when {folder} was written: states on "
                             "nvme are files of one rank each")  # fmt: skip

    @property
    def on_nvme(self) -> bool:  # type: ignore[override]
        """Whether optimizer states are in files, which DeepSpeed (0.19) lets nobody else fill."""
        return bool(self.engine.optimizer.swap_optimizer)

    def _optimizer_steps(self) -> float:
        """Of AdamW, for its bias correction; 0 before the first."""
        states = self.engine.optimizer.optimizer.state
        return max((float(state["step"]) for state in states.values() if "step" in state), default=0.0)

    def _begin_optimizer(self, steps: float) -> None:
        """Give AdamW the states that it would make in its first step."""
        optimizer = self.engine.optimizer
        for flat in optimizer.fp32_partitioned_groups_flat:
            optimizer.optimizer.state[flat] = {
                "step": torch.tensor(steps, dtype=torch.float32, device=flat.device),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }


class AveragedPolicy(ShardedNetwork):
    """A frozen policy whose shards are a running average of a trained network's: of its weights, or of its adapter.

    It is kept in float32 beside bf16 shards: a small step would vanish in bf16.
    """

    def __init__(self, engine: Any, adapter: str | None = None, **options: Any):
        super().__init__(engine, adapter, **options)
        self.averaged = self.parameters(adapter)
        self.shards = {name: p.ds_tensor.detach().float() for name, p in self.averaged.items()}  # float32: no copy

    @torch.no_grad()
    def follow(self, trained: ShardedNetwork, decay: float) -> None:
        """weights <- decay weights + (1 - decay) trained weights, on this rank's shards."""
        self.watch.updating(self)
        for shard, source in zip(self.shards.values(), trained.parameters(trained.adapter).values(), strict=True):
            shard.lerp_(safe_get_local_fp32_param(source).view_as(shard).to(shard.device), 1 - decay)
        self._write()

    def _write(self) -> None:
        """Let passes gather the average."""
        self.release()  # whole copies would hide new shards
        for name, parameter in self.averaged.items():
            parameter.ds_tensor.copy_(self.shards[name])
        get_accelerator().synchronize()  # a stream of its own gathers, and does not wait for the new weights

    def _whole(self, name: str, parameter: Any) -> Tensor:
        if name not in self.averaged:
            return whole_weight(parameter)
        # Parameters may be offloaded; collectives run on the device.
        shard = self.shards[name].to(get_accelerator().current_device_name())
        shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
        dist.all_gather(shards, shard)
        return torch.cat(shards)[: parameter.ds_numel].view(parameter.ds_shape)

    def snapshot(self, folder: Path) -> Shards:
        return snapshot(self.shards.items())

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        with SavedShards(folder, first=rank) as saved:
            for name, shard in self.shards.items():
                shard.copy_(saved.part(name, self.averaged[name].ds_numel, rank, ranks))
        self._write()


def freeze(config: RunConfig, network: Network) -> Any:
    """The engine of a network without optimizer, sharded like the trained ones."""
    network.requires_grad_(False)
    network.eval()
    settings = deepspeed_config(config, ranks=dist.get_world_size(), frozen=True)
    engine, *_ = deepspeed.initialize(model=network, config=settings)
    return engine
