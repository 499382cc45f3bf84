"""mkdocs' hook: the README is the home page, and links to code lead to ``repo_url`` where mkdocs.yml has one."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]\n]*)\]\((?!https?:|#)([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    home = re.sub(r"\]\(docs/", "](", (ROOT / "README.md").read_text())
    files.append(File.generated(config, "index.md", content=home))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **more: Any) -> str:
    def outside(match: re.Match[str]) -> str:
        text, target = match[1], match[2].removeprefix("../").partition("#")[0]
        if target == "README.md":
            return f"[{text}](index.md)"
        if not (match[2].startswith("../") or page.file.src_uri == "index.md") or (ROOT / "docs" / target).exists():
            return match[0]
        return f"[{text}]({config.repo_url}/blob/main/{target})" if config.repo_url else text

    return LINK.sub(outside, markdown)
