"""A run's folder: made or recognised before anything heavy happens."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from afd_scale.checkpoint.resume import check_format, damaged_checkpoints
from afd_scale.checkpoint.run_state import remove_checkpoint
from afd_scale.checkpoint.weights import complete_checkpoints
from afd_scale.config import ConfigError, RunConfig, resolved_yaml
from afd_scale.evaluation.report import DIAGNOSED, provenance_header
from afd_scale.files import system_errors, write_text

CONFIG = "config.yaml"
SUMMARY = "summary.json"

# What may change when a run goes on: how long, how often it logs and saves, how ranks share the work, what comes then.
CHANGEABLE = (
    "train", "codec", "evaluation", "engine", "parallel", "rollout", "attention", "compile", "requires", "out",
    "data.cache", "data.source",
)  # fmt: skip
# And what of any network is recomputed; and how a judge behind HTTP is reached.
RECOMPUTED = re.compile(r".*\.activation_checkpointing")
REACHED = re.compile(r"method\.(discriminator|judges\.\w+)\.(url|key_file|timeout_seconds|retries|videos_per_request)")


def check_folder(config: RunConfig) -> None:
    """Check that the run's folder can be made or gone on with; writes nothing.

    Raises:
        ConfigError: it cannot be written to, or holds a run with another config or of another version.
    """
    existing = config.folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "no write permission" if existing.is_dir() else "it is a file"
        raise ConfigError(f"out ({config.out}) must be a folder that can be written to: {existing}: {reason}")
    path = config.folder / CONFIG
    if config.train.resume and path.exists() and (config.folder / "checkpoints").exists():
        check_format(config.folder / "checkpoints")
        _refuse_another_config(path, config)


def start_anew(config: RunConfig) -> None:
    """Remove what an earlier run left; its summary first, for a run with a summary counts as complete."""
    (config.folder / SUMMARY).unlink(missing_ok=True)
    checkpoints = config.folder / "checkpoints"
    for checkpoint in (*complete_checkpoints(checkpoints), *damaged_checkpoints(checkpoints)):
        remove_checkpoint(checkpoint)
    for folder in ("samples", "tensorboard"):
        shutil.rmtree(config.folder / folder, ignore_errors=True)
    for left_over in ("report.html", "metrics.jsonl", "tracker_run", DIAGNOSED):
        (config.folder / left_over).unlink(missing_ok=True)


def write_config(config: RunConfig, num_ranks: int) -> None:
    """Make the run's folder and write `config.yaml` into it, versions and commit as its head.

    Raises:
        ConfigError: it cannot be written.
    """
    with system_errors(f"out ({config.out}) must be a folder that can be written to"):
        config.folder.mkdir(parents=True, exist_ok=True)
        write_text(config.folder / CONFIG, provenance_header(num_ranks) + resolved_yaml(config))


def _refuse_another_config(path: Path, config: RunConfig) -> None:
    before = _flat(_read_before(path))
    now = _flat(yaml.safe_load(resolved_yaml(config)))
    # The method's name first: with another one all its fields differ.
    for key in sorted(before.keys() | now.keys(), key=lambda key: (key != "method.name", key)):
        changeable = key.startswith(CHANGEABLE) or RECOMPUTED.fullmatch(key) or REACHED.fullmatch(key)
        if not changeable and before.get(key) != now.get(key):
            raise ConfigError(
                f"{key} ({now.get(key)}) must stay {before.get(key)}, as in {path}: the run there would go on as "
                "another one; choose another `out` or `name`, or train.resume=false to start it anew"
            )


def _read_before(path: Path) -> dict[str, Any]:
    """What a run was made with, in today's fields where earlier ones are read."""
    tree: dict[str, Any] = yaml.safe_load(path.read_text())
    try:
        return dict(yaml.safe_load(resolved_yaml(RunConfig.model_validate(tree))))
    except ValidationError:
        return tree


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
