"""Write docs/parts.md and docs/reference.md: ``python docs/make_parts.py`` (``make parts``).

The first has the tables of what a config chooses between, the second the public names with their docstrings.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import dist_obdsd
from dist_obdsd.config import registry
from dist_obdsd.inference import ImageEmbedder

PARTS = """# Parts that a config chooses between

Made by `make parts` from [config/registry.py](../dist_obdsd/config/registry.py) and the parts'
signatures and docstrings.
"""
REFERENCE = """# Reference: the public names

Made by `make parts` from the docstrings. All names are imported from `dist_obdsd`; [library.md](library.md) shows how
they work together.
"""
SECTIONS = ("Args:", "Returns:", "Raises:", "Yields:")


def parts() -> str:
    """Build the page of the registry's tables."""
    tables = [value for value in vars(registry).values() if isinstance(value, registry.Registry)]
    return PARTS + "".join(_table(table) for table in tables)


def _table(table: registry.Registry) -> str:
    lines = [f"\n## `{table.setting}`: {table.kind}\n", "| name | what it is | settings |", "|---|---|---|"]
    for name in table.paths:
        part = table.source(name)
        listed = [f"`{s.name}` ({_default(s.default)}){s.meaning and ': ' + s.meaning}" for s in part.settings]
        lines.append(f"| `{name}` | {part.summary} | {'<br>'.join(listed)} |")
    return "\n".join(lines) + "\n"


def _default(value: object) -> str:
    return "needed" if value is ... else "unset" if value is None else str(value)


def reference() -> str:
    """Build the page of the public names: signature, docstring, and a class's public methods."""
    blocks = [REFERENCE.strip()]
    things = {name: getattr(dist_obdsd, name) for name in dist_obdsd.__all__} | {"ImageEmbedder": ImageEmbedder}
    for name, thing in things.items():
        if not callable(thing):
            continue
        blocks += [f"## {name}", _signature(thing, name), *_markdown(inspect.getdoc(thing) or "")]
        if not inspect.isclass(thing):
            continue
        blocks += _markdown(inspect.cleandoc(getattr(vars(thing).get("__init__"), "__doc__", None) or ""))
        for method, value in vars(thing).items():
            inner = getattr(value, "__func__", value)  # of a class method
            if (method[0] != "_" or method == "__call__") and inspect.isfunction(inner) and inner.__doc__:
                blocks += [f"### {name}.{method}", _signature(inner, method), *_markdown(inspect.getdoc(inner) or "")]
            elif isinstance(value, property) and value.__doc__ and method[0] != "_":
                blocks += [f"### {name}.{method}", *_markdown(inspect.getdoc(value) or "")]
    return "\n\n".join(blocks) + "\n"


def _signature(thing: object, name: str) -> str:
    found = inspect.signature(thing)  # type: ignore[arg-type]
    shown = [p.replace(annotation=_plain(p.annotation)) for p in found.parameters.values() if p.name != "self"]
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(found.replace(parameters=shown)))  # annotations that are texts
    text = re.sub(r"\b(?:\w+\.)+(?=[A-Z])|(?<!\w)numpy\.(?=ndarray)", "", text).replace("'", '"')
    if inspect.isclass(thing):
        text = text.removesuffix(" -> None")
    if len(name + text) > 100:
        inside, arrow, answer = text[1:].rpartition(") -> ")
        text = "(\n" + "".join(f"    {part},\n" for part in _split(inside if arrow else text[1:-1])) + ")"
        text += f" -> {answer}" if arrow else ""
    return f"```python\n{name}{text}\n```"


def _plain(annotation: Any) -> Any:
    """Drop what pydantic checks from a type."""
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[0]
    if get_origin(annotation) is Union:
        return " | ".join(inspect.formatannotation(_plain(kind)) for kind in get_args(annotation))
    return annotation


def _split(text: str) -> list[str]:
    """Cut at the commas outside of brackets."""
    found, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        found[-1] += letter
        if letter == "," and not depth:
            found[-1] = found[-1][:-1]
            found.append("")
    return [part.strip() for part in found]


def _markdown(docstring: str) -> Iterator[str]:
    """Turn a docstring into blocks: paragraphs, ``::`` code, doctests, and sections as lists."""
    section = code = ""
    for block in re.split(r"\n\s*\n", docstring):
        lines = block.splitlines()
        if not block.strip():
            continue
        if block.lstrip().startswith(">>>") or (code and lines[0].startswith(" ")):
            yield "```python\n" + inspect.cleandoc("\n" + block) + "\n```"
            continue
        code = "::" if block.rstrip().endswith("::") else ""
        if lines[0] in SECTIONS:
            section, lines = lines[0], lines[1:]
            yield f"**{section[:-1]}**"
            entries: list[str] = []
            for line in (line[4:] for line in lines):
                if line.startswith(" ") and entries:
                    entries[-1] += " " + line.strip()
                else:
                    entries.append(line)
            named = section in ("Args:", "Raises:")
            yield "\n".join(f"- {_entry(entry)}" for entry in entries) if named else _inline(" ".join(entries))
        else:
            yield _inline("\n".join(line.rstrip() for line in lines).removesuffix(":") if code else "\n".join(lines))


def _entry(text: str) -> str:
    name, colon, meaning = text.partition(": ")
    return f"`{name}`: {_inline(meaning)}" if colon else _inline(text)


def _inline(text: str) -> str:
    return text.replace("``", "`")


if __name__ == "__main__":
    Path(__file__).with_name("parts.md").write_text(parts())
    Path(__file__).with_name("reference.md").write_text(reference())
