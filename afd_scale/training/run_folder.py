"""A run's folder: made or recognised before anything heavy happens."""

from pathlib import Path
from typing import Any

import yaml

from afd_scale.config import ConfigError, RunConfig, resolved_yaml
from afd_scale.evaluation.report import provenance_header

# What may change when a run goes on: how long, how often it logs and saves, and what happens after.
CHANGEABLE = ("train", "evaluation", "engine", "requires", "out", "data.cache", "data.source")


def prepare_folder(config: RunConfig, num_ranks: int) -> None:
    """Make the run's folder and write `config.yaml` into it, versions and commit as its head.

    Raises:
        ConfigError: it cannot be written to, or holds a run with another config.
    """
    path = config.folder / "config.yaml"
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and config.train.resume and (config.folder / "checkpoints").exists():
            _refuse_another_config(path, config)
        partial = path.with_name(".config.partial")
        partial.write_text(provenance_header(num_ranks) + resolved_yaml(config))
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"out ({config.out}) must be a folder that can be written to: {error.strerror}") from error


def _refuse_another_config(path: Path, config: RunConfig) -> None:
    before = _flat(yaml.safe_load(path.read_text()))
    now = _flat(yaml.safe_load(resolved_yaml(config)))
    for key in sorted(before.keys() | now.keys()):
        if not key.startswith(CHANGEABLE) and before.get(key) != now.get(key):
            raise ConfigError(
                f"{key} ({now.get(key)}) must stay {before.get(key)}, as in {path}: the run there would go on as "
                "another one; choose another `out` or `name`, or train.resume=false to start it anew"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
