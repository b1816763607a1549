"""Computations that go on in turn, one at a time, and meet wherever all of them have come to. A leaf: the standard library.

A thread each, of which one alone runs: what they share needs no locks, and what comes out does not depend on timing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

_POLL = 0.1
"""Seconds between two looks for an interrupt."""


class _Abandoned(BaseException):
    """Another computation failed: this one has nothing left to do."""


class RoundRobin(Generic[T]):
    """Runs `works`, which must all call `meet` equally often. current: the index of the one that runs.

    The first runs until it meets, then the second, up to the last; then the first goes on. So when the last one arrives at a
    meeting, all are there.
    """

    def __init__(self, works: Sequence[Callable[[], T]]) -> None:
        self.current = 0
        self._works = list(works)
        self._turns = [threading.Semaphore(0) for _ in self._works]
        self._results: dict[int, T] = {}
        self._failure: BaseException | None = None
        # not Thread.join, which an interrupt makes believe that the thread is at its end (Python 3.11)
        self._end, self._ended = threading.Semaphore(0), 0

    @property
    def last(self) -> bool:
        """Whether the one that runs is the last of them."""
        return self.current == len(self._works) - 1

    def run(self) -> list[T]:
        """Their results, in order. Raises what the first to fail raised; the others are given up then."""
        if len(self._works) == 1:
            return [self._works[0]()]
        threads: list[threading.Thread] = []
        try:
            for i in range(len(self._works)):
                thread = threading.Thread(target=self._run, args=(i,), daemon=True)
                thread.start()
                threads.append(thread)
            self._pass_to(0)
            while self._ended < len(
                threads
            ):  # with a time, or an interrupt that another thread raises waits for the end
                self._ended += self._end.acquire(timeout=_POLL)
        except BaseException as error:  # an interrupt, that the main thread alone gets
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
        """Let the others come to this point. To be called by what `run` runs."""
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
