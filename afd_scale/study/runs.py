"""A trial as a command, and what its run left as a record."""

import math
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from afd_scale.config import ConfigError, RunConfig, read_yaml, resolved_yaml
from afd_scale.config.errors import shown
from afd_scale.config.load import flat_keys
from afd_scale.data.schema import DatasetFacts
from afd_scale.data.storage import is_remote
from afd_scale.evaluation.report import STEP, STEP_SECONDS, header_facts
from afd_scale.evaluation.run_files import CONFIG, METRICS, read_metrics, read_summary
from afd_scale.study.plan import Trial, spent_of
from afd_scale.study.results import Record

Command = Callable[[Trial], list[str]]


@dataclass(frozen=True)
class Place:
    """Where the runs of a study are.

    Attributes:
        root: of the project.
        out: folder of the runs, and of what is made of them.
    """

    root: Path
    out: Path

    def folder(self, trial: Trial) -> Path:
        return self.out / trial.name

    def log(self, trial: Trial) -> Path:
        """What the run said."""
        return self.out / f"{trial.name}.log"

    def command(self, trial: Trial) -> list[str]:
        """The ordinary one: train the run, or measure the student of another again."""
        if trial.source is None:
            return [sys.executable, str(self.root / "launch" / "train.py"), "--config", str(trial.config),
                    *trial.run_overrides(self.out)]  # fmt: skip
        return [sys.executable, str(self.root / "tools" / "measure_again.py"), str(self.folder(trial.source)),
                "--out", str(self.folder(trial)), *trial.sampler]  # fmt: skip


def read_record(trial: Trial, place: Place) -> Record | None:
    """What a run left; None where it is not complete.

    Raises:
        ConfigError: the run that is there has other settings.
    """
    folder = place.folder(trial)
    summary = read_summary(folder)
    if summary is None or summary["steps"] < trial.steps:
        return None
    config = trial.run_config(place.out)
    _check_settings(config, folder)
    facts = header_facts((folder / CONFIG).read_text())
    trained = trial.source or trial
    clips = (trial.steps + config.method.warm_up) * config.data.global_batch
    return Record(
        name=trial.name, method=trial.method, base=trial.base, rate=trial.rate, seed=trial.seed, steps=trial.steps,
        metrics={policy: _finite(values) for policy, values in summary["metrics"].items()},
        teacher_clips=min(clips, _clips_there(config, place) or clips), clips_read=clips,
        pflop=spent_of(config).pflop(trial.steps), seconds=_seconds(place.folder(trained), config),
        calls=config.sampler.calls(config.data.latent_frames, config.data.start_frames),
        command=_shown_command(trial, place),
        date=facts.get("date", ""), commit=facts.get("git_commit", ""),
    )  # fmt: skip


def check_known(record: Record, trial: Trial, place: Place) -> None:
    """What was done elsewhere is told by its command; what its config's file said there cannot be seen.

    Raises:
        ConfigError: the command is another, but for the folder of the runs.
    """
    here, there = (_settings_of(command, trial) for command in (_shown_command(trial, place), record.command))
    if here != there:
        differ = ", ".join(sorted(set(here) ^ set(there)))
        raise ConfigError(f"known ({record.name}) must have the settings of this study: commands differ in {differ}")


def _settings_of(command: str, trial: Trial) -> list[str]:
    """A command's words, without where its runs are."""
    folders = [each.name for each in (trial, trial.source) if each is not None]
    words = [word for word in shlex.split(command) if not word.startswith("out=")]
    return [Path(word).name if Path(word).name in folders else word for word in words]


def _finite(values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


def _check_settings(config: RunConfig, folder: Path) -> None:
    """A complete run of other settings is none of this study, whatever it is called."""
    tree = read_yaml(folder / CONFIG, "run")
    try:
        there = yaml.safe_load(resolved_yaml(RunConfig.model_validate(tree)))
    except ValidationError:  # of another version of the code
        there = tree
    now, before = flat_keys(yaml.safe_load(resolved_yaml(config))), flat_keys(there)
    for key in sorted(before.keys() | now.keys(), key=lambda key: (key != "method.name", key)):
        if key not in ("out", "train.resume") and before.get(key) != now.get(key):
            raise ConfigError(f"run ({folder}) must have the settings of this study: {key} is "
                              f"{shown(before.get(key))} there and {shown(now.get(key))} here; move it away, or choose "
                              "another --out")  # fmt: skip


def _clips_there(config: RunConfig, place: Place) -> int | None:
    """In the data; None where that cannot be said here."""
    if config.data.source is not None:
        return config.data.source.clips
    if is_remote(config.data.shards):
        return None
    try:
        return DatasetFacts.load(place.root / config.data.shards, "data.shards").num_samples
    except ConfigError:
        return None


def _seconds(folder: Path, config: RunConfig) -> float:
    """Of all training steps, those of the warm-up and of earlier starts too."""
    path = folder / METRICS
    total, before = 0.0, -config.method.warm_up
    for record in read_metrics(path) if path.is_file() else ():
        total += (record.get(STEP_SECONDS) or 0.0) * max(record[STEP] - before, 0)
        before = record[STEP]
    return total


def _shown_command(trial: Trial, place: Place) -> str:
    """Without this machine's folders: paths below the root are from there."""
    words = ["python", *place.command(trial)[1:]]
    return shlex.join(word.replace(f"{place.root}/", "") for word in words)
