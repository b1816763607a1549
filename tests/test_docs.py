"""The docs name files that exist, and link to pages that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_a_path_in_backticks_exists(page: Path) -> None:
    missing = []
    for quoted in re.findall(r"`([\w./-]+)`", page.read_text()):
        named = quoted.partition("::")[0]
        of_the_repo = named.partition("/")[0] in ROOMS and "/" in named and "<" not in named
        if (
            of_the_repo
            and not named.startswith("demo/")
            and not (ROOT / named).exists()
            and not list(ROOT.glob(f"{named}.py"))
        ):
            missing.append(quoted)
    assert missing == [], f"{page.name} names what is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_a_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_architecture_page_has_every_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"tests"}
    assert [room for room in sorted(rooms) if f"`{room}/`" not in text] == []


@pytest.mark.parametrize("page", ["adding-a-family.md", "adding-a-target.md"])
def test_the_code_on_the_page_compiles(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    whole = [block for block in blocks if block.startswith('"""')]
    assert whole, page
    for block in whole:
        compile(block, page, "exec")
