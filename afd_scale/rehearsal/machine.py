"""What a machine lacks of what a run needs: the run without it, and in words what is then not rehearsed."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from afd_scale.config import RunConfig
from afd_scale.layers.fp8_emulated import TILINGS
from afd_scale.rehearsal.shrink import Layout

GPUS_OF_NODE = 8


@dataclass(frozen=True)
class Machine:
    """Where a rehearsal takes place.

    Attributes:
        cores: that this process may use.
        gpus: CUDA devices.
    """

    cores: int
    gpus: int

    @classmethod
    def this_one(cls) -> "Machine":
        return cls(len(os.sched_getaffinity(0)), torch.cuda.device_count())

    @property
    def ranks(self) -> int:
        """As many as it bears: one a GPU, or one a core, of which two can share one."""
        return self.gpus or max(2, self.cores)


def adapt(config: RunConfig, machine: Machine) -> RunConfig:
    """The run with what this machine has: another precision, kernel or tracker where it must be."""
    tree = config.model_dump(mode="json")
    tree["requires"] = None
    tree["train"] |= {"stop_on_alarm": [], "trackers": ["tensorboard"]}
    engine: dict[str, Any] = tree["engine"]
    if engine["offload_optimizer"] == "nvme":
        engine |= {"offload_optimizer": "cpu", "nvme_path": None}
    if not machine.gpus:
        if config.precision == "fp8" and config.fp8_scaling not in TILINGS:
            tree["fp8_scaling"] = "current"
        if config.attention != "sdpa":
            tree["attention"] = "auto"
        tree["compile"] = False if config.compile is True else config.compile
        tree["rollout"]["graphs"] = "auto" if config.rollout.graphs is True else config.rollout.graphs
    return RunConfig.model_validate(tree)


def not_rehearsed(config: RunConfig, machine: Machine, full: Layout, small: Layout) -> Iterator[str]:
    """What a rehearsal leaves open, a line each; the first is always there.

    Args:
        config: as it runs on the cluster.
        full, small: how it runs there and here.
    """
    yield "real sizes: memory, speed, what large numbers do; that the student learns something"
    if small != full:
        yield f"{full}: {small} here"
    if full.ranks > GPUS_OF_NODE:
        yield "several machines: ssh or SLURM, a run folder that all nodes see, the network between them"
    if not machine.gpus:
        yield from _of_gpus(config)
    if config.engine.offload_optimizer == "nvme":
        yield f"optimizer states on nvme ({config.engine.nvme_path}): they are offloaded to the CPU here"
    if config.requires is not None:
        yield f"the run that it requires ({config.requires}): rehearse that one's config"
    if config.train.stop_on_alarm:
        yield f"train.stop_on_alarm ({', '.join(config.train.stop_on_alarm)}): noise raises alarms"
    for name in sorted(set(config.train.trackers) - {"tensorboard"}):
        yield f"train.trackers ({name}): nothing is sent"


def _of_gpus(config: RunConfig) -> Iterator[str]:
    yield "NCCL: gloo here"
    if config.precision == "fp8":
        changed = "" if config.fp8_scaling in TILINGS else ", with scaling current"
        yield f"Transformer Engine's FP8 ({config.fp8_scaling}): emulated by rounding here{changed}"
    yield f"attention kernels of a GPU (attention: {config.attention}): torch's own for a CPU here"
    if config.rollout.graphs is not False:
        yield f"CUDA graphs (rollout.graphs: {str(config.rollout.graphs).lower()})"
    if config.compile is not False:
        yield f"compiled blocks (compile: {str(config.compile).lower()})"
