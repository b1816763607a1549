"""A real sshd on loopback with its own host key, user key and configuration; nothing of the system's is read or changed."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

_SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


class Sshd:
    """url: of a folder on "the device". program: a folder for PATH whose `ssh` uses the configuration of the tests."""

    def __init__(self, folder: Path) -> None:
        if not os.access(_SSHD, os.X_OK) or shutil.which("ssh") is None:
            pytest.skip("no sshd or ssh here: apt-get install openssh-server openssh-client")
        self.folder, self.port = folder, _free_port()
        self.programs = folder / "bin"
        self.programs.mkdir(parents=True)
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        shutil.copyfile(folder / "user.pub", folder / "authorized")
        key = (folder / "host.pub").read_text().split()
        (folder / "known").write_text(f"[127.0.0.1]:{self.port} {key[0]} {key[1]}\n")
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder / 'host'}\nAuthorizedKeysFile {folder / 'authorized'}\n"
            "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPidFile none\n"
            "PermitRootLogin prohibit-password\nMaxStartups 100\n"
        )
        (folder / "ssh_config").write_text(
            f"Host *\nIdentityFile {folder / 'user'}\nIdentitiesOnly yes\nUserKnownHostsFile {folder / 'known'}\n"
            "GlobalKnownHostsFile none\n"
        )
        wrapper = self.programs / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder / "ssh_config"} "$@"\n')
        wrapper.chmod(0o755)
        self._separation = Path("/run/sshd")
        self._made = os.geteuid() == 0 and not self._separation.exists()
        if self._made:
            self._separation.mkdir()
        self._process = self._start()

    def url(self, device: Path) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}{device}"

    def cut(self) -> None:
        """Kill every connection, and leave what runs behind them alone."""
        for pid in _below(self._process.pid):
            with contextlib.suppress(OSError):  # it may end meanwhile
                if Path(f"/proc/{pid}/comm").read_text().strip().startswith("sshd"):
                    os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        self.cut()
        self._process.kill()
        self._process.wait()

    def start_again(self) -> None:
        self._process = self._start()

    def close(self) -> None:
        self.stop()
        if self._made:
            self._separation.rmdir()

    def _start(self) -> subprocess.Popen[bytes]:
        log = (self.folder / "sshd.log").open("ab")
        process = subprocess.Popen([_SSHD, "-f", str(self.folder / "sshd_config"), "-D", "-e"], stderr=log)
        log.close()
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return process
            if process.poll() is not None:
                said = (self.folder / "sshd.log").read_text().strip().splitlines()
                pytest.skip(f"sshd does not start here: {said[-1] if said else process.returncode}")
            time.sleep(0.05)
        pytest.skip("sshd does not listen")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _below(pid: int) -> list[int]:
    """All processes that a process started, and theirs."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    todo = [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found
