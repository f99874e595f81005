"""What is looked at before a run begins, and what is wrong there in one line."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from afd_scale.config import ConfigError, RunConfig
from afd_scale.config.judges import JudgeConfig
from afd_scale.data.check import check_dataset, ensure_dataset, is_to_be_made
from afd_scale.data.schema import DatasetFacts
from afd_scale.evaluation.run_files import Summary, read_summary
from afd_scale.layers.choose_precision import choose_precision
from afd_scale.parallel.ranks import Ranks
from afd_scale.training.run_folder import check_folder, start_anew
from afd_scale.training.trackers import check_trackers

log = logging.getLogger(__name__)


def check_early(config: RunConfig, ranks: Ranks, requirers: tuple[Path, ...]) -> None:
    """What would otherwise come out only after the run that this one requires."""
    check_trackers(config.train.trackers)
    if config.requires in requirers:
        raise ConfigError(f"requires ({config.requires}) must not lead back to itself")
    if complete_summary(config) is None and config.requires is not None:
        with input_errors():
            choose_precision(config.precision, config.fp8_scaling, ranks.device, keep_blocks=config.fp8_keep_blocks)
        if not is_to_be_made(config.data):
            ensure_dataset(config.data)
            check_dataset(config)


def check_inputs(config: RunConfig) -> DatasetFacts:
    """Of a run whose shards are there, and hashed."""
    facts = check_dataset(config, hashed=True)
    for role in config.cast:
        judge = role.network if isinstance(role.network, JudgeConfig) else None
        if judge is not None and judge.sees_pixels and not facts.codec.startswith(config.codec.name):
            raise ConfigError(f"codec.name ({config.codec.name}) must be {facts.codec.partition(':')[0]}, with its "
                              f"models: {role.section} sees pixels, and the data is latents of it")  # fmt: skip
    if not config.train.resume:
        start_anew(config)
    return facts


def complete_summary(config: RunConfig) -> Summary | None:
    """Check a run's folder; the summary in it where the run has come to its end. One that is damaged is made anew."""
    check_folder(config)
    summary = read_summary(config.folder) if config.train.resume else None
    return summary if summary is not None and summary["steps"] >= config.train.steps else None


@contextmanager
def input_errors() -> Iterator[None]:
    """What goes wrong before the first step is the user's input: one line, exit code 2."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        log.debug("what lies behind the one line:", exc_info=True)
        raise ConfigError(str(error)) from error
