"""A student to generate with, from whatever its weights lie in."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from afd_scale.checkpoint.load_student import read_student
from afd_scale.config import ConfigError, RunConfig, load_config
from afd_scale.config.models import PolicyConfig
from afd_scale.engines.captured import CapturedPasses, choose_capture
from afd_scale.engines.plain import PlainNetwork
from afd_scale.evaluation.runs import run_folder
from afd_scale.layers.attention import choose_backend
from afd_scale.layers.choose_precision import choose_precision, parameter_dtype
from afd_scale.models.wan import CausalWan
from afd_scale.parallel.ranks import Ranks
from afd_scale.parallel.ulysses import ops_over

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Student:
    """What generates.

    Attributes:
        policy: its sections.
        network: on this rank's device, whole.
        run: the config of the run that its weights lie in; None where they lie elsewhere.
    """

    policy: PolicyConfig
    network: PlainNetwork
    run: RunConfig | None

    @property
    def start_frames(self) -> int:
        """Latent frames of a video that it was given in its run."""
        return 0 if self.run is None else self.run.data.start_frames


def load_student(
    source: Path, ranks: Ranks, *, precision: str, attention: str = "auto", architecture: str | None = None,
    family: str | None = None, sampler: Mapping[str, Any] | None = None,
) -> Student:  # fmt: skip
    """Read a run, checkpoint, export or weights file; every rank holds all of the network.

    Args:
        precision: fp32, bf16 or fp8; in FP8 stays out of it what the student's run kept.
        attention: of `choose_backend`.
        architecture, family: presets for a source that does not state its own.
        sampler: fields that replace those of the student's sampler, as a window that bounds an endless video.
    Raises:
        ValueError: the source cannot be read, or a kernel or precision cannot work here.
    """
    read = read_student(source)
    policy = read.config(architecture, family)
    if sampler:
        policy = policy.model_copy(update={"sampler": policy.sampler.with_fields(sampler)})
    dtype, config = parameter_dtype(precision), policy.student
    if config.num_heads % ranks.sequence:
        raise ValueError(f"sequence ({ranks.sequence}) must divide the student's {config.num_heads} heads: each "
                         "rank of a video attends with equally many")  # fmt: skip
    backend = choose_backend(attention, device=ranks.device, dtype=dtype, head_dim=config.dim // config.num_heads)
    run = run_of(source)
    made_by = choose_precision(precision, "current", ranks.device, keep_blocks=run.fp8_keep_blocks if run else 0)
    ops = ops_over(ranks.sequence_group, precision=made_by, attend=backend.attend)
    with torch.device("meta"):
        network = CausalWan(config, policy.sampler, ops)
    network.load_state_dict(read.state.converted(lambda _, weight: weight.to(ranks.device, dtype)), assign=True)
    network.to(ranks.device, dtype).eval().requires_grad_(False)  # what is no weight
    network.fuse()
    capture = choose_capture("auto", ranks.device, ranks.sequence_group is not None) if precision != "fp8" else None
    calls = None if capture is None else CapturedPasses(network, capture)
    return Student(policy, PlainNetwork(network, calls=calls), run)


def sampling(student: Student, **fields: Any) -> Student:
    """The same student with other fields of its sampler; its network is shared, and follows them from now on.

    Raises:
        ConfigError: a value breaks a rule.
    """
    sampler = student.policy.sampler.with_fields(fields)
    student.network.network.sampler = sampler
    return replace(student, policy=student.policy.model_copy(update={"sampler": sampler}))


def run_of(path: Path) -> RunConfig | None:
    """The config of the run that a path is, or lies in; None where there is none, or it cannot be read."""
    folder = run_folder(path)
    if folder is None:
        return None
    try:
        return load_config(folder / "config.yaml")
    except ConfigError as error:
        log.warning("%s does not say what its student was trained on: %s", folder / "config.yaml", error)
        return None
