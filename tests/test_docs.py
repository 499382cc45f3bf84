"""The documentation names only what there is: links, files, functions, settings, commands and error messages.

Text is all that is read, so none of it starts torch.
"""

import ast
import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from dist_obdsd.cli import parser as cli
from dist_obdsd.config import Config
from dist_obdsd.config.load import setting_types

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "dist_obdsd").rglob("*.py"))
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "shards" / "README.md"])

SECTIONS = [name for name in Config.model_fields if f"{name}." in " ".join(setting_types())]
SETTING = re.compile(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.([a-z_]+)(?![\w/(])(?!\.[a-z]*\d)")
SUFFIXES = ("yaml", "jsonl", "json", "md", "py", "onnx", "sh")
FREE = ("ranking.kwargs", "ranking.miner_kwargs")
"""Settings whose inner names are another library's."""
SHORTEST = 12
"""Letters that a quoted message needs, so that it can be told from others."""
COMMAND = re.compile(r"(?<![/\"])(?:dist-obdsd|(?:-m|--module) dist_obdsd) ((?:'[^']*'|\"[^\"]*\"|[^'\"|>;&#])*)")
FOLDERS = re.compile(r"(?<![\w/.-])((?:dist_obdsd|configs|launch|shards|tests|examples|docs)/[\w./-]*\w)")


def prose_and_code(text: str) -> tuple[str, list[str]]:
    """A page without its code blocks, and the lines of these."""
    parts = re.split(r"^```.*$", text, flags=re.MULTILINE)
    return "".join(parts[::2]), [line for part in parts[1::2] for line in part.replace("\\\n", " ").splitlines()]


# ---- what a page may get wrong: each yields the mistakes of a page's text -------------------------------------------


def broken_links(text: str, page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_and_code(text)[0]):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            yield target


def anchors(page: Path) -> list[str]:
    """Those that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose_and_code(page.read_text())[0], flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings]


def missing_files(text: str, page: Path) -> Iterator[str]:
    made = set(re.findall(r"\bcp \S+ (\S+)", text))
    for path in FOLDERS.findall(text):
        known = path in made or (ROOT / path).exists() or (page.parent / path).exists()
        if not known and path != "launch/hostfile":  # the user's own
            yield path


def missing_names(text: str, page: Path) -> Iterator[str]:
    """Of `` `name` in [file](path)``: a name that the file does not define."""
    for name, path in re.findall(r"`([\w.]+)` in\s+\[[^]]*\]\(([^)]+\.py)\)", text):
        source = (page.parent / path).read_text()
        if not all(re.search(rf"\b(?:def|class) {part}\b", source) for part in name.split(".")):
            yield f"{name} in {path}"


def unknown_settings(text: str, page: Path) -> Iterator[str]:
    known = setting_types()
    for match in SETTING.finditer(text):
        name = match.group(0)
        if match.group(2) not in SUFFIXES and name not in known and not name.startswith(FREE):
            yield name


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every ``dist-obdsd`` in code, without pipes, redirections and comments."""
    prose, lines = prose_and_code(text)
    for line in [*lines, *re.findall(r"`(dist-obdsd [^`]+)`", prose)]:
        yield from map(shlex.split, COMMAND.findall(line))


def refused_commands(text: str, page: Path) -> Iterator[str]:
    for arguments in commands(text):
        try:
            # A command that is only mentioned must exist.
            options = cli.parse(arguments if len(arguments) > 1 else [*arguments, "--help"])
        except SystemExit as exit:
            if exit.code != 0:
                yield shlex.join(arguments)
            continue
        for override in getattr(options, "overrides", []):
            key = override.partition("=")[0]
            inner = key.startswith(("options.", *FREE))  # of a recipe; of another library
            if "=" not in override or not (inner or key in setting_types()):
                yield shlex.join(arguments)


def unknown_messages(text: str, page: Path) -> Iterator[str]:
    """In tables headed ``message``: a text that no file of ours can say. An ellipsis stands for anything."""
    for table in re.findall(r"^\| message \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, flags=re.MULTILINE):
        for cell in re.findall(r"^\| (.*?) \|", table, flags=re.MULTILINE):
            for quote in re.findall(r"`([^`]+)`", cell):
                parts = [part for part in quote.split("…") if part.strip()]
                pattern = re.compile(".*?".join(map(re.escape, parts)))
                if len("".join(parts)) < SHORTEST or not any(map(pattern.search, sources())):
                    yield quote


@cache
def sources() -> list[str]:
    """The package's files, with a text that is cut into literals in one piece."""
    return [re.sub(r"[\"']\s+(?:\+ )?f?[\"']", "", path.read_text()) for path in PACKAGE]


Check = Callable[[str, Path], Iterator[str]]
CHECKS: list[Check] = [broken_links, missing_files, missing_names, unknown_settings, refused_commands, unknown_messages]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_only_what_there_is(page: Path, check: Check) -> None:
    assert list(check(page.read_text(), page)) == []


def test_commands_in_comments_of_configs_are_accepted() -> None:
    paths = [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "shards").glob("*.yaml")]
    lines = [line for path in paths for line in re.findall(r"^# +(dist-obdsd .+)$", path.read_text(), re.MULTILINE)]
    assert len(lines) >= 5
    assert list(refused_commands("\n".join(["```", *lines, "```"]), ROOT)) == []


MISTAKES: list[tuple[Check, str]] = [
    (broken_links, "see [the method](methods.md)"),
    (broken_links, "see [the method](method.md#no-such-heading)"),
    (missing_files, "read dist_obdsd/objective/none.py"),
    (missing_names, "`OBDSDLoss.lost` in [objective.py](../dist_obdsd/losses/obdsd.py)"),
    (unknown_settings, "set `data.lane=8`"),
    (unknown_settings, "```\ndist-obdsd train CONFIG tracking.url=http://x\n```\n"),
    (refused_commands, "```\ndist-obdsd train CONFIG --loud\n```\n"),
    (refused_commands, "```\ntorchrun -m dist_obdsd tain CONFIG  # a comment\n```\n"),
    (refused_commands, "| `dist-obdsd pack folder --out x --depth 2` |\n"),
    (unknown_messages, "| message | what |\n|---|---|\n| `the shards are … broken beyond repair` | buy new ones |\n"),
    (unknown_messages, "| message | what |\n|---|---|\n| `is … an` | too short to mean anything |\n"),
]


@pytest.mark.parametrize(("check", "text"), MISTAKES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_mistake_is_found(check: Check, text: str) -> None:
    assert len(list(check(text, ROOT / "docs" / "x.md"))) == 1


def long_or_wordy(source: str) -> Iterator[str]:
    """First lines of docstrings that are too long, or begin with a question's word."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            if len(first) > 80 or re.match(r"(What|Who|How|Of|Whether)\b", first):
                yield first


def test_docstrings_begin_with_a_short_phrase() -> None:
    files = (ROOT / "dist_obdsd").rglob("*.py")
    assert [line for path in files for line in long_or_wordy(path.read_text())] == []
    assert len(list(long_or_wordy('def f():\n    """Whether it is so."""\n'))) == 1  # the control


@pytest.mark.parametrize("page", ["parts", "reference"])
def test_a_page_that_is_made_is_current(page: str) -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_parts.py"))[page]()
    assert made == (ROOT / "docs" / f"{page}.md").read_text(), "run `make parts`"
