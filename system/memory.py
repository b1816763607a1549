"""How much anonymous memory this process takes, and how much it may take.

Anonymous memory (RssAnon) is counted, because pages of mapped weight files are cache that can be reclaimed.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

_LARGE = 1 << 18
_STACKS = 32 << 20  # bytes a core that threads of libraries reserve for their stacks, and hardly use
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
_limit: int | None = None
_STATUS = Path("/proc/self/status")
_CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def anonymous_bytes() -> int:
    """RssAnon of this process now; 0 where the system does not tell."""
    return anonymous_of(_STATUS)


def anonymous_of(status: Path) -> int:
    """RssAnon in a process's status file; 0 where there is none, or the process is gone."""
    return _status_bytes(status, "RssAnon:")


def peak_resident_bytes() -> int:
    """VmHWM of this process, mapped files included; 0 where the system does not tell."""
    return _status_bytes(_STATUS, "VmHWM:")


def _status_bytes(status: Path, key: str) -> int:
    try:
        for line in status.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return 0
    return 0


@contextmanager
def limited(limit: int | None) -> Iterator[None]:
    """Within this context no more than `limit` bytes of anonymous memory are taken for available."""
    global _limit
    before, _limit = _limit, limit
    try:
        yield
    finally:
        _limit = before


def available_bytes() -> int:
    """Memory that new allocations can take: what is free, or left of the cgroup's limit or of the user's (`limited`)."""
    available = 1 << 62 if _limit is None else max(0, _limit - anonymous_bytes())
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = min(available, int(line.split()[1]) * 1024)
    except OSError:
        pass
    for limit in _cgroup_limits():
        available = min(available, max(0, limit - anonymous_bytes()))
    return available


def require_available(needed: int, why: str, way_out: str) -> None:
    """Raise UserError unless about `needed` bytes can still be allocated."""
    available = available_bytes()
    if needed > available:
        raise UserError(
            f"{why}: about {needed / 2**30:.1f} GiB, of which {available / 2**30:.1f} GiB are available; {way_out}"
        )


@contextmanager
def no_more_than_available(mapped: int) -> Iterator[None]:
    """Within this context an allocation beyond the memory that is available now fails, where Linux can hold a process to it.

    Without it, Linux grants what is not there, and ends the process when it is used. mapped: bytes of files that will be mapped,
    which may count as well.
    """
    allocated = _status_bytes(_STATUS, "VmData:")
    if not allocated:
        yield
        return
    import resource  # not on Windows

    before = resource.getrlimit(resource.RLIMIT_DATA)
    available = available_bytes()
    most = allocated + available - available // 20 + mapped + _STACKS * (os.cpu_count() or 1)
    if before[1] != resource.RLIM_INFINITY:
        most = min(most, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _cgroup_limits() -> list[int]:
    found = []
    candidates = list(_CGROUPS)
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "memory":
                candidates.append(Path(f"/sys/fs/cgroup/memory{path}/memory.limit_in_bytes"))
            elif not controllers:
                candidates.append(Path(f"/sys/fs/cgroup{path}/memory.max"))
    except (OSError, ValueError):
        pass
    for file in candidates:
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 1 << 60:
            found.append(int(text))
    return found


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Within this context the C library gives every block of _LARGE bytes back to the system when it is freed, if it is glibc.

    By itself it keeps blocks of up to 32 MiB, and each thread keeps its own; that is faster, and is so again afterwards.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
