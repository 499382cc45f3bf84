"""Write docs/parts.md, the tables of what a config chooses between: ``python docs/make_parts.py`` (``make parts``)."""

from pathlib import Path

from dist_obdsd.config import registry

HEAD = """# Parts that a config chooses between

Made by `make parts` from [config/registry.py](../dist_obdsd/config/registry.py) and the parts'
signatures and docstrings.
"""


def page() -> str:
    """Build the page's text."""
    tables = [value for value in vars(registry).values() if isinstance(value, registry.Registry)]
    return HEAD + "".join(_section(table) for table in tables)


def _section(table: registry.Registry) -> str:
    lines = [f"\n## `{table.setting}`: {table.kind}\n", "| name | what it is | settings |", "|---|---|---|"]
    for name in table.names:
        part = table.source(name)
        listed = [f"`{s.name}` ({_default(s.default)}){s.meaning and ': ' + s.meaning}" for s in part.settings]
        lines.append(f"| `{name}` | {part.summary} | {'<br>'.join(listed)} |")
    return "\n".join(lines) + "\n"


def _default(value: object) -> str:
    return "needed" if value is ... else "unset" if value is None else str(value)


if __name__ == "__main__":
    Path(__file__).with_name("parts.md").write_text(page())
