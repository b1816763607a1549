"""Calls into native libraries that may never return: made in a thread, and waited for so long and no longer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class OutOfTime(Exception):
    """A call has not returned in time. Its thread goes on, and does not keep the process from ending."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises. Raises OutOfTime if it does neither within so many seconds.

    Ctrl-C ends the wait at once. Both need a call that releases the interpreter's lock.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise OutOfTime
    return results[0]
