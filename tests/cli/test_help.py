"""The command line as a person meets it: options by purpose, examples, near names, completion."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess

import click
import pytest
from helpers.cli_runner import edgewright, passed, refused

from edgewright.cli import main
from edgewright.commands.help import EXAMPLES, GROUPS, SHELLS

COMMANDS = sorted(name for name, command in main.commands.items() if not isinstance(command, click.Group))


def options(name: str) -> list[click.Option]:
    return [p for p in main.commands[name].params if isinstance(p, click.Option)]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_option_once_by_its_purpose(name: str) -> None:
    text = passed(edgewright(name, "--help"))
    for option in options(name):
        longest = max(option.opts, key=len)
        lines = re.findall(rf"^  (?:-\S+, )?{re.escape(longest)}(?![\w-])", text, re.MULTILINE)
        assert len(lines) == (0 if option.hidden else 1), longest
    others = text.partition("\nOptions:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split(",")[0].strip() for line in others if line.startswith("  -")][-1:] == ["-h"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_two_examples_that_parse(name: str) -> None:
    text = passed(edgewright(name, "--help"))
    for example in EXAMPLES[name]:
        assert example in text
        words = shlex.split(example.removeprefix('eval "$(').removesuffix(')"'))
        words = words[: next((i for i, word in enumerate(words) if word in ("<", ">")), len(words))]
        main.commands[name].make_context(name, words[2:], parent=click.Context(main, **main.context_settings))
    assert len(EXAMPLES[name]) == 2


def test_every_name_in_a_group_is_an_option() -> None:
    known = {option.name for name in COMMANDS for option in options(name)}
    known |= {
        p.name
        for group in main.commands.values()
        if isinstance(group, click.Group)
        for c in group.commands.values()
        for p in c.params
    }
    assert {name for names in GROUPS.values() for name in names} - known == set()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("exprt",), "no command 'exprt' (did you mean export?)"),
        (("devces",), "did you mean devices?"),
        (("qqq",), "there is no command 'qqq' (see"),
        (("run", "b", "--promt", "x"), "--prompt"),
        (("export", "-m", "x", "--format", "onx", "-o", "b"), "--format onx is not known (did you mean onnx?)"),
        (("devices", "show", "pixel"), "unknown device 'pixel'"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(arguments: tuple[str, ...], line: str) -> None:
    assert line in refused(edgewright(*arguments))


@pytest.mark.parametrize("shell", SHELLS)
def test_completion(shell: str) -> None:
    script = passed(edgewright("completion", shell))
    assert f"_EDGEWRIGHT_COMPLETE={shell}_complete" in script
    if shutil.which(shell) and shell != "fish":
        subprocess.run([shell, "-n"], input=script, text=True, check=True, env=dict(os.environ))
