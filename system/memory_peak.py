"""The peak of anonymous memory of this process and its children, and the end of a run that passes its limit.

A thread samples /proc. Where version 2 of control groups can be written, the kernel holds the limit too.
"""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import UserError
from .control_group import ControlGroup
from .memory import anonymous_bytes, anonymous_of

_PROCESSES = Path("/proc")
_INTERVAL = 0.01
_PATIENCE = 0.6
"""Seconds that a run above its limit has to end by itself. Native code can hold an interrupt back for minutes."""


class PeakAnonymous:
    """`with PeakAnonymous() as peak:` samples RssAnon every 10 ms, of the processes it started too.

    `peak.bytes` is the highest sum seen. limit: a sum above it kills the children and interrupts the main thread
    (KeyboardInterrupt), and `peak.over` is then true. A run that is still above the limit after that is ended with exit code 2.
    If sampling fails, the run is interrupted as well, and leaving the context raises UserError.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.bytes = _with_children()
        self.over, self._limit = False, limit
        self._failure: BaseException | None = None
        self._handler: Any = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._group: ControlGroup | None = None

    def _watch(self) -> None:
        try:
            while not self._stop.wait(_INTERVAL):
                now = _with_children()
                self.bytes = max(self.bytes, now)
                if self._limit is not None and now > self._limit:
                    self._end()
                    return
        except BaseException as error:  # a limit that nobody watches is none
            self._failure = error
            if not self._stop.is_set():
                _interrupt()

    def _end(self) -> None:
        assert self._limit is not None
        self.over = True
        for child in _descendants(os.getpid()):
            _kill(child)
        _interrupt()
        deadline = time.monotonic() + _PATIENCE
        while not self._stop.wait(_INTERVAL):
            now = _with_children()
            self.bytes = max(self.bytes, now)
            if now <= self._limit:
                deadline = time.monotonic() + _PATIENCE
            elif time.monotonic() > deadline:
                self._end_process(self._limit)

    def _end_process(self, limit: int) -> None:
        for child in _descendants(os.getpid()):
            _kill(child)
        text = f"error: this takes more than --memory-limit {limit / 2**30:.2f} GiB and did not stop when interrupted\n"
        os.write(2, text.encode())
        os._exit(2)

    def __enter__(self) -> PeakAnonymous:
        # A job in a shell's background ignores SIGINT, and what is ignored interrupts nothing.
        if self._limit is not None and threading.current_thread() is threading.main_thread():
            self._handler = signal.getsignal(signal.SIGINT)
            if self._handler in (signal.SIG_IGN, signal.SIG_DFL):
                signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._limit is not None:
            if not anonymous_bytes():
                raise UserError("--memory-limit: this system does not tell what a process takes; leave it out")
            self._group = ControlGroup.enter(self._limit)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self._group is not None:
            self._group.leave()
        if self._handler in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGINT, self._handler)
        self.bytes = max(self.bytes, _with_children())
        if self._failure is not None and self._limit is not None and (kind is None or kind is KeyboardInterrupt):
            raise UserError(f"--memory-limit could not be watched ({self._failure!r}); leave it out") from self._failure


def _interrupt() -> None:
    """KeyboardInterrupt in the main thread, also where it waits for something."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


def _with_children() -> int:
    """RssAnon of this process and of all below it: compilers run in processes of their own.

    A child that has only been forked has its parent's command line, and its parent's pages, which would count twice.
    """
    here = os.getpid()
    total = anonymous_bytes()
    pending = [(here, total)]
    while pending:
        parent, shared = pending.pop()
        command = _command(parent)
        for child in _children(parent):
            taken = anonymous_of(_PROCESSES / str(child) / "status")
            pending.append((child, taken))
            total += max(0, taken - shared) if _command(child) == command else taken
    return total


def _descendants(process: int) -> Iterator[int]:
    """All processes below one, those first that are nearer."""
    pending = [process]
    while pending:
        for child in _children(pending.pop(0)):
            pending.append(child)
            yield child


def _children(process: int) -> list[int]:
    """The children of a process. One that ends while it is read has none, and so has a thread."""
    tasks = _PROCESSES / str(process) / "task"
    try:
        threads = os.listdir(tasks)
    except OSError:
        return []
    found: list[int] = []
    for thread in threads:
        try:
            found += [int(child) for child in (tasks / thread / "children").read_text().split()]
        except (OSError, ValueError):
            continue
    return found


def _command(process: int) -> bytes:
    try:
        return (_PROCESSES / str(process) / "cmdline").read_bytes()
    except OSError:
        return b""


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except OSError:
        return
