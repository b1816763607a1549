"""The ways to a device: this machine (`local://`), `ssh://user@host:port`, `adb` or `adb://SERIAL`.

Commands are lists of words; the words reach the device's shell quoted. A folder behind the address is where the device keeps what
it gets: `ssh://pi@board/media/card/edgewright`.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..device_profiles.profile import Reach
from ..errors import UserError
from ..system.reading import one_line

_PART = 64 << 20
"""Bytes that adb pushes at once: as many are sent again after a broken link."""

_MOST_OUTPUT = 16 << 20
_SSH = (
    "-T",
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=15",
    "-o",
    "ServerAliveInterval=10",
    "-o",
    "ServerAliveCountMax=3",
)
_SSH_REFUSES = re.compile(
    r"Permission denied|Host key verification failed|Could not resolve|REMOTE HOST IDENTIFICATION"
)
_ADB_LOST = re.compile(
    r"^(?:adb: )?error: .*(?:offline|not found|no devices|closed|protocol fault|connect|timed? ?out|failed to (?:read|write))",
    re.MULTILINE,
)
_ADB_REFUSES = re.compile(r"unauthorized|more than one device|no permissions")
_ENDED = "edgewright-ended-"
_HOME, _ANDROID = ".cache/edgewright", "/data/local/tmp/edgewright"


class LinkDown(Exception):
    """The way to the device broke; what runs there may go on."""


@dataclass(frozen=True)
class Done:
    """How a command on the device ended, and what it printed."""

    code: int
    out: str
    err: str


class Link(Protocol):
    """A way to a device. url: as it was given. folder: where the device keeps what it gets."""

    url: str
    folder: str

    def run(self, command: Sequence[str], seconds: float = 600.0) -> Done:
        """Run a command to its end. Raises LinkDown, and UserError where nobody is let in."""
        ...

    def start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a command whose output is read as it comes."""
        ...

    def require_up(self, code: int, err: str) -> None:
        """Raise LinkDown if it was the link that ended a command with this status, UserError where nobody is let in."""
        ...

    def append(self, local: Path, remote: str, offset: int) -> None:
        """Append what `local` has from `offset` on to a file on the device, whose folder is there. Raises as `run`."""
        ...

    def write(self, data: bytes, remote: str) -> None:
        """A small file, which appears whole or not at all; its folder is there. Raises as `run`."""
        ...


def is_link(text: str) -> bool:
    """Whether a `--device` is a way to a device, and not the name of one."""
    return "://" in text or text == "adb"


def open_link(url: str) -> Link:
    """The link of an address; nothing is connected. Raises UserError for one that is none, or whose program is not here."""
    scheme, _, rest = url.partition("://")
    address, slash, path = rest.partition("/")
    folder = f"/{path.rstrip('/')}" if slash and path.strip("/") else None
    if folder is not None and not re.fullmatch(r"[A-Za-z0-9_./ +@:-]{1,400}", folder):
        raise UserError(f"{one_line(url, 120)}: a folder on a device is letters, digits and '_./ +@:-'")
    if scheme == "local" and not address:
        return LocalLink(url, folder or str(Path.home() / _HOME))
    if scheme == "ssh":
        host, _, port = address.rpartition(":") if re.search(r":\d+$", address) else (address, "", "")
        _require_host("ssh", host, url)
        if port and not 0 < int(port) < 65536:
            raise UserError(f"{one_line(url, 120)}: no port {port}; give 1 to 65535")
        return SshLink(url, host, port, folder or _HOME, _program("ssh", "openssh-client"))
    if scheme == "adb" and (address or not slash):
        if address:
            _require_host("adb", address, url)
        return AdbLink(url, address, folder or _ANDROID, _program("adb", "adb (Android's platform tools)"))
    raise UserError(f"{one_line(url, 120)} is no way to a device; write ssh://user@host, adb, adb://SERIAL or local://")


class LocalLink:
    """This machine, as if it were far away."""

    def __init__(self, url: str, folder: str) -> None:
        self.url, self.folder = url, folder

    def run(self, command: Sequence[str], seconds: float = 600.0) -> Done:
        return _done(list(command), seconds)

    def start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        return _started(list(command))

    def require_up(self, code: int, err: str) -> None:
        return

    def append(self, local: Path, remote: str, offset: int) -> None:
        with open(local, "rb") as source, open(remote, "ab") as target:
            source.seek(offset)
            shutil.copyfileobj(source, target, 1 << 20)

    def write(self, data: bytes, remote: str) -> None:
        partial = Path(f"{remote}.partial")
        partial.write_bytes(data)
        partial.replace(remote)


class SshLink:
    """A machine behind ssh; keys and hosts are those of the user's own configuration."""

    def __init__(self, url: str, host: str, port: str, folder: str, program: str) -> None:
        self.url, self.folder, self._host = url, folder, host
        self._begin = [program, *_SSH, *(["-p", port] if port else []), "--", host]

    def run(self, command: Sequence[str], seconds: float = 600.0) -> Done:
        done = _done([*self._begin, shlex.join(command)], seconds)
        self.require_up(done.code, done.err)
        return done

    def start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        return _started([*self._begin, shlex.join(command)])

    def require_up(self, code: int, err: str) -> None:
        refused = _SSH_REFUSES.search(err)
        if code == 255 and refused is not None:
            raise UserError(
                f"{self.url}: ssh says '{_last(err)}'; see that `ssh {self._host}` logs in without a question"
            )
        if code == 255:
            raise LinkDown(_last(err) or "the connection ended")

    def append(self, local: Path, remote: str, offset: int) -> None:
        with open(local, "rb") as source:
            source.seek(offset)
            command = [*self._begin, f"cat >> {shlex.quote(remote)}"]
            self._require_written(subprocess.run(command, stdin=source, capture_output=True, check=False), remote)

    def write(self, data: bytes, remote: str) -> None:
        # cat takes the end of a broken link for the end of the file
        whole = f"cat > {{0}} && [ $(wc -c < {{0}}) -eq {len(data)} ] && mv -f {{0}} {shlex.quote(remote)}"
        command = [*self._begin, whole.format(shlex.quote(f"{remote}.partial"))]
        self._require_written(subprocess.run(command, input=data, capture_output=True, check=False), remote)

    def _require_written(self, done: subprocess.CompletedProcess[bytes], remote: str) -> None:
        err = done.stderr.decode("utf-8", "replace")
        self.require_up(done.returncode, err)
        if done.returncode:
            raise UserError(
                f"{self.url}: {one_line(remote)} cannot be written there ({_last(err) or 'it was cut off'})"
            )


class AdbLink:
    """An Android device behind adb."""

    def __init__(self, url: str, serial: str, folder: str, program: str) -> None:
        self.url, self.folder = url, folder
        self._adb = [program, *(["-s", serial] if serial else [])]

    def run(self, command: Sequence[str], seconds: float = 600.0) -> Done:
        # adb's own status is 0 where the device is lost, and on Android 6 always
        done = _done([*self._adb, "shell", "-T", "-n", f"{shlex.join(command)}; echo {_ENDED}$?"], seconds)
        self.require_up(done.code, done.err)
        out, found, code = done.out.rpartition(_ENDED)
        if not found or not code.strip().isdecimal():
            raise LinkDown(_last(done.err) or "the connection ended")
        return Done(int(code), out, done.err)

    def start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        return _started([*self._adb, "shell", "-T", "-n", shlex.join(command)])

    def require_up(self, code: int, err: str) -> None:
        if code and _ADB_REFUSES.search(err):
            raise UserError(
                f"{self.url}: adb says '{_last(err)}'; see that `adb devices` lists one device, or give adb://SERIAL"
            )
        if code == 255 or (code and _ADB_LOST.search(err)):
            raise LinkDown(_last(err) or "adb lost the device")

    def append(self, local: Path, remote: str, offset: int) -> None:
        part = f"{remote}.part"
        with tempfile.TemporaryDirectory() as folder, open(local, "rb") as source:
            source.seek(offset)
            while block := source.read(_PART):
                piece = Path(folder, "part")
                piece.write_bytes(block)
                self._copy(["push", str(piece), part])
                quoted = shlex.quote(part)
                done = self.run(["sh", "-c", f"cat {quoted} >> {shlex.quote(remote)} && rm {quoted}"])
                if done.code:
                    raise UserError(f"{self.url}: {one_line(remote)} cannot be written there ({_last(done.err)})")

    def write(self, data: bytes, remote: str) -> None:
        partial = f"{remote}.partial"
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder, "file")
            local.write_bytes(data)
            self._copy(["push", str(local), partial])
        done = self.run(["mv", "-f", partial, remote])
        if done.code:
            raise UserError(f"{self.url}: {one_line(remote)} cannot be written there ({_last(done.err)})")

    def _copy(self, command: list[str]) -> None:
        done = _done([*self._adb, *command], 3600.0)
        self.require_up(
            done.code, f"{done.err}\n{done.out}"
        )  # of push and pull it tells some errors on standard output
        if done.code:
            raise UserError(f"{self.url}: adb {command[0]} failed ({_last(done.err) or _last(done.out)})")


def _require_host(by: str, host: str, url: str) -> None:
    """Raise UserError for a host that could be an option of ssh or adb, as a device's profile does."""
    try:
        Reach.model_validate({"by": by, "host": host})
    except ValueError:
        raise UserError(
            f"{one_line(url, 120)}: a host is letters, digits and '_.@:-', and does not start with '-'"
        ) from None


def _program(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise UserError(f"no {name} here; install {package}")
    return found


def _started(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _done(command: list[str], seconds: float) -> Done:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise LinkDown(f"no answer within {seconds:.0f} s") from None
    except FileNotFoundError:
        return Done(127, "", f"{command[0]}: not found")
    out, err = (text[:_MOST_OUTPUT].decode("utf-8", "replace") for text in (done.stdout, done.stderr))
    return Done(done.returncode, out, err)


def _last(text: str) -> str:
    """The last line that says something."""
    lines = [line for line in text.splitlines() if line.strip()]
    return one_line(lines[-1], 160) if lines else ""
