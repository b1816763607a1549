"""The command line as tests call it: in this process or in one of its own, and what it prints when it refuses."""

from __future__ import annotations

import subprocess
import sys

from click.testing import CliRunner, Result

from edgewright.cli import main

LITTLE_DATA = ("--calibration-tokens", "600", "--fisher-windows", "6")
"""A few hundred tokens where a user's run takes 32,768: the same path in seconds."""


def edgewright(*arguments: object, stdin: str | None = None) -> Result:
    command = [str(a) for a in arguments]
    if command and command[0] in ("export", "plan"):
        command[1:1] = LITTLE_DATA
    return CliRunner().invoke(main, command, input=stdin)


def process(*command: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], input=stdin, capture_output=True, text=True, check=False)


def passed(result: Result) -> str:
    """Standard output of a command that must succeed."""
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(result: Result) -> str:
    """The one line a user's mistake gives: exit code 2, nothing on standard output, no traceback."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    return only_error(result.stdout, result.stderr)


def only_error(stdout: str, stderr: str) -> str:
    assert stdout == ""
    assert "Traceback" not in stderr
    assert stderr.endswith("\n")
    *notes, last = stderr.splitlines()
    assert last.startswith("error: ")
    assert not last.startswith("error: unforeseen")
    assert len(last) < 600
    assert not any(line.startswith("error:") for line in notes)
    return last
