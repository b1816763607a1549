"""Addresses of devices, wheels for another machine, and what the command line refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.cli_runner import edgewright, refused

from edgewright.errors import UserError
from edgewright.measuring.device import Device
from edgewright.measuring.links import AdbLink, LinkDown, LocalLink, SshLink, is_link, open_link
from edgewright.measuring.wheels import fetch_wheels, platforms


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ssh and an adb on the path; none of them is started."""
    for name in ("ssh", "adb"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 9\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_addresses(programs: None) -> None:
    ssh = open_link("ssh://pi@raspberrypi.local:2222/media/card/ew")
    assert isinstance(ssh, SshLink)
    assert ssh.folder == "/media/card/ew"
    assert ssh._begin[-4:] == ["-p", "2222", "--", "pi@raspberrypi.local"]
    assert open_link("ssh://board").folder == ".cache/edgewright"
    adb = open_link("adb")
    assert isinstance(adb, AdbLink)
    assert adb.folder == "/data/local/tmp/edgewright"
    named = open_link("adb://R5CT10XYZ")
    assert isinstance(named, AdbLink)
    assert named._adb[1:] == ["-s", "R5CT10XYZ"]
    assert isinstance(open_link("local:///x"), LocalLink)
    assert [is_link(text) for text in ("adb", "ssh://a", "samsung-galaxy-s26", "adb2")] == [True, True, False, False]


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("ssh://-oProxyCommand=x", "does not start with '-'"),
        ("ssh://a b", "a host is letters"),
        ("ssh://", "a host is letters"),
        ("ssh://pi@board:99999", "no port 99999"),
        ("ssh://pi@board/a;rm -rf b", "a folder on a device is"),
        ("ssh://pi@board/$(x)", "a folder on a device is"),
        ("adb://-s", "does not start with '-'"),
        ("telnet://board", "is no way to a device"),
        ("local://board/x", "is no way to a device"),
    ],
)
def test_addresses_that_are_none(programs: None, url: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        open_link(url)
    assert line in str(error.value)


def test_a_program_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no ssh here; install openssh-client"):
        open_link("ssh://board")
    with pytest.raises(UserError, match="no adb here"):
        open_link("adb")


def test_who_ended_a_command(programs: None) -> None:
    ssh, adb = open_link("ssh://board"), open_link("adb")
    ssh.require_up(137, "Killed")
    with pytest.raises(LinkDown, match="Connection refused"):
        ssh.require_up(255, "ssh: connect to host board port 22: Connection refused")
    with pytest.raises(UserError, match="logs in without a question"):
        ssh.require_up(255, "Host key verification failed.")
    adb.require_up(127, "/system/bin/sh: python3: inaccessible or not found")
    for said in (
        "error: device offline",
        "adb: error: failed to get feature set: device 'x' not found",
        "error: closed",
    ):
        with pytest.raises(LinkDown):
            adb.require_up(1, said)
    with pytest.raises(UserError, match="adb devices"):
        adb.require_up(1, "error: more than one device/emulator")


def test_words_reach_the_devices_shell_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for ssh runs the last argument in a shell, as sshd does."""
    (tmp_path / "ssh").write_text('#!/bin/sh\nfor last; do :; done\nexec /bin/sh -c "$last"\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    link = open_link("ssh://board")
    words = ["a b", "$HOME", "`id`", "'", '"', ";", "*", "\\"]
    assert link.run(["printf", "%s\\n", *words]).out.splitlines() == words
    link.write(b"x" * 1000, str(tmp_path / "it's $HOME"))
    assert (tmp_path / "it's $HOME").read_bytes() == b"x" * 1000


def test_a_write_that_is_cut_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ssh").write_text('#!/bin/sh\nfor last; do :; done\nhead -c 400 | /bin/sh -c "$last"\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match="it was cut off"):
        open_link("ssh://board").write(b"x" * 1000, str(tmp_path / "file"))
    assert not (tmp_path / "file").exists()


def test_platforms_of_wheels() -> None:
    assert platforms("aarch64", ("glibc", "2.28"))[:2] == ["manylinux_2_28_aarch64", "manylinux_2_27_aarch64"]
    assert platforms("aarch64", ("glibc", "2.36"))[-2:] == ["manylinux_2_17_aarch64", "manylinux2014_aarch64"]
    assert (
        platforms("aarch64", ("", ""))
        == platforms("aarch64", ("libc", "1"))
        == platforms("a;b", ("glibc", "2.36"))
        == []
    )


@pytest.mark.parametrize(("python", "libc"), [("3.13.1", ("", "")), ("2.7.18", ("glibc", "2.31"))])
def test_no_wheels_for_it(tmp_path: Path, python: str, libc: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="there are no wheels of onnxruntime for aarch64"):
        fetch_wheels("ssh://board", "aarch64", python, libc, "1.30", tmp_path)


def test_names_and_options_without_a_link(tmp_path: Path) -> None:
    line = refused(edgewright("profile", tmp_path, "--device", "samsung-galaxy-s25", "--device", "adb"))
    assert "samsung-galaxy-s25 is a name, and names are predicted; give links" in line
    assert "is a name" in refused(edgewright("doctor", "--device", "samsung-galaxy-s25"))
    for flag in (["--sustain", "5"], ["--cool-within", "1"], ["--device-python", "x"], ["--no-resume"]):
        assert f"{flag[0]} is for a device behind a link" in refused(edgewright("profile", tmp_path, *flag))
    line = refused(edgewright("profile", tmp_path, "--device", "local://", "--format", "coreml"))
    assert "--device measures the onnx artefact" in line


def test_a_python_that_is_too_old(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\n[ "$1" = -c ] && echo 3 6 || exit 1\n')
    old.chmod(0o755)
    with pytest.raises(UserError, match=r"Python 3\.6 there, 3\.9 or later is needed"):
        Device(open_link(f"local://{tmp_path}/d"), str(old), lambda _: None).connect()


def test_doctor_of_a_device_without_onnxruntime(tmp_path: Path) -> None:
    """The system's Python, without what this one has."""
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    done = subprocess.run([bare, "-c", "import onnxruntime"], capture_output=True, check=False)
    assert done.returncode
    said = edgewright("doctor", "--device", f"local://{tmp_path}/d", "--device-python", bare).stdout
    assert "onnxruntime missing, numpy missing" in said
    assert "missing     onnxruntime and numpy: `profile` sends wheels for" in said
