"""A control group (version 2) of this process's own, so that the kernel holds a memory limit, for its children too."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_SLACK = 64 << 20
"""Bytes that the group has above the limit: mapped files count there, and the limit's own message is clearer than a kill."""


@dataclass(frozen=True)
class ControlGroup:
    """The group `path`, which this process has entered, and the group that it came from."""

    path: Path
    before: Path

    @classmethod
    def enter(cls, limit: int) -> ControlGroup | None:
        """Make a group of at most about `limit` bytes and enter it; None where the system does not let us.

        That is the rule: a group is writable where the user is its owner, as under `systemd-run --user --scope -p Delegate=yes`.
        """
        before = _own_group()
        if before is None:
            return None
        path = before / f"edgewright-{os.getpid()}"
        try:
            path.mkdir()
        except OSError:
            return None
        group = cls(path, before)
        try:
            _write(path / "cgroup.procs", str(os.getpid()))
            # A group with processes of its own cannot limit those below it, so it is left first.
            _write(before / "cgroup.subtree_control", "+memory")
            _write(path / "memory.max", str(limit + _SLACK))
        except OSError:
            group.leave()
            return None
        return group

    def leave(self) -> None:
        """Go back and remove the group. Children that still run keep it alive."""
        for file, text in ((self.path / "memory.max", "max"), (self.before / "cgroup.subtree_control", "-memory")):
            try:
                _write(file, text)
            except OSError:
                continue
        try:
            _write(self.before / "cgroup.procs", str(os.getpid()))
            self.path.rmdir()
        except OSError:
            return


def _own_group() -> Path | None:
    """The folder of this process's group; None without version 2."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers and ".." not in Path(path).parts:
            folder = _ROOT / path.lstrip("/")
            return folder if (folder / "cgroup.procs").is_file() else None
    return None


def _write(file: Path, text: str) -> None:
    with open(file, "w", encoding="ascii") as handle:
        handle.write(text)
