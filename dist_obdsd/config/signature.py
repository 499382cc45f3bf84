"""The arguments of a registered class or function, read from its source file.

Importing the part would import torch, which takes seconds; a mistake in a config should be refused at once.
"""

import ast
import importlib.util
import re
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from dist_obdsd.config import base


class Setting(NamedTuple):
    """One argument of a part that a user may set."""

    name: str
    annotation: Any
    default: Any  # ... where the argument has none
    meaning: str


class Source(NamedTuple):
    """A part as its source file describes it."""

    summary: str  # first line of its docstring
    bases: frozenset[str]  # names of a class's direct bases
    settings: tuple[Setting, ...]  # positional arguments: the user sets them
    arguments: frozenset[str]  # keyword-only arguments: the program fills them in


@cache
def read_source(path: str) -> Source:
    """Read ``module:attribute`` without importing the module."""
    module, _, attribute = path.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"there is no module {module}"
    # The loader also reads from a zip file, in which a logged model carries the package.
    tree = ast.parse(spec.loader.get_source(module))  # type: ignore[union-attr]
    found = next(node for node in tree.body if getattr(node, "name", None) == attribute)
    assert isinstance(found, ast.ClassDef | ast.FunctionDef)
    inside = [found] if isinstance(found, ast.FunctionDef) else [*found.body, *ast.parse("def __init__(): ...").body]
    function = next(node for node in inside if getattr(node, "name", None) in ("__init__", attribute))
    assert isinstance(function, ast.FunctionDef)
    return Source(
        (ast.get_docstring(found) or "").partition("\n")[0],
        frozenset(ast.unparse(node) for node in getattr(found, "bases", [])),
        tuple(_settings(function)),
        frozenset(arg.arg for arg in function.args.kwonlyargs),
    )


def _settings(function: ast.FunctionDef) -> Iterator[Setting]:
    names = {**vars(typing), **vars(base)}
    arguments = [argument for argument in function.args.args if argument.arg != "self"]
    given = [ast.literal_eval(default) for default in function.args.defaults]
    defaults = [...] * (len(arguments) - len(given)) + given
    meanings = _meanings(ast.get_docstring(function) or "")
    for argument, default in zip(arguments, defaults, strict=True):
        assert argument.annotation is not None, f"{argument.arg} has no type"
        annotation = eval(ast.unparse(argument.annotation), names)
        yield Setting(argument.arg, annotation, default, meanings.get(argument.arg, ""))


def _meanings(docstring: str) -> dict[str, str]:
    """Read the ``Args:`` of a docstring: name -> text."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", docstring, re.MULTILINE)
    entries = re.split(r"^    (?=\w+: )", section[1], flags=re.MULTILINE) if section else []
    return {name: " ".join(text.split()) for name, _, text in (entry.partition(": ") for entry in entries) if text}
