"""Computations that take turns at barriers: each has a thread, and one thread runs at a time.

So shared data need no locks, and the result does not depend on timing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

_POLL = 0.1
"""Seconds between two checks for an interrupt."""


class _Abandoned(BaseException):
    """Another computation failed, so this one ends."""


class RoundRobin(Generic[T]):
    """Runs `works`, which must all call `barrier` equally often. current: the index of the one that runs.

    The first runs up to its barrier, then the second, and so on; after the last one the first goes on.
    """

    def __init__(self, works: Sequence[Callable[[], T]]) -> None:
        self.current = 0
        self._works = list(works)
        self._turns = [threading.Semaphore(0) for _ in self._works]
        self._results: dict[int, T] = {}
        self._failure: BaseException | None = None
        # Thread.join takes an interrupt for the end of the thread (Python 3.11), so ends are counted.
        self._end, self._ended = threading.Semaphore(0), 0

    @property
    def last(self) -> bool:
        """Whether the last computation is the one that runs."""
        return self.current == len(self._works) - 1

    def run(self) -> list[T]:
        """The results, in order. If one fails, the others end and its exception is raised."""
        if len(self._works) == 1:
            return [self._works[0]()]
        threads: list[threading.Thread] = []
        try:
            for i in range(len(self._works)):
                thread = threading.Thread(target=self._run, args=(i,), daemon=True)
                thread.start()
                threads.append(thread)
            self._pass_to(0)
            while self._ended < len(threads):  # without a timeout an interrupt would wait for the end
                self._ended += self._end.acquire(timeout=_POLL)
        except BaseException as error:  # an interrupt, which only the main thread gets
            self._fail(error)
            while self._ended < len(threads):
                self._ended += self._end.acquire()
            raise
        finally:
            for thread in threads:
                thread.join()
        if self._failure is not None:
            raise self._failure
        return [self._results[i] for i in range(len(self._works))]

    def barrier(self) -> None:
        """Wait until the others have come to this point. Called by the works."""
        if len(self._works) == 1:
            return
        own = self.current
        self._pass_to((own + 1) % len(self._works))
        self._wait(own)

    def _run(self, index: int) -> None:
        try:
            self._wait(index)
            self._results[index] = self._works[index]()
            if index + 1 < len(self._works):
                self._pass_to(index + 1)
        except _Abandoned:
            pass
        except BaseException as error:
            self._fail(error)
        finally:
            self._end.release()

    def _wait(self, index: int) -> None:
        self._turns[index].acquire()
        if self._failure is not None:
            raise _Abandoned

    def _pass_to(self, index: int) -> None:
        self.current = index
        self._turns[index].release()

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        for turn in self._turns:
            turn.release()
