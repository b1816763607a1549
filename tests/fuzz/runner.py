"""Runs mutants in processes of their own and says which of them broke a rule.

The rules: a reader returns or raises UserError or VerificationFailure; nothing crashes, hangs for 20 s, takes 2 GiB more, or
leaves a file behind. A mutant is named by its target and number, from which it is made again.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgewright.bundle import MANIFEST
from edgewright.errors import UserError, VerificationFailure
from edgewright.system.hashes import of_file
from fuzz.targets import Fuzzed

HANG_SECONDS = 20.0
MEMORY = 2 << 30
_KEPT = ("bundle/reports", "out")
"""What a command may leave: its reports and its result."""


@dataclass(frozen=True)
class Failure:
    """target, number: of the mutant. what: the rule that it broke."""

    target: str
    number: int
    what: str


def fuzz(name: str, fuzzed: Fuzzed, seeds: Path, numbers: range, patience: float = HANG_SECONDS) -> Iterator[Failure]:
    """Run the mutants `numbers` of a target. After a crash, or `patience` seconds, a new process goes on with the next one."""
    done = mmap.mmap(-1, 16)  # number under way, and time it began; shared with the child
    start = numbers.start
    while start < numbers.stop:
        reader, writer = os.pipe()
        struct.pack_into("<qd", done, 0, start, time.monotonic())
        child = os.fork()
        if not child:
            os.close(reader)
            status = 1
            try:
                with os.fdopen(writer, "w") as report:
                    _work(name, fuzzed, seeds, range(start, numbers.stop), done, report)
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        ended = _wait(child, done, patience)
        with os.fdopen(reader) as lines:
            yield from (Failure(name, *json.loads(line)) for line in lines)
        at = struct.unpack_from("<qd", done)[0]
        if ended == "":
            return
        yield Failure(name, at, ended)
        start = at + 1


def _wait(child: int, done: mmap.mmap, patience: float) -> str:
    """How a child ended: "" for well."""
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return "" if code == 0 else f"crash: status {code}"
        began = struct.unpack_from("<qd", done)[1]  # 0 while it is being written
        if began and time.monotonic() - began > patience:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"hang: more than {patience:g} s"
        time.sleep(0.005)


def _work(name: str, fuzzed: Fuzzed, seeds: Path, numbers: range, done: mmap.mmap, report: object) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (address_space + MEMORY, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _copy(fuzzed, seeds, folder)
        honest = _listing(folder)
        for number in numbers:
            struct.pack_into("<qd", done, 0, number, time.monotonic())
            changed = _mutate(name, fuzzed, seeds, folder, number)
            what = _run(fuzzed, folder)
            stray = sorted(n for n in _listing(folder) - honest if not n.startswith(_KEPT))
            if what is None and stray:
                what = f"left behind: {stray[:3]}"
            if what is not None:
                print(json.dumps([number, f"{changed}: {what}"]), file=report, flush=True)  # type: ignore[arg-type]
            if stray or (folder / "out").exists() or changed.startswith("bundle"):
                shutil.rmtree(folder)
                _copy(fuzzed, seeds, folder)
            else:
                shutil.copyfile(seeds / changed, folder / changed)


def _run(fuzzed: Fuzzed, folder: Path) -> str | None:
    """What went wrong, in short; None for nothing."""
    try:
        fuzzed.run(folder)
    except (UserError, VerificationFailure) as error:
        if "\n" in str(error):
            return f"an error of several lines: {error!r:.300}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
    return None


def _mutate(name: str, fuzzed: Fuzzed, seeds: Path, folder: Path, number: int) -> str:
    """Change one of the target's files, and in a bundle its hash too. Returns its name."""
    rng = random.Random(f"{name} {number}")
    file = rng.choice(sorted(fuzzed.files))
    (folder / file).write_bytes(fuzzed.files[file]((seeds / file).read_bytes(), rng))
    manifest = folder / "bundle" / MANIFEST
    if file.startswith("bundle/") and not file.endswith(MANIFEST):
        contents = json.loads(manifest.read_text())
        contents["files"][file.removeprefix("bundle/")] = of_file(folder / file)
        manifest.write_text(json.dumps(contents))
    return file


def _copy(fuzzed: Fuzzed, seeds: Path, folder: Path) -> None:
    for name in {*fuzzed.files, *fuzzed.needs}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (seeds / name).is_dir():
            shutil.copytree(seeds / name, folder / name, dirs_exist_ok=True)
        else:
            shutil.copyfile(seeds / name, folder / name)


def _listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
