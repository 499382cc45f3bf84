"""Typed configuration: YAML and dotted overrides become one frozen ``Config``.

The names are imported when first used, so that ``--help`` and the registry do without pydantic.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_obdsd.config.load import changed_settings as changed_settings
    from dist_obdsd.config.load import load_config as load_config
    from dist_obdsd.config.load import override_config as override_config
    from dist_obdsd.config.load import parse_config as parse_config
    from dist_obdsd.config.schema import Config as Config
else:

    def __getattr__(name: str) -> Any:
        if name not in ("Config", "changed_settings", "load_config", "override_config", "parse_config"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from dist_obdsd.config import load

        return getattr(load, name)
