"""A child that crashes, hangs, takes memory or floods its output ends as one line that says what it was doing."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgewright.errors import UserError, VerificationFailure
from edgewright.system.memory import available_bytes, no_more_than_available
from edgewright.system.stages import SIZE, Stage, read_stage, report_to
from edgewright.system.subprocesses import ChildFailed, Limits, run_child

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")
ROOMY = Limits(4 << 30, 600.0)
CHILD = """
import os, signal, sys, time
from edgewright.errors import UserError, VerificationFailure
from edgewright.system.stages import Stage
from edgewright.system.subprocesses import serve

def work(job, progress):
    with Stage("onnx: loading"):
        with Stage("onnx: running decoder"):
            exec(job["code"], globals() | {"progress": progress})
        if job.get("after"):
            exec(job["after"], globals())
    return {"done": True}

if __name__ == "__main__":
    serve(work)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "hostile_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return "hostile_child"


def failed(module: str, code: str, limits: Limits | None = ROOMY, **job: Any) -> ChildFailed:
    with pytest.raises(ChildFailed) as caught:
        run_child(module, {"code": code, **job}, limits=limits)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
    return caught.value


def test_work_that_ends_gives_its_result(child: str) -> None:
    lines: list[str] = []
    assert run_child(child, {"code": "progress('half')"}, lines.append, ROOMY) == {"done": True}
    assert lines == ["half"]


@pytest.mark.parametrize(("number", "name"), [(11, "SIGSEGV"), (6, "SIGABRT"), (4, "SIGILL")])
def test_a_crash_names_the_signal_and_the_stage(child: str, number: int, name: str) -> None:
    error = failed(child, f"os.kill(os.getpid(), {number})")
    assert str(error).startswith(f"ended with signal {number}, {name}")
    assert error.stage == "onnx: running decoder"


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_child_that_was_ended_from_outside_says_nothing_of_its_work(child: str, name: str) -> None:
    error = failed(child, f"os.kill(os.getpid(), signal.{name})")
    assert str(error).startswith(f"was ended from outside with signal {int(signal.Signals[name])}, {name}")
    assert error.stage == ""


@pytest.mark.parametrize("number", ["ENOSPC", "EROFS", "EMFILE"])
def test_what_the_system_refuses_a_child_is_trouble_and_no_failure(child: str, number: str) -> None:
    code = f"raise OSError(errno.{number}, 'refused', 'some.file')"
    with pytest.raises(UserError, match=r"^some\.file: refused; mend that"):
        run_child(child, {"code": "import errno; " + code}, limits=ROOMY)


def test_a_result_that_a_child_cannot_write_is_trouble(child: str) -> None:
    code = "from pathlib import Path; Path(sys.argv[2]).symlink_to('/dev/full')"
    with pytest.raises(UserError, match="No space left on device; mend that"):
        run_child(child, {"code": code}, limits=ROOMY)


def test_the_stage_around_counts_again_when_the_inner_one_is_over(child: str) -> None:
    assert failed(child, "pass", after="os._exit(3)").stage == "onnx: loading"


def test_without_limits_nothing_is_watched(child: str) -> None:
    error = failed(child, "os._exit(3)", limits=None)
    assert (str(error), error.stage) == ("ended with status 3 (it said nothing)", "")


@pytest.mark.parametrize("code", ["time.sleep(600)", "os.close(1); time.sleep(600)", "signal.pause()"])
def test_what_does_not_end_is_ended(child: str, code: str) -> None:
    start = time.monotonic()
    error = failed(child, code, Limits(4 << 30, 0.3))
    assert "did not come to an end in 0 s" in str(error)
    assert error.stage == "onnx: running decoder"
    assert time.monotonic() - start < 60


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
def test_what_takes_too_much_memory_is_ended(child: str) -> None:
    code = "held = [b'x' * (1 << 24) for _ in range(1000)]"
    error = failed(child, code, Limits(200 << 20, 600.0))
    assert "took more memory than the 0.2 GiB" in str(error)
    assert error.stage == "onnx: running decoder"


def test_a_flood_of_output_is_not_kept(child: str) -> None:
    error = failed(child, "[os.write(n, b'y' * (1 << 20)) for _ in range(40) for n in (1, 2)]; os._exit(1)")
    assert "ended with status 1 (yyyy" in str(error)


def test_no_large_file_and_no_core_is_left(child: str, tmp_path: Path) -> None:
    code = "import resource; limits = [resource.getrlimit(k)[0] for k in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE)]"
    run_child(child, {"code": f"{code}; assert limits[0] == 0 and 0 < limits[1] <= 1 << 30, limits"}, limits=ROOMY)


@pytest.mark.parametrize("kind", [UserError, VerificationFailure])
def test_the_two_kinds_of_failure_cross_over(child: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^said there$"):
        run_child(child, {"code": f"raise {kind.__name__}('said there')"}, limits=ROOMY)


def test_an_interrupt_ends_the_child(child: str) -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt(line)

    with pytest.raises(KeyboardInterrupt) as caught:
        run_child(child, {"code": "progress(str(os.getpid())); time.sleep(600)"}, interrupt, ROOMY)
    with pytest.raises(ProcessLookupError):
        os.kill(int(str(caught.value)), 0)


def test_a_stage_outside_of_a_child_costs_nothing_and_tells_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "stage"
    file.write_bytes(bytes(SIZE))
    with Stage("unheard"):
        assert read_stage(file) == ("", 0.0)
    monkeypatch.setattr("edgewright.system.stages._shared", None)  # put back afterwards
    report_to(file)
    with Stage("heard " + "é" * 500):
        name, seconds = read_stage(file)
        assert name.startswith("heard éé")
        assert 0 <= seconds < 60
    assert read_stage(file) == ("", 0.0)


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not hold a process to it")
def test_an_allocation_beyond_the_memory_fails_instead_of_ending_the_process() -> None:
    beyond = available_bytes() + (8 << 30)

    def in_parts() -> list[np.ndarray]:
        """Each small enough to be granted, and never touched."""
        return [np.empty(1 << 29, np.uint8) for _ in range(beyond >> 29)]

    with no_more_than_available(0), pytest.raises(MemoryError):
        in_parts()
    assert len(in_parts()) == beyond >> 29
