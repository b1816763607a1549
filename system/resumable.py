"""The folder of an export under way, named by its job: the same command finds it again and goes on. A leaf: `errors`, `untrusted`.

It lies beside the output, hidden, and becomes it by a rename when all is there. What is finished in it is marked by a file
that appears last, so that a run killed at any moment leaves either a whole stage or one that is done again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .reading import one_line, read_json_object

try:
    import fcntl
except ImportError:  # Windows: two runs of one command at the same time are not told apart
    fcntl = None  # type: ignore[assignment]

WORK = ".work"
"""The folder in it that only the work needs; no part of the bundle."""

_SUFFIX = ".partial"


class ResumableExport:
    """The folder of `job` for `output`, new or found again. job: what decides the result, as JSON.

    Raises UserError when the disk refuses or another run of the same command is at it.
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
        """Folders that other unfinished runs for the same output left."""
        found = self.output.parent.glob(f".{_escaped(self.output.name[:64])}.*{_SUFFIX}")
        return sorted(p for p in found if p != self.path)

    def found(self, stage: str) -> dict[str, Any] | None:
        """What `finish` was told of a stage; None if it is not finished."""
        path = self.work / f"{stage}.json"
        return read_json_object(path) if path.is_file() else None

    def finish(self, stage: str, facts: Mapping[str, Any]) -> None:
        """Mark a stage, all of whose files are written, as done."""
        self._write(f"{stage}.json", json.dumps(facts))

    def fresh_folder(self, name: str) -> Path:
        """The folder `name` of the bundle, empty: what an unfinished stage left there is removed."""
        folder = self.path / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def forget(self, stage: str) -> None:
        """Take the mark of `finish` away again."""
        (self.work / f"{stage}.json").unlink(missing_ok=True)

    def publish(self) -> None:
        """Rename to the output. Raises OSError, with everything still there when the output exists by now."""
        if self.output.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.output))
        shutil.rmtree(self.work)
        self.path.chmod(0o755)
        self.path.rename(self.output)
        self._release()

    def discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._release()

    def worth_keeping(self, stages: Iterable[str]) -> bool:
        """Whether work that cost time lies here: codes found by calibration, or one of `stages` finished."""
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


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
