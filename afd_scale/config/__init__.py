"""What a run is: typed sections, one YAML file plus `section.key=value` overrides, cross-field checks."""

from afd_scale.config.errors import ConfigError, LostInputError, one_line
from afd_scale.config.load import load_config, read_yaml, resolved_yaml
from afd_scale.config.run import RunConfig

__all__ = ["ConfigError", "LostInputError", "RunConfig", "load_config", "one_line", "read_yaml", "resolved_yaml"]
