"""The hidden folder of an export under way. Its name comes from the job, so the same command finds it and goes on.

It lies beside the output and is renamed to it when it is whole. A finished stage is marked by a file that is written last. So
a run that is killed at any moment leaves whole stages, and at most one that is done again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from .reading import one_line, read_json_object

try:
    import fcntl
except ImportError:  # Windows: nothing stops two runs of one command at the same time
    fcntl = None  # type: ignore[assignment]

WORK = ".work"
"""The folder of working files inside it; no part of the bundle."""

_SUFFIX = ".partial"


class ResumableExport:
    """The folder of a job, new or from an earlier run.

    output: what the folder becomes. job: everything that decides the result, as JSON. Raises UserError when the folder cannot
    be made, or when another run of the same command is using it.
    """

    def __init__(self, output: Path, job: Mapping[str, Any]) -> None:
        text = json.dumps(job, sort_keys=True)
        key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        self.output = output
        self.path = output.parent / f".{output.name[:64]}.{key}{_SUFFIX}"
        self.work = self.path / WORK
        self._lock = -1
        try:
            fresh = not (self.work / "job.json").is_file()
            if fresh and self.path.is_dir():
                shutil.rmtree(self.path)
            self.work.mkdir(parents=True, exist_ok=True)
            self.path.chmod(0o700)
            self._claim()
            if fresh:
                self._write("job.json", text)
        except OSError as error:
            raise UserError(f"{output} cannot be made ({error.strerror}); choose another -o") from None

    def others(self) -> list[Path]:
        """Folders of other unfinished runs for the same output."""
        folders = self.output.parent.glob(f".{_escaped(self.output.name[:64])}.*{_SUFFIX}")
        return sorted(p for p in folders if p != self.path)

    def refuse_rivals(self) -> None:
        """Raise UserError if another command is writing the same output now."""
        for other in self.others():
            if fcntl is not None and _in_use(other / WORK / "lock"):
                self.discard()
                raise UserError(
                    f"another command is writing {one_line(self.output)}; wait for it, or choose another -o"
                )

    def finished(self, stage: str) -> dict[str, Any] | None:
        """The facts that `finish` stored for a stage; None if the stage is not finished."""
        path = self.work / f"{stage}.json"
        return read_json_object(path) if path.is_file() else None

    def finish(self, stage: str, facts: Mapping[str, Any]) -> None:
        """Mark a stage as finished. All of its files must be written."""
        self._write(f"{stage}.json", json.dumps(facts))

    def fresh_folder(self, name: str) -> Path:
        """The folder `name` of the bundle, empty. What an unfinished stage left in it is removed."""
        folder = self.path / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def forget(self, stage: str) -> None:
        """The stage is no longer finished."""
        (self.work / f"{stage}.json").unlink(missing_ok=True)

    @contextmanager
    def temporary_files(self) -> Iterator[None]:
        """Within this context libraries put their temporary files here, so that a killed run leaves none elsewhere."""
        folder = self.work.absolute() / "tmp"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        before = os.environ.get("TMPDIR"), tempfile.tempdir
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = before[1]
            if before[0] is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = before[0]

    def publish(self) -> None:
        """Rename the folder to the output. Raises OSError and keeps everything if the output exists by now."""
        if self.output.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.output))
        shutil.rmtree(self.work)
        self.path.chmod(0o755)
        self.path.rename(self.output)
        self._release()

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._release()

    def worth_keeping(self, stages: Iterable[str]) -> bool:
        """Whether there is work that cost time: codes from calibration, or a finished stage among `stages`."""
        codes = any((self.work / "codes").glob("*.safetensors"))
        return codes or any((self.work / f"{stage}.json").is_file() for stage in stages)

    def leave(self) -> None:
        """Keep the folder for the next run."""
        self._release()

    def _write(self, name: str, text: str) -> None:
        partial = self.work / f"{name}{_SUFFIX}"
        partial.write_text(text)
        os.replace(partial, self.work / name)

    def _claim(self) -> None:
        if fcntl is None:
            return
        self._lock = os.open(self.work / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._release()
            raise UserError(
                f"another run of this command is writing {one_line(self.output)}; wait for it, or choose another -o"
            ) from None

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _in_use(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
