"""Typed configuration: YAML and dotted overrides become one frozen ``Config``."""

from dist_obdsd.config.load import changed_settings, load_config, override_config, parse_config
from dist_obdsd.config.schema import Config

__all__ = ["Config", "changed_settings", "load_config", "override_config", "parse_config"]
