"""Works in lockstep: the order, what the last of them sees, and what becomes of the others when one fails."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewright.system.round_robin import RoundRobin


def stepping(said: list[tuple[int, int]], index: int, meetings: int, step: list[RoundRobin[int]]) -> Callable[[], int]:
    def work() -> int:
        for at in range(meetings):
            assert step[0].current == index
            said.append((at, index))
            step[0].barrier()
        return index

    return work


@given(st.integers(1, 5), st.integers(0, 4))
def test_all_come_to_a_meeting_before_any_goes_on(count: int, meetings: int) -> None:
    said: list[tuple[int, int]] = []
    held: list[RoundRobin[int]] = []
    held.append(RoundRobin([stepping(said, i, meetings, held) for i in range(count)]))
    assert held[0].run() == list(range(count))
    assert said == [(at, i) for at in range(meetings) for i in range(count)]


def test_the_last_one_is_known() -> None:
    lasts: list[bool] = []

    def work() -> None:
        lasts.append(step.last)
        step.barrier()

    step = RoundRobin([work] * 3)
    step.run()
    assert lasts == [False, False, True]


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_failure_is_raised_and_the_others_are_given_up(where: int) -> None:
    after: list[int] = []
    before = threading.active_count()

    def work(index: int) -> Callable[[], None]:
        def go() -> None:
            step.barrier()
            if index == where:
                raise ValueError(f"work {index}")
            step.barrier()
            after.append(index)

        return go

    step = RoundRobin([work(i) for i in range(3)])
    with pytest.raises(ValueError, match=f"work {where}"):
        step.run()
    assert not after
    assert threading.active_count() == before  # nothing is left waiting


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_by_another_thread_is_not_kept_for_the_end(interruptible: None) -> None:
    import _thread

    done: list[int] = []

    def work() -> None:
        for at in range(600):
            if at == 2:
                _thread.interrupt_main()
            time.sleep(0.01)
            done.append(at)
            step.barrier()

    step = RoundRobin([work] * 2)
    with pytest.raises(KeyboardInterrupt):
        step.run()
    assert len(done) < 600  # of 1,200


def test_an_interrupt_ends_all(interruptible: None) -> None:
    import _thread

    before = threading.active_count()

    def work() -> None:
        for at in range(10_000_000):
            if at == 100 and step.current == 0:
                _thread.interrupt_main()
            step.barrier()

    step = RoundRobin([work] * 2)
    with pytest.raises(KeyboardInterrupt):
        step.run()
    assert threading.active_count() == before
