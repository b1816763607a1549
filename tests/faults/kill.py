"""An export that a signal ends at a random moment; the same command must then end in the same bytes and leave nothing else."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from helpers.killed_export import contents

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
_GONE_SECONDS = 5


@dataclass(frozen=True)
class Export:
    """A command to be killed: `export -m MODEL OPTIONS`. deterministic: whether each of its files is the same in every run."""

    model: Path
    options: tuple[str, ...]
    deterministic: bool = True

    def start(self, folder: Path) -> subprocess.Popen[bytes]:
        """The export to `folder`/out as a process, in a session of its own; its temporary files would lie in `folder`/tmp."""
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "edgewright.cli",
            "export",
            "-m",
            str(self.model),
            "--against",
            "none",
            *self.options,
        ]
        with (folder / "log").open("ab") as log:
            return subprocess.Popen(
                [*command, "-o", str(folder / "out")],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, "TMPDIR": str(folder / "tmp")},
                start_new_session=True,
            )


@dataclass(frozen=True)
class Whole:
    """What an export that nobody killed made, and how long it took, seconds."""

    contents: dict[str, str]
    seconds: float


def whole(export: Export, folder: Path) -> Whole:
    """Run the export once, unharmed."""
    began = time.monotonic()
    process = export.start(folder)
    if process.wait():
        raise AssertionError((folder / "log").read_text()[-2000:])
    return Whole(contents(folder / "out"), time.monotonic() - began)


def killed_once(export: Export, reference: Whole, folder: Path, rng: random.Random) -> str | None:
    """Kill one run of the export, and run it again. Returns what is wrong, None for nothing.

    Half of the signals go to a random process below the command, if there is one by then.
    """
    process = export.start(folder)
    moment, number, below = rng.uniform(0.05, reference.seconds), rng.choice(SIGNALS), rng.random() < 0.5
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    processes = [p for p in session(process.pid) if p != process.pid]
    target = rng.choice(processes) if below and processes else process.pid
    what = (
        f"{signal.Signals(number).name} to {'a child' if target != process.pid else 'the command'} after {moment:.2f} s"
    )
    with contextlib.suppress(ProcessLookupError):
        os.kill(target, number)
    try:
        code = process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return f"{what}: it did not end"
    if orphans := _remaining(process.pid):
        return f"{what}: left the processes {orphans}"
    if stray := _stray(folder):
        return f"{what}: left {stray[:3]}"
    if code == 0 and not (folder / "out").is_dir():
        return f"{what}: exit code 0 without a bundle"
    log = (folder / "log").read_text("utf-8", "replace")
    if "Traceback" in log:
        return f"{what}: {log[-600:]}"
    if not (folder / "out").exists():
        again = export.start(folder)
        if again.wait():
            return f"{what}: the second run failed: {(folder / 'log').read_text('utf-8', 'replace')[-600:]}"
    made = contents(folder / "out")
    if made.keys() != reference.contents.keys() or (export.deterministic and made != reference.contents):
        differing = sorted(
            k for k in made.keys() | reference.contents.keys() if made.get(k) != reference.contents.get(k)
        )
        return f"{what}: other bytes in {differing[:3]}"
    if left := sorted(p.name for p in folder.iterdir() if p.name not in ("out", "log", "tmp")):
        return f"{what}: left {left[:3]} beside the bundle"
    shutil.rmtree(folder)
    return None


def session(leader: int) -> list[int]:
    """The processes of a session."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(entry))
    return found


def _remaining(leader: int) -> list[int]:
    """Processes of the session that are still there after a few seconds."""
    until = time.monotonic() + _GONE_SECONDS
    while (found := session(leader)) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def _stray(folder: Path) -> list[str]:
    """Files outside the bundle and the unfinished folder."""
    top = [p.name for p in folder.iterdir() if p.name not in ("out", "log", "tmp") and not p.name.startswith(".out.")]
    return top + [f"tmp/{p.name}" for p in (folder / "tmp").iterdir()]
