"""The file of finished rows: a row is in it whole or not at all, and one process at a time adds to it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any


class Journal:
    """`path` holds a JSON object a line; `path` with .lock is held by the process that measures."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock_path = path.with_name(path.name + ".lock")
        self._lock: int | None = None

    def records(self) -> list[dict[str, Any]]:
        """The whole lines."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]

    def lock(self) -> bool:
        """Whether the file is now this process's alone: not while another one measures."""
        import fcntl  # no Windows has it, and there the class only reads and adds

        handle = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            return False
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        self._lock = handle
        self._mend()
        return True

    def add(self, record: dict[str, Any]) -> None:
        """Write a record so that it is still there after the power fails."""
        line = (json.dumps(record) + "\n").encode()
        with open(self._path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def stop_holder(self) -> bool:
        """End the process that measures; False if there is none."""
        if not self._lock_path.exists() or self.lock():
            return False
        try:
            os.kill(int(self._lock_path.read_text()), signal.SIGTERM)
        except (OSError, ValueError):
            return False
        return True

    def forget(self) -> None:
        """Remove the file and what belongs to it; a process that measures is ended first."""
        self.stop_holder()
        for path in self._path.parent.glob(f"{self._path.name}*"):
            path.unlink()

    def _mend(self) -> None:
        """Cut off a line that a killed process left unfinished."""
        if not self._path.exists():
            return
        with open(self._path, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
