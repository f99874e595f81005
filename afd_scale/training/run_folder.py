"""A run's folder: made or recognised before anything heavy happens."""

import logging
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
from afd_scale.config import ConfigError, RunConfig, read_yaml, resolved_yaml
from afd_scale.config.load import flat_keys
from afd_scale.evaluation.report import provenance_header
from afd_scale.evaluation.run_files import CONFIG, DIAGNOSED, METRICS, SUMMARY
from afd_scale.files import system_errors, write_text

log = logging.getLogger(__name__)

_LAST = next(reversed(RunConfig.model_fields))  # a config.yaml that was cut lacks it

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
    if config.train.resume and (config.folder / "checkpoints").exists():
        check_format(config.folder / "checkpoints")
        if (before := _read_before(path)) is not None:
            _refuse_another_config(before, config, path)


def start_anew(config: RunConfig) -> None:
    """Remove what an earlier run left; its summary first, for a run with a summary counts as complete."""
    (config.folder / SUMMARY).unlink(missing_ok=True)
    checkpoints = config.folder / "checkpoints"
    for checkpoint in (*complete_checkpoints(checkpoints), *damaged_checkpoints(checkpoints)):
        remove_checkpoint(checkpoint)
    for folder in ("samples", "tensorboard"):
        shutil.rmtree(config.folder / folder, ignore_errors=True)
    for left_over in ("report.html", METRICS, "tracker_run", DIAGNOSED):
        (config.folder / left_over).unlink(missing_ok=True)


def write_config(config: RunConfig, num_ranks: int) -> None:
    """Make the run's folder and write `config.yaml` into it, versions and commit as its head.

    Raises:
        ConfigError: it cannot be written.
    """
    with system_errors(f"out ({config.out}) must be a folder that can be written to"):
        config.folder.mkdir(parents=True, exist_ok=True)
        write_text(config.folder / CONFIG, provenance_header(num_ranks) + resolved_yaml(config))


def _refuse_another_config(tree: dict[str, Any], config: RunConfig, path: Path) -> None:
    before = flat_keys(tree)
    now = flat_keys(yaml.safe_load(resolved_yaml(config)))
    # The method's name first: with another one all its fields differ.
    for key in sorted(before.keys() | now.keys(), key=lambda key: (key != "method.name", key)):
        changeable = key.startswith(CHANGEABLE) or RECOMPUTED.fullmatch(key) or REACHED.fullmatch(key)
        if not changeable and before.get(key) != now.get(key):
            raise ConfigError(
                f"{key} ({now.get(key)}) must stay {before.get(key)}, as in {path}: the run there would go on as "
                "another one; choose another `out` or `name`, or train.resume=false to start it anew"
            )


def _read_before(path: Path) -> dict[str, Any] | None:
    """What a run was made with, in today's fields where earlier ones are read: from its config.yaml, or where that is
    damaged from the copy in a checkpoint. None where there is neither.

    Raises:
        ConfigError: it is damaged, and no copy is whole.
    """
    tree = _read_tree(path)
    if tree is None:
        copies = [checkpoint / CONFIG for checkpoint in reversed(complete_checkpoints(path.parent / "checkpoints"))]
        copy, tree = next(((copy, tree) for copy in copies if (tree := _read_tree(copy))), (path, None))
        if tree is None and path.exists():
            raise ConfigError(f"run config ({path}) must be whole: it is damaged, and so nothing says which run is "
                              "there; remove it to go on all the same")  # fmt: skip
        if tree is None:
            return None
        log.warning("%s is absent or damaged: the run goes on by %s, and the file is written anew", path, copy)
    try:
        return dict(yaml.safe_load(resolved_yaml(RunConfig.model_validate(tree))))
    except ValidationError:
        return tree


def _read_tree(path: Path) -> dict[str, Any] | None:
    """None where the file is no config of a run from its beginning to its end."""
    try:
        tree = read_yaml(path, "run")
    except ConfigError:
        return None
    return tree if isinstance(tree, dict) and isinstance(tree.get(_LAST), dict) else None
