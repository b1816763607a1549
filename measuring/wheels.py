"""Wheels of onnxruntime and numpy for another machine, by this machine's pip."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..system.reading import one_line

_OLDEST_GLIBC = 17
"""The second number of the oldest glibc that wheels are made for (manylinux2014)."""


def platforms(machine: str, libc: Sequence[str]) -> list[str]:
    """The platform tags that a machine takes, newest first; [] where none is known. libc: name and version."""
    if not re.fullmatch(r"[A-Za-z0-9_]{1,32}", machine) or len(libc) < 2 or libc[0] != "glibc":
        return []
    found = re.fullmatch(r"2\.(\d{1,3})", libc[1])
    if found is None:
        return []
    newest = int(found[1])
    return [f"manylinux_2_{minor}_{machine}" for minor in range(newest, _OLDEST_GLIBC - 1, -1)] + [
        f"manylinux2014_{machine}"
    ]


def fetch_wheels(url: str, machine: str, python: str, libc: Sequence[str], oldest: str, folder: Path) -> list[Path]:
    """Download them into `folder`. oldest: release of onnxruntime; the newest is this machine's.

    Raises UserError where there are none.
    """
    tags = platforms(machine, libc)
    version = re.match(r"(3)\.(\d{1,2})\b", python)
    where = f"{one_line(machine, 40)}, Python {one_line(python, 20)}, {one_line(' '.join(libc) or 'an unknown C library', 40)}"
    if not tags or version is None:
        raise UserError(
            f"{url}: there are no wheels of onnxruntime for {where}; install it there from the device's own packages"
        )
    newest = importlib.metadata.version("onnxruntime")
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [
        "--only-binary=:all:",
        "--implementation",
        "cp",
        "--python-version",
        f"3.{version[2]}",
        "--dest",
        str(folder),
    ]
    command += [word for tag in tags for word in ("--platform", tag)]
    command += [f"onnxruntime>={oldest},<={newest}", "numpy"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1800, check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or len(found) != 2:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        raise UserError(
            f"{url}: pip finds no onnxruntime {oldest} to {newest} for {where} ({one_line(lines[-1], 120)}); "
            "install it there, or give a newer Python with --device-python"
        )
    return found
