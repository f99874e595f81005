"""From a config to the objects of a run: the only file that names concrete classes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from afd_scale.checkpoint.load_student import load_student_state
from afd_scale.checkpoint.run_state import Checkpointed
from afd_scale.config import RunConfig
from afd_scale.config.methods import AfdConfig, SftConfig
from afd_scale.config.models import LatentDiscriminatorConfig, LoraConfig, WanArchitecture
from afd_scale.flow.randomness import Randomness
from afd_scale.layers.attention import Backend, choose_backend
from afd_scale.layers.choose_precision import choose_precision
from afd_scale.layers.lora import Adapters, adapter_of, train_only
from afd_scale.layers.network import Network
from afd_scale.layers.ops import ModelOps
from afd_scale.methods.afd import Afd
from afd_scale.methods.sft import Sft
from afd_scale.models.discriminators import ConvDiscriminator, LatentDiscriminator
from afd_scale.models.wan import CausalWan
from afd_scale.parallel.engine import (
    AveragedPolicy,
    ShardedNetwork,
    TrainedNetwork,
    average_of_adapter,
    build_sharded,
    freeze,
)
from afd_scale.parallel.ranks import Ranks
from afd_scale.parallel.shards import GatherCounter, Residency
from afd_scale.parallel.ulysses import SequenceParallelOps
from afd_scale.planning.activations import key_value_bytes
from afd_scale.planning.memory import student_trunk
from afd_scale.planning.workload import workload
from afd_scale.protocols import Method, Policy

STUDENT, OLD_POLICY, AVERAGE = "student", "old_policy", "average"  # adapters of the student's base

State = dict[str, Tensor] | None


@dataclass(frozen=True)
class Run:
    """What the trainer drives.

    Attributes:
        method: its training step.
        student: trained.
        exported: the policy that is evaluated and exported: the student, or an average of it.
        counter: of the weights gathered on this rank.
        networks: all that a checkpoint holds, by name.
    """

    method: Method
    student: TrainedNetwork
    exported: TrainedNetwork | AveragedPolicy
    counter: GatherCounter
    networks: Mapping[str, Checkpointed] = field(default_factory=dict)


def build_run(config: RunConfig, ranks: Ranks) -> Run:
    """Networks, engines and method of a run.

    Raises:
        ValueError: start weights cannot be read or do not fit; a kernel or a precision cannot work here.
    """
    builder = Builder(config, ranks)
    if isinstance(config.method, SftConfig):
        return _build_sft(config, config.method, builder)
    return _build_afd(config, config.method, builder, ranks)


def _build_sft(config: RunConfig, method: SftConfig, builder: "Builder") -> Run:
    names = (STUDENT, AVERAGE) if method.ema_decay else (STUDENT,)
    student = builder.student(names)
    average = builder.average(student, AVERAGE) if method.ema_decay else None
    sft = Sft(
        method, config.student, config.train.steps, Randomness(config.seed), student, average, config.train.micro_batch
    )
    if average is None:
        return Run(sft, student, student, builder.counter, {"student_engine": student})
    return Run(sft, student, average, builder.counter, {"student_engine": student, "average": average})


def _build_afd(config: RunConfig, method: AfdConfig, builder: "Builder", ranks: Ranks) -> Run:
    student = builder.student((STUDENT, OLD_POLICY))
    old_policy = builder.average(student, OLD_POLICY)
    reference = builder.reference(student) if method.prior_weight else None
    discriminator = builder.discriminator(method)
    afd = Afd(
        method, config.student, config.train.steps, Randomness(config.seed), student, old_policy, reference,
        discriminator, ranks.mean, config.train.micro_batch,
    )  # fmt: skip
    networks: dict[str, Checkpointed] = {
        "student_engine": student,
        "old_policy": old_policy,
        "discriminator_engine": discriminator,
    }
    return Run(afd, student, student, builder.counter, networks)


class Builder:
    """Makes the networks of a run. Policies are sharded copies of the student, or adapters on one base."""

    def __init__(self, config: RunConfig, ranks: Ranks):
        self.config, self.ranks, self.counter = config, ranks, GatherCounter()
        self.precision = choose_precision(config.precision, config.fp8_scaling, ranks.device)
        self.backends: dict[int, Backend] = {}
        self.state = self._load(config.student.weights, lambda path: load_student_state(path, config.student))
        self.residency = Residency(config.rollout.weights, _cache_bytes(config, ranks), ranks.local_size, ranks.any)

    def student(self, adapters: tuple[str, ...]) -> TrainedNetwork:
        """The network that is trained, all its weights or the first of its adapters."""
        lora = self.config.student.lora
        network = self._student(adapters)
        if lora:
            train_only(network, lambda name: adapter_of(name) == STUDENT)
        return TrainedNetwork(
            self.config, network, self.config.method.optimizer,
            adapter=STUDENT if lora else None, residency=self.residency,
        )  # fmt: skip

    def average(self, student: TrainedNetwork, adapter: str) -> AveragedPolicy:
        """A policy that follows the student."""
        if self.config.student.lora:
            return average_of_adapter(student, adapter, self.residency)
        return AveragedPolicy(freeze(self.config, self._student(())), residency=self.residency)

    def reference(self, student: TrainedNetwork) -> Policy:
        """The frozen start."""
        engine = student.engine if self.config.student.lora else freeze(self.config, self._student(()))
        return ShardedNetwork(engine, residency=self.residency)

    def discriminator(self, method: AfdConfig) -> TrainedNetwork:
        """The scorer; made last."""
        self.state = None  # all policies are made, and the discriminator's start weights need the room
        return TrainedNetwork(self.config, self._discriminator(method), method.discriminator_optimizer)

    def _student(self, adapters: tuple[str, ...]) -> Network:
        config = self.config.student

        def build() -> Network:
            return CausalWan(config, self._ops(config, config.lora, adapters))

        return build_sharded(self.config, build, self.state, self.counter)

    def _discriminator(self, method: AfdConfig) -> Network:
        data, student, config = self.config.data, self.config.student, method.discriminator
        if not isinstance(config, LatentDiscriminatorConfig):
            size = (data.latent_height, data.latent_width)

            def build_conv() -> Network:
                return ConvDiscriminator(config, data.latent_frames, student.latent_channels, size, student.text_dim)

            return build_sharded(self.config, build_conv, None, self.counter)

        def build() -> Network:
            return LatentDiscriminator(config, self._ops(config, config.lora, (LatentDiscriminator.ADAPTER,)))

        state = self._load(config.weights, lambda path: load_student_state(path, config, "method.discriminator"))
        network = build_sharded(self.config, build, state, self.counter)
        if config.lora:
            train_only(network, LatentDiscriminator.trains_with_adapters)
        return network

    def _ops(self, architecture: WanArchitecture, lora: LoraConfig | None, adapters: tuple[str, ...]) -> ModelOps:
        attend = self._attention(architecture.dim // architecture.num_heads).attend
        options: dict[str, Any] = {"precision": self.precision, "attend": attend}
        if lora:
            options["adapters"] = Adapters(adapters, lora.rank, lora.alpha / lora.rank)
        if self.ranks.sequence_group is not None:
            return SequenceParallelOps(self.ranks.sequence_group, **options)
        return ModelOps(**options)

    def _attention(self, head_dim: int) -> Backend:
        if head_dim not in self.backends:
            dtype = torch.float32 if self.config.precision == "fp32" else torch.bfloat16
            self.backends[head_dim] = choose_backend(
                self.config.attention, device=self.ranks.device, dtype=dtype, head_dim=head_dim
            )
        return self.backends[head_dim]

    def _load(self, path: Any, load: Callable[[Any], dict[str, Tensor]]) -> State:
        """Start weights on the main rank, an empty dictionary on the others; None to start at random."""
        if path is None:
            return None
        state: dict[str, Tensor] = {}
        self.ranks.run_on_main(lambda: state.update(load(path)))
        return state


def _cache_bytes(config: RunConfig, ranks: Ranks) -> int:
    """Of a rank's KV cache in a rollout of one micro-batch."""
    load = workload(config, ranks.size)
    tokens = load.together * config.student.cached_frames(load.frames) * load.local_tokens_per_frame
    return key_value_bytes(student_trunk(config, load), tokens)
