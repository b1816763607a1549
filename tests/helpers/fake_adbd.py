"""The device end of adb: what adbd speaks over TCP, over a folder that stands for the phone. Client and server are the real adb.

Spoken are CNXN, OPEN, OKAY, WRTE and CLSE; the services `shell,v2` (with exit codes) and `sync:` (STAT, SEND, RECV, QUIT). Paths
are this machine's; the folder's `bin` holds the device's programs.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import threading
from pathlib import Path

CNXN, OPEN, OKAY, WRTE, CLSE = (
    int.from_bytes(word, "little") for word in (b"CNXN", b"OPEN", b"OKAY", b"WRTE", b"CLSE")
)
_VERSION, _MOST = 0x01000001, 256 << 10
_BANNER = b"device::ro.product.name=paper;ro.product.model=Paper Phone;ro.product.device=paper;features=shell_v2,cmd"
_STDOUT, _STDERR, _EXIT = 1, 2, 3
_CHUNK = 64 << 10


class FakeAdbd:
    """Listens on a port of loopback until it is closed. url: of a folder on the phone, inside `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.serial = f"127.0.0.1:{self.port}"
        self.stored = folder / "edgewright"
        self.url = f"adb://{self.serial}{self.stored}"
        self.services: list[str] = []
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def program(self, name: str, text: str) -> None:
        """A shell script of the device."""
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def cut(self) -> None:
        """Break every connection; what was started goes on."""
        for connection in self._connections:
            _shut(connection)
        self._connections.clear()

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            threading.Thread(target=_Connection(self, connection).serve, daemon=True).start()


class _Connection:
    """One transport: messages of all its streams."""

    def __init__(self, device: FakeAdbd, connection: socket.socket) -> None:
        self.device, self._socket = device, connection
        self._lock = threading.Lock()
        self._streams: dict[int, _Stream] = {}
        self._last = 0

    def serve(self) -> None:
        try:
            while True:
                command, one, two, length = struct.unpack("<4I", _read(self._socket, 24)[:16])
                data = _read(self._socket, length)
                if command == CNXN:
                    self.send(CNXN, _VERSION, _MOST, _BANNER)
                elif command == OPEN:
                    self._open(one, data.rstrip(b"\0").decode())
                elif command == OKAY and two in self._streams:
                    self._streams[two].ready.release()
                elif command == WRTE and two in self._streams:
                    self.send(OKAY, two, one)
                    self._streams[two].receive(data)
                elif command == CLSE:
                    stream = self._streams.pop(two, None)
                    if stream is not None:
                        stream.end()
        except (OSError, EOFError):
            for stream in self._streams.values():
                stream.end()

    def send(self, command: int, one: int, two: int, data: bytes = b"") -> None:
        head = struct.pack("<6I", command, one, two, len(data), sum(data) & 0xFFFFFFFF, command ^ 0xFFFFFFFF)
        with self._lock:
            self._socket.sendall(head + data)

    def _open(self, remote: int, service: str) -> None:
        self.device.services.append(service)
        self._last += 1
        stream = _Stream(self, self._last, remote)
        self._streams[self._last] = stream
        self.send(OKAY, self._last, remote)
        work = stream.sync if service.startswith("sync:") else stream.shell
        threading.Thread(target=work, args=(service,), daemon=True).start()


class _Stream:
    """One opened service. ready: released for each message that the client has taken."""

    def __init__(self, connection: _Connection, local: int, remote: int) -> None:
        self._connection, self._local, self._remote = connection, local, remote
        self.ready = threading.Semaphore(1)
        self._input, self._output = os.pipe()
        self._ended = False

    def receive(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._output, data) :]

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            os.close(self._output)
            self.ready.release()

    def shell(self, service: str) -> None:
        """`shell,v2,…:COMMAND`: a shell in the device's root; what it prints in packets, then its exit code."""
        command = service.partition(":")[2]
        path = f"{self._connection.device.folder}/bin:/usr/bin:/bin"
        env = {"PATH": path, "ANDROID_ROOT": "/system", "HOME": "/"}
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            cwd="/",
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        readers = [
            threading.Thread(target=self._packets, args=(kind, pipe))
            for kind, pipe in ((_STDOUT, process.stdout), (_STDERR, process.stderr))
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        code = process.wait()
        self._say(struct.pack("<BI", _EXIT, 1) + bytes([code if code >= 0 else 128 - code]))
        self._close()

    def sync(self, _: str) -> None:
        """Files to and from the device."""
        while True:
            try:
                name, length = struct.unpack("<4sI", self._take(8))
            except EOFError:
                return
            if name == b"QUIT":
                self._close()
                return
            path = self._take(length).decode()
            try:
                if name == b"STAT":
                    self._say(b"STAT" + _facts(Path(path)))
                elif name == b"SEND":
                    self._received(Path(path.rpartition(",")[0]))
                elif name == b"RECV":
                    self._sent(Path(path))
            except OSError as error:
                why = str(error).encode()
                self._say(struct.pack("<4sI", b"FAIL", len(why)) + why)

    def _received(self, path: Path) -> None:
        with open(path, "wb") as file:
            while True:
                name, length = struct.unpack("<4sI", self._take(8))
                if name == b"DONE":
                    break
                file.write(self._take(length))
        self._say(struct.pack("<4sI", b"OKAY", 0))

    def _sent(self, path: Path) -> None:
        with open(path, "rb") as file:
            while block := file.read(_CHUNK):
                self._say(struct.pack("<4sI", b"DATA", len(block)) + block)
        self._say(struct.pack("<4sI", b"DONE", 0))

    def _packets(self, kind: int, pipe: object) -> None:
        descriptor = pipe.fileno()  # type: ignore[attr-defined]
        while block := os.read(descriptor, _CHUNK):
            self._say(struct.pack("<BI", kind, len(block)) + block)

    def _say(self, data: bytes) -> None:
        self.ready.acquire()
        if not self._ended:
            try:
                self._connection.send(WRTE, self._local, self._remote, data)
            except OSError:
                self.end()
        if self._ended:
            self.ready.release()  # nobody takes anything any more

    def _take(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            block = os.read(self._input, count - len(found))
            if not block:
                raise EOFError
            found += block
        return found

    def _close(self) -> None:
        if not self._ended:
            self.ready.acquire()
            self._connection.send(CLSE, self._local, self._remote)


def _facts(path: Path) -> bytes:
    if not path.exists():
        return struct.pack("<3I", 0, 0, 0)
    found = path.stat()
    return struct.pack("<3I", found.st_mode, found.st_size & 0xFFFFFFFF, int(found.st_mtime))


def _read(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        block = connection.recv(count - len(found))
        if not block:
            raise EOFError
        found += block
    return found


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
