"""Bytes that one rank receives in a step, by phase: ZeRO-3's collectives over all ranks, Ulysses' within a sequence."""

from dataclasses import dataclass

from afd_scale.config import RunConfig
from afd_scale.config.methods import AfdConfig
from afd_scale.config.models import LatentDiscriminatorConfig, WanArchitecture
from afd_scale.planning.flops import rollout_passes
from afd_scale.planning.memory import itemsize
from afd_scale.planning.parameters import discriminator_size, student_size
from afd_scale.planning.workload import Workload

TRAINING_GATHERS = 2  # of all weights, for a forward and a backward pass


@dataclass(frozen=True)
class Traffic:
    """Bytes received.

    Attributes:
        gather: weights, before each forward and each backward pass of a network; a recomputation's serve its backward
            pass too. An upper bound: what stage3_max_live_parameters keeps whole is not gathered again.
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
    passes_with_gradient = 3 if student.activation_checkpointing else 2  # forward, (recomputation,) backward
    video, videos = load.video_tokens, load.videos
    if not isinstance(method, AfdConfig):
        exchange = passes_with_gradient * _exchange(config, load, student, 2 * videos * video)
        gather = micro * TRAINING_GATHERS * _gather(config, load, size.total)
        return {"student": Traffic(gather, micro * _gather(config, load, size.trained), exchange)}

    passes, chunks = rollout_passes(student, load.frames), load.num_chunks
    rollout = Traffic(
        gather=(1 if gathered_rollout else micro * passes) * _gather(config, load, size.total),
        exchange=passes * _exchange(config, load, student, videos * video // chunks),
    )
    context, states = videos * video, method.states_per_rollout * videos * video
    frozen = 2 if method.prior_weight else 1  # old policy, reference: a context pass and a pass over the states
    if method.context_gradient:
        gathers, tokens = micro * TRAINING_GATHERS, passes_with_gradient * (context + states)
    else:
        gathers, tokens = micro * (1 + TRAINING_GATHERS), context + passes_with_gradient * states
    gathers, tokens = gathers + frozen * (1 if gathered_rollout else 2 * micro), tokens + frozen * (context + states)
    update = Traffic(
        gather=gathers * _gather(config, load, size.total),
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
        seen = (2 if method.r1_weight or method.r2_weight else 1) * (load.prompts + load.paired_videos)
        exchange = _exchange(config, load, network, (training * seen + load.videos) * load.video_tokens)
    return Traffic(
        gather=micro * (TRAINING_GATHERS + 1) * _gather(config, load, size.total),  # one more to score the rollouts
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
