"""How much anonymous memory this process takes, and how much it may take.

Anonymous memory (RssAnon) is counted, because pages of mapped weight files are cache that can be reclaimed.
"""

from __future__ import annotations

import _thread
import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import UserError

_LARGE = 1 << 18
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
_limit: int | None = None
_PROCESS = Path("/proc/self")
_STATUS = _PROCESS / "status"
_CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def anonymous_bytes() -> int:
    """RssAnon of this process now; 0 where the system does not tell."""
    return _anonymous(_STATUS)


def _anonymous(status: Path) -> int:
    try:
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0


def peak_resident_bytes() -> int:
    """VmHWM of this process, mapped files included; 0 where the system does not tell."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
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


def _with_children() -> int:
    """RssAnon of this process and of all below it: compilers run in processes of their own.

    A child that has only been forked still has its parent's command line, and its parent's pages: they would count twice.
    """
    total, pending = anonymous_bytes(), [_PROCESS]
    while pending:
        parent = pending.pop()
        for tasks in parent.glob("task/*/children"):
            try:
                mine = (parent / "cmdline").read_bytes()
                children = [Path("/proc", pid) for pid in tasks.read_text().split()]
                started = [child for child in children if (child / "cmdline").read_bytes() != mine]
            except OSError:  # a thread or a process is gone
                continue
            pending += started
            total += sum(_anonymous(child / "status") for child in started)
    return total


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


class PeakAnonymous:
    """`with PeakAnonymous() as peak:` samples RssAnon every 10 ms, of the processes it started too.

    `peak.bytes` is the highest sum seen. limit: a sum above it interrupts the main thread (KeyboardInterrupt), and `peak.over`
    is then true.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.bytes = _with_children()
        self.over, self._limit = False, limit
        self._handler: Any = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self.bytes = max(self.bytes, _with_children())
            if self._limit is not None and self.bytes > self._limit and not self.over:
                self.over = True
                _thread.interrupt_main()

    def __enter__(self) -> PeakAnonymous:
        # A job in a shell's background ignores SIGINT, and what is ignored interrupts nothing.
        if self._limit is not None and threading.current_thread() is threading.main_thread():
            self._handler = signal.getsignal(signal.SIGINT)
            if self._handler in (signal.SIG_IGN, signal.SIG_DFL):
                signal.signal(signal.SIGINT, signal.default_int_handler)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self._handler in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGINT, self._handler)
        self.bytes = max(self.bytes, _with_children())
