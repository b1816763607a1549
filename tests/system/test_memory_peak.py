"""A memory limit holds: whoever takes the memory, however many processes come and go, whatever fails in the watcher."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgewright.errors import UserError
from edgewright.system import control_group, memory_peak
from edgewright.system.control_group import ControlGroup
from edgewright.system.memory_peak import PeakAnonymous

MEBIBYTE = 1 << 20

GROWING = """
import sys, time
from edgewright.system.memory_peak import PeakAnonymous
from edgewright.system.memory import anonymous_bytes
with PeakAnonymous(anonymous_bytes() + (64 << 20)) as peak:
    held = []
    try:
        {body}
    except KeyboardInterrupt:
        print("over" if peak.over else "interrupted", peak.bytes >> 20)
"""
GROW = "\n        ".join(
    ("for _ in range(4096):", "    held.append(b'1' * (4 << 20))", "    time.sleep(0.002)", "print('all of it')")
)
STUBBORN = "\n        ".join(
    (
        "while len(held) < 4096:",
        "    try:",
        "        held.append(b'1' * (4 << 20))",
        "        time.sleep(0.002)",
        "    except KeyboardInterrupt:",
        "        pass",
        "print('all of it')",
    )
)
CROWD = "\n        ".join(
    (
        "import subprocess",
        "for _ in range(40):",
        "    for child in [subprocess.Popen(['true']) for _ in range(50)]:",
        "        child.wait()",
        "assert peak._thread.is_alive() and not peak.over",
    )
)
GREEDY_CHILD = "held = []; [held.append(b'1' * (4 << 20)) for _ in range(4096)]"
CHILD = "\n        ".join(
    (
        "import subprocess",
        f"subprocess.run([sys.executable, '-c', {GREEDY_CHILD!r}])",
        "time.sleep(5)",
        "print('all of it')",
    )
)


def script(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", GROWING.format(body=body)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("body", [GROW, CHILD], ids=["parent", "child"])
def test_what_takes_more_is_stopped_long_before_it_has_it_all(body: str) -> None:
    done = script(body)
    word, reached = done.stdout.split()
    assert (done.returncode, word) == (0, "over"), done
    assert int(reached) < 4096, "a second of growing is less"


def test_a_process_that_swallows_interrupts_is_ended() -> None:
    done = script(STUBBORN)
    assert done.returncode == 2
    assert done.stderr.startswith("error: this takes more than --memory-limit")
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_children_that_come_and_go_do_not_end_the_watch() -> None:
    done = script(f"{CROWD}\n        {GROW}")
    word, reached = done.stdout.split()
    assert (done.returncode, word) == (0, "over"), done
    assert int(reached) < 4096


def test_processes_that_are_gone_have_no_children_and_no_memory() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert memory_peak._children(child.pid) == []
    assert memory_peak._command(child.pid) == b""
    assert memory_peak.anonymous_of(Path("/proc", str(child.pid), "status")) == 0


def test_a_fork_counts_by_what_it_takes_beyond_its_parent() -> None:
    held = b"1" * (64 * MEBIBYTE)
    reader, writer = os.pipe()
    before = memory_peak._with_children()
    child = os.fork()
    if not child:
        os.read(reader, 1)
        os._exit(0)
    try:
        assert memory_peak._with_children() - before < 32 * MEBIBYTE
    finally:
        os.write(writer, b"1")
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
    assert held


def test_a_watcher_that_fails_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = PeakAnonymous(1 << 60)

    def fails() -> int:
        raise RuntimeError("no such thing")

    def watched() -> None:
        with peak:
            monkeypatch.setattr(memory_peak, "_with_children", fails)
            try:
                time.sleep(20)
            finally:
                monkeypatch.undo()

    with pytest.raises(UserError, match=r"--memory-limit could not be watched \(RuntimeError"):
        watched()


def test_a_limit_needs_a_system_that_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_peak, "anonymous_bytes", lambda: 0)
    with pytest.raises(UserError, match="does not tell"), PeakAnonymous(1 << 60):
        pass


def cgroup(root: Path, monkeypatch: pytest.MonkeyPatch, own: str = "0::/user/job\n") -> Path:
    """A folder that stands for the control groups, and this process's own group in it."""
    group = root / "user" / "job"
    group.mkdir(parents=True)
    (group / "cgroup.procs").write_text("")
    (root / "own").write_text(own)
    monkeypatch.setattr(control_group, "_ROOT", root)
    monkeypatch.setattr(control_group, "_OWN", root / "own")
    return group


def test_the_kernel_holds_the_limit_where_it_lets_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cgroup(tmp_path, monkeypatch)
    group = ControlGroup.enter(1 << 30)
    assert group is not None
    assert group.before == before
    assert (group.path / "cgroup.procs").read_text() == str(os.getpid())
    assert (before / "cgroup.subtree_control").read_text() == "+memory"
    assert (1 << 30) < int((group.path / "memory.max").read_text()) < (1 << 30) * 1.1
    group.leave()
    assert (group.path / "memory.max").read_text() == "max"
    assert (before / "cgroup.procs").read_text() == str(os.getpid())


@pytest.mark.parametrize("own", ["4:memory:/user/job\n", "0::/../user/job\n", "0::/other\n", "nonsense\n"])
def test_without_version_2_the_watcher_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str) -> None:
    cgroup(tmp_path, monkeypatch, own)
    assert ControlGroup.enter(1 << 30) is None


def test_a_group_that_cannot_be_limited_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cgroup(tmp_path, monkeypatch)
    (before / "cgroup.subtree_control").mkdir()  # opening it for writing fails
    assert ControlGroup.enter(1 << 30) is None
    assert (before / "cgroup.procs").read_text() == str(os.getpid())
