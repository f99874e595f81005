"""Bytes that one rank receives in a step, by phase: ZeRO-3's collectives over all ranks, Ulysses' within a sequence."""

from dataclasses import dataclass

from afd_scale.config import RunConfig
from afd_scale.config.methods import AfdConfig
from afd_scale.config.models import LatentDiscriminatorConfig, WanArchitecture
from afd_scale.planning.flops import rollout_passes
from afd_scale.planning.memory import itemsize
from afd_scale.planning.parameters import discriminator_size, student_size
from afd_scale.planning.workload import Workload


@dataclass(frozen=True)
class Traffic:
    """Bytes received.

    Attributes:
        gather: weights, before each forward and each backward pass and each recomputation of a network.
        reduce: gradients, after each backward pass.
        exchange: q, k, v and outputs of self-attention, between the ranks of a sequence.
    """

    gather: float = 0.0
    reduce: float = 0.0
    exchange: float = 0.0

    @property
    def total(self) -> float:
        return self.gather + self.reduce + self.exchange


def step_traffic(config: RunConfig, load: Workload, gathered_rollout: bool) -> dict[str, Traffic]:
    """What one rank receives in a step, by phase."""
    student, size = config.student, student_size(config)
    method, micro = config.method, load.micro_batches
    training = 3 if student.activation_checkpointing else 2  # forward, (recomputation,) backward
    video, videos = load.video_tokens, load.videos
    if not isinstance(method, AfdConfig):
        exchange = training * _exchange(config, load, student, 2 * videos * video)
        gather = micro * training * _gather(config, load, size.total)
        return {"student": Traffic(gather, micro * _gather(config, load, size.trained), exchange)}

    passes, chunks = rollout_passes(student, load.frames), load.num_chunks
    # Resident are the weights of the sampling policy; ZeRO-3 gathers a unit whole, with what it has of other adapters.
    resident = size.resident if gathered_rollout else 0
    every_pass = _gather(config, load, size.total - resident)
    rollout = Traffic(
        gather=_gather(config, load, resident) + micro * passes * every_pass,
        exchange=passes * _exchange(config, load, student, videos * video // chunks),
    )
    context, states = videos * video, method.states_per_rollout * videos * video
    frozen = 2 if method.prior_weight else 1  # old policy, reference: a context pass and a pass over the states
    if method.context_gradient:
        gathers, tokens = training, training * (context + states)
    else:
        gathers, tokens = 1 + training, context + training * states
    gathers, tokens = gathers + 2 * frozen, tokens + frozen * (context + states)
    update = Traffic(
        gather=micro * gathers * _gather(config, load, size.total),
        reduce=micro * _gather(config, load, size.trained),
        exchange=_exchange(config, load, student, tokens),
    )
    return {"rollout": rollout, "discriminator": _discriminator(config, load, method), "student": update}


def _discriminator(config: RunConfig, load: Workload, method: AfdConfig) -> Traffic:
    network, size, micro = method.discriminator, discriminator_size(config), load.discriminator_micro_batches
    assert size is not None
    training, exchange = 2, 0.0
    if isinstance(network, LatentDiscriminatorConfig):
        training = 3 if network.activation_checkpointing else 2
        seen = (2 if method.r1_weight or method.r2_weight else 1) * (load.prompts + load.videos)
        exchange = _exchange(config, load, network, (training * seen + load.videos) * load.video_tokens)
    return Traffic(
        gather=micro * (training + 1) * _gather(config, load, size.total),  # one more to score the rollouts
        reduce=micro * _gather(config, load, size.trained),
        exchange=exchange,
    )


def _gather(config: RunConfig, load: Workload, elements: int) -> float:
    """Of an all-gather (or a reduce-scatter) of so many elements: all of them but the own shard."""
    return elements * itemsize(config) * (load.gpus - 1) / load.gpus


def _exchange(config: RunConfig, load: Workload, network: WanArchitecture, tokens: int) -> float:
    """Of the two all-to-all of every block on so many of this rank's tokens: q, k, v, and the output."""
    elsewhere = (load.sequence - 1) / load.sequence
    return 4 * tokens * network.num_layers * network.dim * itemsize(config) * elsewhere
