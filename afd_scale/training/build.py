"""From a config to the objects of a run: the only file that names concrete classes."""

from dataclasses import dataclass, field

from torch import Tensor

from afd_scale.checkpoint.load_student import load_student_state
from afd_scale.config import RunConfig
from afd_scale.config.methods import AfdConfig, SftConfig
from afd_scale.config.models import LatentDiscriminatorConfig
from afd_scale.flow.randomness import Randomness
from afd_scale.layers.network import Network
from afd_scale.methods.afd import Afd
from afd_scale.methods.sft import Sft
from afd_scale.models.discriminators import ConvDiscriminator, LatentDiscriminator
from afd_scale.models.wan import CausalWan
from afd_scale.parallel.engine import AverageNetwork, FrozenNetwork, TrainedNetwork, build_sharded
from afd_scale.parallel.ranks import Ranks
from afd_scale.protocols import Method


@dataclass(frozen=True)
class Run:
    """What the trainer drives.

    Attributes:
        method: its training step.
        student: trained.
        exported: the policy that is evaluated and exported: the student, or an average of it.
        networks: all that a checkpoint holds, by name.
    """

    method: Method
    student: TrainedNetwork
    exported: TrainedNetwork | AverageNetwork
    networks: dict[str, TrainedNetwork | AverageNetwork] = field(default_factory=dict)


def build_run(config: RunConfig, ranks: Ranks) -> Run:
    """Networks, engines and method of a run.

    Raises:
        ValueError: the student's start weights cannot be read or do not fit.
    """
    state = _start_state(config, ranks)
    student = TrainedNetwork(config, _student(config, state), config.method.optimizer)
    if isinstance(config.method, SftConfig):
        return _build_sft(config, config.method, student, state)
    return _build_afd(config, config.method, student, state, ranks)


def _build_sft(config: RunConfig, method: SftConfig, student: TrainedNetwork, state: dict[str, Tensor] | None) -> Run:
    average = AverageNetwork(config, _student(config, state)) if method.ema_decay else None
    sft = Sft(method, config.student, config.train.steps, Randomness(config.seed), student, average)
    if average is None:
        return Run(sft, student, student, {"student_engine": student})
    return Run(sft, student, average, {"student_engine": student, "average": average})


def _build_afd(
    config: RunConfig, method: AfdConfig, student: TrainedNetwork, state: dict[str, Tensor] | None, ranks: Ranks
) -> Run:
    old_policy = AverageNetwork(config, _student(config, state))
    reference = FrozenNetwork(config, _student(config, state)) if method.prior_weight else None
    discriminator = TrainedNetwork(
        config, build_sharded(config, lambda: _discriminator(config, method), None), method.discriminator_optimizer
    )
    afd = Afd(
        method, config.student, config.train.steps, Randomness(config.seed), student, old_policy, reference,
        discriminator, ranks.mean,
    )  # fmt: skip
    return Run(
        afd, student, student,
        {"student_engine": student, "old_policy": old_policy, "discriminator_engine": discriminator},
    )  # fmt: skip


def _student(config: RunConfig, state: dict[str, Tensor] | None) -> Network:
    return build_sharded(config, lambda: CausalWan(config.student), state)


def _discriminator(config: RunConfig, method: AfdConfig) -> Network:
    data, student = config.data, config.student
    if isinstance(method.discriminator, LatentDiscriminatorConfig):
        return LatentDiscriminator(method.discriminator)
    return ConvDiscriminator(
        method.discriminator, data.latent_frames, student.latent_channels, (data.latent_height, data.latent_width),
        student.text_dim,
    )  # fmt: skip


def _start_state(config: RunConfig, ranks: Ranks) -> dict[str, Tensor] | None:
    """The student's start weights on the main rank, an empty dictionary on the others; None to start at random."""
    weights = config.student.weights
    if weights is None:
        return None
    state: dict[str, Tensor] = {}

    def load() -> None:
        state.update(load_student_state(weights, config.student))

    ranks.run_on_main(load)
    return state
