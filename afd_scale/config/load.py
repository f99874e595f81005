"""From a YAML file and overrides to a checked RunConfig, and back to YAML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from afd_scale.config.run import RunConfig
from afd_scale.config.section import first_problem


class ConfigError(ValueError):
    """One line: field (value), rule, reason."""


class LostInputError(Exception):
    """What one rank alone meets, input that can no longer be read or ranks that do not come; one line as above."""


def one_line(error: object) -> str:
    """What an error says, whatever line breaks are in it."""
    return " ".join(str(error).split())


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read one run.

    Args:
        path: YAML file of a RunConfig.
        overrides: `section.key=value`, values in YAML syntax; later ones win.
    Raises:
        ConfigError: the file is absent or no YAML mapping, a key is unknown, a value breaks a rule.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"config ({path}) must be a readable YAML file: {reason}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config ({path}) must be YAML: {one_line(error)}") from error
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


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ConfigError(f"override ({override}) must be section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override ({override}) must have a YAML value: {one_line(error)}") from error
    *sections, last = key.split(".")
    for section in sections:
        node = tree.setdefault(section, {})
        if isinstance(node, str):
            # A bare word is short for {name: word}.
            node = tree[section] = {"name": node}
        if not isinstance(node, dict):
            raise ConfigError(f"override ({override}) must name a key of a section: {section} is a value")
        tree = node
    tree[last] = value
