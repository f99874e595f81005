"""Training methods: one file each, whose `train_step` reads top to bottom."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from afd_scale.config import RunConfig
from afd_scale.protocols import Method
from afd_scale.types import RankMean


def make_method(config: RunConfig, engines: Mapping[str, Any], mean_over_ranks: RankMean) -> Method:
    """The training step that a run's method names, of the engines of its cast."""
    module, _, name = config.method.step.partition(":")
    method: Method = getattr(import_module(module), name)(config, engines, mean_over_ranks)
    return method
