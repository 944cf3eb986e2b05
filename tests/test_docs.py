"""The documents: README's limits, links that lead somewhere, and pictures and drawings that are what code says."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.test_house import RANK

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^( *)(```+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")


def prose(path: Path) -> str:
    """The text of a document without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text()))


@cache
def anchors(path: Path) -> set[str]:
    """What `#...` may say of a document: its headings, as GitHub and MkDocs both name them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        found.add(re.sub(r" ", "-", re.sub(r"[^\w\- ]", "", text)))
    return found


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    dead = []
    for link in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or not target.is_relative_to(ROOT) or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def test_links_are_seen_by_the_test_above(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(
        "# The `first` token, again\n[b](b.md#x) and ![c](c.svg)\n```\n[no](x.md)\n```\n`[no](y.md)` [[1]](d.md)\n"
    )
    assert LINK.findall(prose(tmp_path / "a.md")) == ["b.md#x", "c.svg", "d.md"]
    assert anchors(tmp_path / "a.md") == {"the-first-token-again"}


def test_documents_that_code_and_text_name_are_there() -> None:
    sources = [path for top in ("kvtuner_search", "kernels", "scripts", "tests") for path in (ROOT / top).rglob("*.py")]
    named = {name for path in [*sources, *DOCUMENTS] for name in re.findall(r"\bdocs/[\w-]+\.md\b", path.read_text())}
    assert len(named) > 15
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def test_readme_leads_to_every_document() -> None:
    named = {link.partition("#")[0] for link in LINK.findall((ROOT / "README.md").read_text())}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")} - named == set()


def test_the_site_has_every_document() -> None:
    """`scripts/docs` builds it; README.md and its neighbours are pages by another name (scripts/docs_pages.py)."""
    named = re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    beside = {"index.md", "reporting.md", "contributing.md", "changelog.md"}
    assert sorted(named) == sorted({path.name for path in (ROOT / "docs").glob("*.md")} | beside)


def test_the_picture_is_what_the_script_draws_from_the_record(tmp_path: Path) -> None:
    record = ROOT / "docs/records/quality/qwen2.5-coder-0.5b.json"
    subprocess.run([sys.executable, ROOT / "scripts/draw_quality", record, tmp_path / "quality.svg"], check=True)
    assert (tmp_path / "quality.svg").read_bytes() == (ROOT / "docs/images/quality.svg").read_bytes()


def test_the_architecture_names_modules_that_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    assert len(named) > 80
    folders = (ROOT / "kvtuner_search", ROOT / "kernels", ROOT)
    assert {name for name in named if not any((folder / name).is_file() for folder in folders)} == set()


def test_the_architecture_draws_the_ranks_of_the_house() -> None:
    drawn = (ROOT / "docs/architecture.md").read_text().split("```\nrank\n")[1].split("```")[0]
    rows = [line.split() for line in drawn.splitlines()]
    assert {part: int(rank) for rank, *parts in rows for part in parts} == RANK


def test_contributing_has_the_ranks_of_the_house() -> None:
    rows = re.findall(r"^\| (\d) \| (.+?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert {part: int(rank) for rank, parts in rows for part in re.findall(r"`([\w.]+)`", parts)} | {
        "__main__": 9
    } == RANK
