"""From a config to the objects of a run."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afd_scale.checkpoint.adapters import Base, describe_base
from afd_scale.checkpoint.formats.vlm import Answers, load_vlm_state
from afd_scale.checkpoint.lazy import LazyState, in_memory
from afd_scale.checkpoint.load_student import load_lora_state, load_student_state, read_student
from afd_scale.checkpoint.run_state import Checkpointed
from afd_scale.codecs.choose import codec_of
from afd_scale.codecs.codec import Codec
from afd_scale.codecs.identity import NAME as IDENTITY
from afd_scale.config import ConfigError, RunConfig
from afd_scale.config.cast import Role
from afd_scale.config.judges import VlmDiscriminatorConfig
from afd_scale.config.models import WanConfig
from afd_scale.config.run import CodecConfig
from afd_scale.engines.cast import State, build_cast
from afd_scale.engines.sharded_kind import Sharded
from afd_scale.engines.shards import GatherCounter
from afd_scale.layers.choose_precision import parameter_dtype
from afd_scale.layers.lora import FOLDER
from afd_scale.layers.ops import ModelOps
from afd_scale.methods import make_method
from afd_scale.models.build import adapters_of, check_files
from afd_scale.models.vlm import VlmDiscriminator
from afd_scale.parallel.ranks import Ranks
from afd_scale.planning.memory import cache_bytes
from afd_scale.planning.workload import Workload, workload
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
    ranks.run_on_all(check_files, config)
    load = workload(config, ranks.size)
    _warn_of_sight(config, load, ranks)
    cache = cache_bytes(config, load, load.together, load.rollout_frames)
    kind = Sharded(config, ranks, lambda role: _start_weights(config, role, ranks), cache)
    engines = build_cast(config, kind)
    networks = {role.name: engines[role.name] for role in config.cast if role.changes}
    method = make_method(config, engines, ranks.mean)
    return Run(method, engines, engines[config.method.exported], networks, kind.counter)


def _warn_of_sight(config: RunConfig, load: Workload, ranks: Ranks) -> None:
    """Of a policy that rolls out further than it was trained to see."""
    window, seen = config.sampler.window_frames, config.data.latent_frames
    if load.rollout_frames > seen and (window is None or window > seen):
        ranks.run_on_main(
            log.warning, "sampler.window_frames (%s) is more than data.latent_frames (%d): in rollouts of %d latent "
            "frames a chunk sees more of its past than in the teacher's videos", window, seen, load.rollout_frames,
        )  # fmt: skip


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


def base_of(config: RunConfig) -> Base | None:
    """What a checkpoint's adapters are of; None where it holds whole weights: without LoRA, or over a random start."""
    student = config.student
    if student.lora is None or student.weights is None:
        return None
    source = read_student(student.weights)
    return describe_base(source.path, source.state, parameter_dtype(config.precision))


def _start_weights(config: RunConfig, role: Role, ranks: Ranks) -> State:
    """On the main rank, an empty mapping on the others; None to start at random."""
    network, adapters = role.network, adapters_of(config, role)
    if isinstance(network, VlmDiscriminatorConfig):
        read: Callable[[], State] = lambda: _vlm_weights(config, role, network)  # noqa: E731
    elif isinstance(network, WanConfig) and network.weights is not None:
        read = lambda: read_start(role, network, adapters.names if adapters else ())  # noqa: E731
    else:
        return None
    found: dict[str, State] = {}  # what is read stays on the main rank
    ranks.run_on_main(lambda: found.update(main=read()))
    return found.get("main", {})


def read_start(role: Role, network: WanConfig, names: Sequence[str]) -> State:
    """Start weights of a role's network, and where the section names a LoRA, of its adapters.

    Args:
        names: of the adapters; they start alike, one that stays as it starts among them.
    Raises:
        ValueError: they cannot be read, or are of another architecture or rank.
    """
    assert network.weights is not None
    state = load_student_state(network.weights, network, role.section)
    if network.lora is None or network.lora.weights is None:
        return state
    shapes = {name: stored.shape for name, stored in state.stored.items()}
    try:
        adapters = load_lora_state(network.lora.weights, network.lora, shapes)
    except ValueError as error:
        raise ValueError(f"{role.section}.{error}") from error
    log.info("the adapters of %s start from %s", role.section, network.lora.weights)
    start: dict[str, Tensor] = {}
    for name, weight in adapters.items():
        linear, _, side = name.rpartition(".")
        start |= {f"{linear}.{FOLDER}.{adapter}.{side}": weight for adapter in names}
    return LazyState({**state.stored, **in_memory(start).stored})


def _vlm_weights(config: RunConfig, role: Role, network: VlmDiscriminatorConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        judge = VlmDiscriminator(network, ModelOps(adapters=adapters_of(config, role)))
    # Reads the tokenizer: what is wrong with it comes out here.
    log.debug("%s is scored at %d reward tokens", role.section, len(judge.tokens.rewards))
    shapes = {name: parameter.shape for name, parameter in judge.named_parameters()}
    answers = None
    if network.head == "yes_no":
        yes, no = judge.tokens.answers
        answers = Answers(yes, no, judge.tied)
    return load_vlm_state(network, role.section, role.adapter, shapes, answers)
