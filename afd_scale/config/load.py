"""From a YAML file and overrides to a checked RunConfig, and back to YAML."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from afd_scale.config.errors import ConfigError, shown
from afd_scale.config.plain import MOST_DEPTH, MOST_YAML_BYTES, UnreadableError, parse_yaml
from afd_scale.config.run import RunConfig
from afd_scale.config.section import first_problem


def read_yaml(path: Path, field: str) -> Any:
    """The value of a YAML file.

    Args:
        field: names the file in errors.
    Raises:
        ConfigError: it cannot be read, or is no YAML of plain values.
    """
    try:
        with path.open("rb") as file:
            return parse_yaml(file.read(MOST_YAML_BYTES + 1))
    except UnreadableError as error:
        where = f"{path}:{error.line}" if error.line else path
        raise ConfigError(f"{field} ({where}) must be YAML of plain values: {error}") from error
    except (OSError, ValueError) as error:  # a name with a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{field} ({path}) must be a readable YAML file: {reason}") from error


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read one run.

    Args:
        path: YAML file of a RunConfig.
        overrides: `section.key=value`, values in YAML syntax; later ones win.
    Raises:
        ConfigError: the file is absent or no YAML mapping, a key is unknown, a value breaks a rule.
    """
    tree = read_yaml(path, "config")
    if not isinstance(tree, dict):
        raise ConfigError(f"config ({path}) must be a mapping of sections, it holds {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(first_problem(error)) from error
    if config.requires and not config.requires.is_absolute():
        config = config.model_copy(update={"requires": (path.parent / config.requires).resolve()})
    return config


def resolved_yaml(config: RunConfig) -> str:
    """Every field with its value, as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flat_keys(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested sections by `section.key`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ConfigError(f"override ({shown(override)}) must be section.key=value")
    try:
        value = parse_yaml(text)
    except UnreadableError as error:
        raise ConfigError(f"override ({shown(override)}) must have a YAML value: {error}") from error
    *sections, last = key.split(".")
    if len(sections) > MOST_DEPTH:
        raise ConfigError(f"override ({shown(override)}) must name a key of a section: none is nested so deeply")
    for section in sections:
        node = tree.setdefault(section, {})
        if isinstance(node, str):
            # A bare word is short for {name: word}.
            node = tree[section] = {"name": node}
        if not isinstance(node, dict):
            raise ConfigError(f"override ({shown(override)}) must name a key of a section: {section} is a value")
        tree = node
    tree[last] = value
