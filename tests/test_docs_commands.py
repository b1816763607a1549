"""Every command line in the docs parses: its command, options and values are there."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from edgewright.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]


def commands(page: Path) -> Iterator[str]:
    """The lines of code blocks, and of indented code, that call edgewright; continued lines are joined."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    for block in re.findall(r"^```(?:sh|console|bash|)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield from re.findall(r"^(?:\$ )?(edgewright .*)$", block, re.MULTILINE)
    yield from re.findall(r"^    (edgewright .*)$", text, re.MULTILINE)
    yield from re.findall(r"(?<!`)`(edgewright [a-z][^`\n…]*)`(?!`)", text)


FOUND = sorted({(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in commands(page)})


def parse(words: list[str]) -> None:
    """As the command line would, without running anything."""
    command: click.Command = main
    while isinstance(command, click.Group):
        name, words = words[0], words[1:]
        found = command.commands.get(name)
        assert found is not None, f"no command {name}"
        command = found
    if words:  # a command's name alone is a mention of it
        with contextlib.suppress(click.MissingParameter):  # a mention may leave out what is plain
            # click keeps the help option that a command first has: without its parent another one
            command.make_context(name, words, parent=click.Context(main, **main.context_settings))


@pytest.mark.parametrize(("page", "line"), FOUND)
def test_a_command_in_the_docs_parses(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    for stop in ("|", "<", ">", "2>", "&&", ";"):
        if stop in words:
            words = words[: words.index(stop)]
    parse(words[1:])


def test_the_docs_have_commands() -> None:
    assert len(FOUND) > 25
    assert {"README.md", "docs/running.md"} <= {page for page, _ in FOUND}


def test_a_wrong_command_would_be_found() -> None:
    for line in ("run b --promt x", "exprt", "export -m x --bits many", "devices shw x"):
        with pytest.raises((click.UsageError, AssertionError)):
            parse(shlex.split(line))
