"""Work in a Python process of its own: `python -P -m MODULE JOB RESULT`, two JSON files and lines of progress.

The parent calls `run_child`, the module's `__main__` calls `serve`. A crash of a native library ends the child alone, and a child
ends with its parent, however that ends. No Python process that is started from here looks for modules in the current folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, VerificationFailure
from .memory import anonymous_of
from .reading import one_line
from .refusals import in_words, is_environment
from .stages import SIZE, read_stage, report_to

_STAGE = "stage"
"""The file beside a child's result in which it tells its stage, where it has limits."""

_PREFIX = "edgewright: "
"""How a line of progress begins on the child's standard output; libraries print there too."""

Progress = Callable[[str], None]


_SAFE = {"PYTHONSAFEPATH": "1"}
"""As `python -P`, and for what the child starts as well."""


_LOOK = 0.05
"""Seconds between two looks at a child that has limits."""

_LAST_WORDS = 1 << 16
"""Bytes of a child's standard error that are looked at, from its end; and of one line of its standard output."""

_REFUSED = 74
"""Exit status of a child that could not write its result: EX_IOERR of sysexits.h."""

_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT) if os.name == "posix" else ()
"""Signals that no runtime ends itself with: the system sends the first where memory runs out."""

_MOST_WRITTEN = 1 << 30
"""Bytes of a file that a child with limits may write."""


class ChildFailed(Exception):
    """The child ended without a result. The text says how, and the last line it wrote to standard error.

    stage: what it was doing (`system.stages`), "" where it did not say, and where it was ended from outside. killed: by its limits
    or from outside, and did not fail by itself.
    """

    def __init__(self, text: str, stage: str = "", killed: bool = False) -> None:
        super().__init__(text)
        self.stage, self.killed = stage, killed


@dataclass(frozen=True)
class Limits:
    """What a child may take: bytes of anonymous memory, where the system tells, and seconds in one stage."""

    memory: int
    seconds: float


def run_child(
    module: str, job: Mapping[str, Any], progress: Progress = lambda _: None, limits: Limits | None = None
) -> dict[str, Any]:
    """Run `module` on `job` and return its result; both are JSON objects. Its lines of progress go to `progress`.

    Raises the UserError or VerificationFailure that ended the work, ChildFailed if the process died or passed its limits.
    """
    with tempfile.TemporaryDirectory() as folder:
        job_file, result_file, errors = (Path(folder, name) for name in ("job.json", "result.json", "errors.txt"))
        job_file.write_text(json.dumps(job))
        stage = result_file.with_name(_STAGE)
        if limits is not None:
            stage.write_bytes(bytes(SIZE))
        # -P: a module in the user's current folder must not shadow a library
        command = [sys.executable, "-P", "-m", module, str(job_file), str(result_file)]
        own_group = 0 if os.name == "posix" else None  # so that what the child starts can be ended with it
        with (
            errors.open("wb") as log,
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **_SAFE},
                process_group=own_group,
            ) as process,
        ):
            assert process.stdout is not None
            guard = None if limits is None else _Guard(process, limits, stage)
            try:
                while line := process.stdout.readline(_LAST_WORDS):
                    text = line.decode("utf-8", "replace").rstrip()
                    if text.startswith(_PREFIX):
                        progress(text.removeprefix(_PREFIX))
                process.wait()
            except BaseException:
                _end(process)
                raise
            finally:
                if guard is not None:
                    guard.stop()
        where = "" if limits is None else read_stage(stage)[0]
        if guard is not None and guard.reason is not None:
            raise ChildFailed(guard.reason, where, killed=True)
        if -process.returncode in _FROM_OUTSIDE:
            how = f"was ended from outside with {_how(process.returncode)}; is there memory enough?"
            raise ChildFailed(how, killed=True)
        if process.returncode == _REFUSED:
            raise UserError(_last_line(errors))
        if process.returncode or not result_file.is_file():
            raise ChildFailed(f"ended with {_how(process.returncode)} ({_last_line(errors)})", where)
        result: dict[str, Any] = json.loads(result_file.read_text())
    if "error" in result:
        raise UserError(result["error"])
    if "failure" in result:
        raise VerificationFailure(result["failure"])
    return result


def serve(work: Callable[[dict[str, Any], Progress], Mapping[str, Any]]) -> None:
    """The child's side: run `work` on the job and write its result, or the user error that ended it."""
    end_with_parent()
    job_path, result_path = sys.argv[1:]
    stage = Path(result_path).with_name(_STAGE)
    if stage.is_file():
        report_to(stage)
        _write_little()
    try:
        result = work(json.loads(Path(job_path).read_text()), lambda text: print(f"{_PREFIX}{text}", flush=True))
    except UserError as error:
        result = {"error": str(error)}
    except VerificationFailure as error:
        result = {"failure": str(error)}
    except OSError as error:
        if not is_environment(error):
            raise
        result = {"error": _refused(error)}
    try:
        Path(result_path).write_text(json.dumps(result))
    except OSError as error:
        print(_refused(error), file=sys.stderr, flush=True)
        os._exit(_REFUSED)


def _refused(error: OSError) -> str:
    return f"{one_line(in_words(error))}; mend that and run the command again"


@contextmanager
def safe_paths() -> Iterator[None]:
    """Python processes that a library starts within this context do not look for modules in the current folder."""
    before = {key: os.environ.get(key) for key in _SAFE}
    os.environ.update(_SAFE)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def end_with_parent(every: float = 0.2) -> None:
    """From now on this process, and its group if it leads one, is killed when its parent has ended. Looks `every` seconds."""
    if os.name != "posix":
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Guard:
    """A thread that ends a child which passes its limits. reason: why it was ended, or None."""

    def __init__(self, process: subprocess.Popen[bytes], limits: Limits, stage: Path) -> None:
        self.reason: str | None = None
        self._process, self._limits, self._stage = process, limits, stage
        self._status = Path(f"/proc/{process.pid}/status")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more. The child must have ended, or be about to."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK):
            reason = self._passed()
            if reason is not None and self._process.poll() is None:
                self.reason = reason
                _end(self._process)
                return

    def _passed(self) -> str | None:
        memory, seconds = self._limits.memory, self._limits.seconds
        if anonymous_of(self._status) > memory:
            return f"took more memory than the {memory / 2**30:.1f} GiB that its files account for, and was ended"
        if read_stage(self._stage)[1] > seconds:
            return f"did not come to an end in {seconds:.0f} s, and was ended"
        return None


def _write_little() -> None:
    """From now on this process writes no large file, and none if it crashes."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, most in ((resource.RLIMIT_FSIZE, _MOST_WRITTEN), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _how(code: int) -> str:
    if code >= 0:
        return f"status {code}"
    try:
        return f"signal {-code}, {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _last_line(errors: Path) -> str:
    """The last line that a child wrote to standard error."""
    with errors.open("rb") as file:
        file.seek(max(0, errors.stat().st_size - _LAST_WORDS))
        text = file.read(_LAST_WORDS).decode("utf-8", "replace")
    lines = [line for line in text.splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else "it said nothing"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a child and what it has started."""
    try:
        if os.name == "posix" and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        pass
    process.kill()
