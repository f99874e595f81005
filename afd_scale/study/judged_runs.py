"""The kept checkpoints of many runs, each measured once: a call that was cut short, or one with more runs, goes on from
what lies there."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from afd_scale.checkpoint.resume import read_state
from afd_scale.checkpoint.weights import complete_checkpoints
from afd_scale.config import ConfigError, RunConfig, load_config
from afd_scale.evaluation.suites import Metric
from afd_scale.files import read_json, write_text
from afd_scale.progress import progress
from afd_scale.study.regimes import SCORINGS, measure_checkpoint, world_of

log = logging.getLogger(__name__)

_MEASURED = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class JudgedRun:
    """A run as it is measured.

    Attributes:
        trained_on: the part of the world's prompts; None where the config does not say.
        checkpoints: by step, `regimes.measure_checkpoint`.
    """

    name: str
    trained_on: str | None
    checkpoints: Mapping[int, Mapping[str, Any]]

    @property
    def end(self) -> Mapping[str, Any]:
        """The last checkpoint, by regime."""
        return self.checkpoints[max(self.checkpoints)]


def judges_of(runs: Sequence[JudgedRun]) -> list[str]:
    """Those that the runs end with, each once."""
    return list(dict.fromkeys(judge for run in runs for regime in run.end.values() for judge in regime["judges"]))


def measure_runs(
    runs: Sequence[Path], out: Path, clips: int, weights: str | None = None
) -> tuple[str, list[JudgedRun]]:  # fmt: skip
    """Measure what is not measured yet.

    Args:
        runs: folders.
        out: gets `measured/RUN-STEP.json`.
        clips, weights: of `measure_checkpoint`.
    Returns:
        The world, and the runs.
    Raises:
        ValueError: a run cannot be read, two have one name, or they are of two worlds.
    """
    configs = {run: load_config(run / "config.yaml") for run in runs}
    names = [run.resolve().name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"runs ({name}) must have names of their own: results are kept by them")
    worlds = {world_of(config) for config in configs.values()}
    if len(worlds) != 1:
        raise ConfigError(f"runs ({', '.join(sorted(worlds))}) must be of one world: their figures are compared")
    found = {run: complete_checkpoints(run / "checkpoints") for run in runs}
    for run, checkpoints in found.items():
        if not checkpoints:
            raise ConfigError(f"run ({run}) must hold a complete checkpoint: there is none yet")
    (out / "measured").mkdir(parents=True, exist_ok=True)
    judged, done, total = [], 0, sum(len(checkpoints) for checkpoints in found.values())
    with progress("Checkpoints") as on_checkpoint:
        for name, (run, config) in zip(names, configs.items(), strict=True):
            measured = {}
            for checkpoint in found[run]:
                step = int(read_state(checkpoint)["step"])
                measured[step] = _measured(config, checkpoint, out / "measured" / f"{name}-{step}.json", clips, weights)
                done += 1
                on_checkpoint(done, total)
            if max(measured) < config.train.steps:
                log.warning("%s has come to step %d of %d: its newest checkpoint is taken for its end", run,
                            max(measured), config.train.steps)  # fmt: skip
            source = config.data.source
            judged.append(JudgedRun(name, None if source is None else source.prompts, measured))
    return worlds.pop(), judged


def _measured(config: RunConfig, checkpoint: Path, kept: Path, clips: int, weights: str | None) -> dict[str, Any]:
    """Of a checkpoint, now or earlier."""
    written = (checkpoint / "state.json").stat().st_mtime_ns
    facts = {"clips": clips, "weights": weights, "world": world_of(config), "checkpoint": str(checkpoint.resolve()),
             "written": written}  # fmt: skip
    if kept.is_file():
        there = read_json(kept, "out", "hold what was measured", _MEASURED)
        if there.get("facts") == facts:
            return dict(there["regimes"])
    regimes = measure_checkpoint(config, checkpoint, clips, weights)
    write_text(kept, json.dumps({"facts": facts, "regimes": regimes}, indent=1) + "\n")
    return regimes


def metrics_of(world: str) -> dict[str, Metric]:
    """How to read a world's metrics."""
    return SCORINGS[world].metrics
