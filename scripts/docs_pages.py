"""MkDocs' hook (mkdocs.yml): README.md and its neighbours as pages, and links that lead out of docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from mkdocs.structure.files import File, Files

ROOT: Final = Path(__file__).resolve().parents[1]
PAGES: Final = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",  # docs/security.md has the other name
}
_LINK: Final = re.compile(r"(?<!!)\[([^\[\]]+)\]\(([^()\s]+)\)")
_PICTURE: Final = re.compile(r"(!\[[^\[\]]*\]\()docs/")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie beside docs/."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=_within((ROOT / name).read_text(encoding="utf-8"), "")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """What GitHub reads and Python-Markdown does not: lists and paragraphs within a list by three spaces,
    items right below such a paragraph, tables right below code. Links that leave docs/."""
    text = markdown if page.file.src_uri in PAGES.values() else _within(markdown, "../")
    parts = re.split(r"(^ *```.*?^ *```$)", text, flags=re.MULTILINE | re.DOTALL)
    for i in range(0, len(parts), 2):
        part = re.sub(r"^ {3}(?=\S)", "    ", parts[i], flags=re.MULTILINE)
        part = re.sub(r"(\n\n(?: {4}.*\n)+)(?=\d+\. |[-*] )", r"\1\n", part)
        parts[i] = re.sub(r"\A\n(?=\|)", "\n\n", part)
    return "".join(parts)


def _within(text: str, up: str) -> str:
    """A document with its links as they are on the site; ``up`` leads from the document's folder to the repository's."""

    def link(match: re.Match[str]) -> str:
        label, target = match[1], match[2]
        name, hash_, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not name:
            return match[0]
        if up and not name.startswith(up):  # within docs/, where only folders are no pages
            return match[0] if Path(name).suffix else label
        path = name.removeprefix(up)
        if path in PAGES:
            return f"[{label}]({PAGES[path]}{hash_}{anchor})"
        if path.startswith("docs/") and path.endswith((".md", ".json", ".svg")):
            return f"[{label}]({path.removeprefix('docs/')}{hash_}{anchor})"
        return match[0] if not up and path.endswith(".md") else label

    return _LINK.sub(link, _PICTURE.sub(r"\1", text) if not up else text)
