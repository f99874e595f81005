"""Sections of the training methods, tagged by `name`: ours, or one from elsewhere by its import path."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from afd_scale.config.methods.afd import AfdConfig
from afd_scale.config.methods.dmd import DmdConfig
from afd_scale.config.methods.gan import GanConfig
from afd_scale.config.methods.method import MethodConfig
from afd_scale.config.methods.sft import SftConfig

METHODS: Mapping[str, type[MethodConfig]] = {"afd": AfdConfig, "dmd": DmdConfig, "gan": GanConfig, "sft": SftConfig}

__all__ = ["METHODS", "AfdConfig", "DmdConfig", "GanConfig", "MethodConfig", "SftConfig", "method_class"]


def method_class(values: Mapping[str, Any]) -> type[MethodConfig]:
    """The section that a method's `name` stands for.

    Raises:
        ValueError: there is none.
    """
    name = values.get("name")
    if isinstance(name, str) and ":" in name:
        return _imported(name)
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"name ({name}) must be one of {', '.join(METHODS)}, or module:Class of a MethodConfig")
    return METHODS[name]


def _imported(name: str) -> type[MethodConfig]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"name ({name}) must be module:Class of a MethodConfig to import: {error}") from error
    if not (isinstance(found, type) and issubclass(found, MethodConfig)):
        raise ValueError(f"name ({name}) must be module:Class of a MethodConfig: it is no such class")
    return found
