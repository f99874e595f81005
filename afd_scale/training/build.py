"""From a config to the objects of a run."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afd_scale.checkpoint.load_student import load_student_state
from afd_scale.checkpoint.run_state import Checkpointed
from afd_scale.codecs.choose import codec_of
from afd_scale.codecs.codec import Codec
from afd_scale.codecs.identity import NAME as IDENTITY
from afd_scale.config import ConfigError, RunConfig
from afd_scale.config.cast import Role
from afd_scale.config.models import WanConfig
from afd_scale.config.run import CodecConfig
from afd_scale.engines.cast import State, build_cast
from afd_scale.engines.sharded import Sharded
from afd_scale.engines.shards import GatherCounter
from afd_scale.methods import make_method
from afd_scale.parallel.ranks import Ranks
from afd_scale.planning.memory import cache_bytes
from afd_scale.planning.workload import workload
from afd_scale.protocols import Method

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What the trainer drives.

    Attributes:
        method: its training step.
        engines: of its cast, by role.
        exported: the policy that is evaluated and exported.
        networks: all that a checkpoint holds, by role.
        counter: of the weights gathered on this rank.
    """

    method: Method
    engines: Mapping[str, Any]
    exported: Any
    networks: Mapping[str, Checkpointed]
    counter: GatherCounter


def build_run(config: RunConfig, ranks: Ranks) -> Run:
    """Networks, engines and method of a run.

    Raises:
        ValueError: start weights cannot be read or do not fit; a kernel or a precision cannot work here.
    """
    load = workload(config, ranks.size)
    cache = cache_bytes(config, load, load.together)
    kind = Sharded(config, ranks, lambda role: _start_weights(role, ranks), cache)
    engines = build_cast(config, kind)
    networks = {role.name: engines[role.name] for role in config.cast if role.changes}
    method = make_method(config, engines, ranks.mean)
    return Run(method, engines, engines[config.method.exported], networks, kind.counter)


def build_codec(section: CodecConfig, name: str, device: torch.device) -> Codec | None:
    """The codec of the data's latents; None, said in the log, where the config names no models for it.

    Args:
        name: in the facts of the data.
    Raises:
        ConfigError: the config names another codec, or models that are not its.
    """
    if name.startswith(section.name):
        return codec_of(name, models=section.models, device=device)
    if section.name == IDENTITY:
        log.info("no videos are shown: latents of %s are decoded by a VAE, and codec.models names none", name)
        return None
    raise ConfigError(f"codec.name ({section.name}) must be {name.partition(':')[0]}, of whose latents the data is")


def _start_weights(role: Role, ranks: Ranks) -> State:
    """On the main rank, an empty dictionary on the others; None to start at random."""
    network = role.network
    if not isinstance(network, WanConfig) or network.weights is None:
        return None
    path = network.weights
    state: dict[str, Tensor] = {}
    ranks.run_on_main(lambda: state.update(load_student_state(path, network, role.section)))
    return state
