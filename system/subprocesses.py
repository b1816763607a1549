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
from pathlib import Path
from typing import Any

from ..errors import UserError
from .reading import one_line

_PREFIX = "edgewright: "
"""How a line of progress begins on the child's standard output; libraries print there too."""

Progress = Callable[[str], None]


_SAFE = {"PYTHONSAFEPATH": "1"}
"""As `python -P`, and for what the child starts as well."""


class ChildFailed(Exception):
    """The child ended without a result. The text says how, and the last line it wrote to standard error."""


def run_child(module: str, job: Mapping[str, Any], progress: Progress = lambda _: None) -> dict[str, Any]:
    """Run `module` on `job` and return its result; both are JSON objects. Its lines of progress go to `progress`.

    Raises UserError for the user error that ended the work, ChildFailed if the process died.
    """
    with tempfile.TemporaryDirectory() as folder:
        job_file, result_file, errors = (Path(folder, name) for name in ("job.json", "result.json", "errors.txt"))
        job_file.write_text(json.dumps(job))
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
            try:
                for line in process.stdout:
                    text = line.decode("utf-8", "replace").rstrip()
                    if text.startswith(_PREFIX):
                        progress(text.removeprefix(_PREFIX))
            except BaseException:
                _end(process)
                raise
        if process.returncode or not result_file.is_file():
            lines = [one_line(line) for line in errors.read_text("utf-8", "replace").splitlines() if line.strip()]
            code = process.returncode
            how = f"signal {-code}" if code < 0 else f"status {code}"
            raise ChildFailed(f"ended with {how} ({lines[-1] if lines else 'it said nothing'})")
        result: dict[str, Any] = json.loads(result_file.read_text())
    if "error" in result:
        raise UserError(result["error"])
    return result


def serve(work: Callable[[dict[str, Any], Progress], Mapping[str, Any]]) -> None:
    """The child's side: run `work` on the job and write its result, or the user error that ended it."""
    end_with_parent()
    job_path, result_path = sys.argv[1:]
    try:
        result = work(json.loads(Path(job_path).read_text()), lambda text: print(f"{_PREFIX}{text}", flush=True))
    except UserError as error:
        result = {"error": str(error)}
    Path(result_path).write_text(json.dumps(result))


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


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a child and what it has started."""
    try:
        if os.name == "posix" and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        pass
    process.kill()
