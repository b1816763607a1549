"""A device behind a link: the runner put there, its commands called, files sent that the device lacks."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UserError
from ..system.hashes import of_files
from ..system.reading import one_line
from .links import Done, Link, LinkDown
from .runner import runner, runner_name
from .wheels import fetch_wheels

Note = Callable[[str], None]
T = TypeVar("T")

WAITS = (1.0, 2.0, 5.0, 10.0, 20.0)
"""Seconds before a broken link is tried again; as many tries without anything new are the end."""

_OLDEST_PYTHON = (3, 9)
_MOST_TRIES = 3
_Text = Annotated[str, Field(max_length=400)]
_Size = Annotated[int, Field(ge=0, le=1 << 60)]
_Clock = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class Cluster(BaseModel):
    """Cores of one clock."""

    model_config = ConfigDict(frozen=True)
    cores: _Text = ""
    mhz: _Clock | None = None
    most_mhz: _Clock | None = None
    governor: _Text = ""


Clocks = Annotated[tuple[Cluster, ...], Field(max_length=256)] | _Text
Celsius = (
    Annotated[dict[_Text, Annotated[float, Field(ge=-300, le=1e4, allow_inf_nan=False)]], Field(max_length=256)] | _Text
)
"""Degrees by the sensor's name; or that they are not measured."""


class About(BaseModel):
    """What a device says of itself; text where something is not measured. Sizes in bytes."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    machine: _Text
    emulated: bool
    system: _Text
    android: bool
    board: _Text
    cpu: _Text
    cores: _Size | None
    python: _Text
    libc: Annotated[tuple[_Text, ...], Field(max_length=2)]
    numpy: _Text | None
    onnxruntime: _Text | None
    problems: dict[_Text, _Text]
    memory_bytes: _Size | None
    memory_free_bytes: _Size | None
    disk_free_bytes: _Size | None
    clocks: Clocks
    celsius: Celsius
    throttling: _Text
    energy: Annotated[tuple[_Text, ...], Field(max_length=64)] | _Text

    @property
    def python_tag(self) -> str:
        """As wheels have it, such as cp311."""
        return "cp" + "".join(self.python.split(".")[:2])

    def runs(self, oldest: str) -> bool:
        """Whether numpy is there, and an onnxruntime no older than `oldest`."""
        return self.numpy is not None and self.onnxruntime is not None and release(self.onnxruntime) >= release(oldest)


def release(text: str) -> tuple[int, ...]:
    """A version's first three numbers, to be compared."""
    return tuple(int(n) for n in re.findall(r"\d{1,9}", text)[:3])


@dataclass(frozen=True)
class Sent:
    """A file to be sent: where it goes on the device, what it holds."""

    remote: str
    local: Path
    sha256: str


class Device:
    """A device behind a link. python: the command that starts Python there."""

    def __init__(self, link: Link, python: str, note: Note) -> None:
        self.link, self._python, self._note = link, python, note
        self._pythonpath = ""
        self._runner = f"{link.folder}/{runner_name()}"

    def connect(self) -> About:
        """Put the runner there and ask it. Raises UserError where nobody is let in, or there is no Python."""
        done = self._steadily(lambda: self.link.run(self.command("about", self.link.folder)))
        if done.code or last_record(done.out).get("record") != "about":  # the first time, or something lacks
            self._require_python()
            self._steadily(lambda: self._shell("mkdir", "-p", self.link.folder))
            self.put(runner(), self._runner)
            return self.about()
        return self._about_of(last_record(done.out))

    def about(self) -> About:
        """What the device says now. Raises UserError."""
        return self._about_of(self.call("about", self.link.folder))

    def _about_of(self, told: dict[str, Any]) -> About:
        try:
            return About.model_validate(told)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{self.link.url}: the device says of its {where}: {one_line(first['msg'], 120)}") from None

    def bring_libraries(self, about: About, oldest: str) -> About:
        """See that the device has numpy and an onnxruntime no older than `oldest`: its own, or wheels that are sent once.

        about: what `connect` returned. Raises UserError where there are no wheels for it, or they do not run there.
        """
        if about.runs(oldest):
            return about
        lacks = (
            f"onnxruntime {about.onnxruntime} there, {oldest} is needed"
            if about.onnxruntime
            else "no onnxruntime there"
        )
        site = f"{self.link.folder}/site-{about.python_tag}-{oldest}"
        self._pythonpath = site
        about = self.about()
        if not about.runs(oldest):
            self._note(f"{lacks}; sending wheels for {about.machine}, Python {about.python}")
            with tempfile.TemporaryDirectory() as folder:
                wheels = fetch_wheels(self.link.url, about.machine, about.python, about.libc, oldest, Path(folder))
                digests = of_files(wheels)
                sent = [Sent(f"{self.link.folder}/wheels/{w.name}", w, d) for w, d in zip(wheels, digests, strict=True)]
                self.send(sent)
                self.call("unpack", site, *(file.remote for file in sent))
            about = self.about()
        if not about.runs(oldest):
            why = "; ".join(f"{name}: {problem}" for name, problem in about.problems.items())
            raise UserError(
                f"{self.link.url}: the wheels do not run there ({one_line(why, 200)}); install onnxruntime {oldest} or later"
            )
        return about

    def send(self, files: list[Sent]) -> None:
        """Send what the device has not got, by hash, from where a broken link left off. Raises UserError."""
        by_digest = {file.sha256: file for file in files}
        sizes = {digest: file.local.stat().st_size for digest, file in by_digest.items()}
        store = f"{self.link.folder}/files"
        wanted = {
            "store": store,
            "files": [{"path": f.remote, "sha256": f.sha256, "size": sizes[f.sha256]} for f in files],
        }
        listing = self.put_json(wanted, "wanted")
        tries, before = 0, -1
        while True:
            lacking = self._lacking(listing, sizes)
            if not lacking:
                return
            have = sum(sizes.values()) - sum(sizes[digest] - had for digest, had in lacking.items())
            tries = 0 if have > before else tries + 1
            if tries >= _MOST_TRIES:
                name = by_digest[next(iter(lacking))].local.name
                raise UserError(
                    f"{self.link.url}: {one_line(name, 80)} does not arrive whole; is there space on the device?"
                )
            before = have
            for digest, had in lacking.items():
                file = by_digest[digest]
                self._note(
                    f"sending {file.local.name}: {(sizes[digest] - had) / 2**20:.1f} MiB"
                    + (f" after {had / 2**20:.1f}" if had else "")
                )
                try:
                    self.link.append(file.local, f"{store}/{digest}.partial", had)
                except LinkDown as error:
                    self._note(f"the link broke ({one_line(error, 100)}); going on from what arrived")
                    time.sleep(WAITS[min(tries, len(WAITS) - 1)])
                    break

    def put_json(self, value: Mapping[str, Any], name: str) -> str:
        """A JSON file on the device, which its content names; returns its path."""
        data = json.dumps(value, sort_keys=True).encode()
        remote = f"{self.link.folder}/{name}-{hashlib.sha256(data).hexdigest()[:16]}.json"
        self.put(data, remote)
        return remote

    def put(self, data: bytes, remote: str) -> None:
        """A small file, which appears whole or not at all."""
        self._steadily(lambda: self.link.write(data, remote))

    def command(self, *words: str) -> list[str]:
        """The command line of a runner's command. A shell stays before it, so that a killed runner has a status."""
        path = ["env", f"PYTHONPATH={self._pythonpath}"] if self._pythonpath else []
        return ["sh", "-c", '"$@"; exit $?', "sh", *path, self._python, self._runner, *words]

    def call(self, *words: str) -> dict[str, Any]:
        """The last record that a runner's command prints. Raises UserError for what it refuses."""
        done = self._steadily(lambda: self.link.run(self.command(*words)))
        record = last_record(done.out)
        if record.get("record") == "error":
            raise UserError(f"{self.link.url}: {one_line(record.get('error'), 300)}")
        if done.code:
            lines = [line for line in done.err.splitlines() if line.strip()]
            last = one_line(lines[-1] if lines else "it said nothing", 200)
            raise UserError(f"{self.link.url}: the runner ended with status {done.code} ({last})")
        return record

    def _lacking(self, listing: str, sizes: Mapping[str, int]) -> dict[str, int]:
        """Digest -> bytes that arrived, of the files that lack."""
        told = self.call("place", listing).get("lacking")
        found: dict[str, int] = {}
        for entry in told if isinstance(told, list) else []:
            digest = str(entry.get("sha256")) if isinstance(entry, dict) else ""
            had = entry.get("have") if isinstance(entry, dict) else None
            if digest not in sizes or not isinstance(had, int) or not 0 <= had <= sizes[digest]:
                raise UserError(f"{self.link.url}: the device asks for a file that was not offered")
            found[digest] = had
        return found

    def _require_python(self) -> None:
        program = "import sys; print(*sys.version_info[:2])"
        done = self._steadily(lambda: self.link.run([self._python, "-c", program]))
        found = re.fullmatch(r"(\d{1,2}) (\d{1,3})", done.out.strip())
        if done.code or found is None:
            android = self.link.url.startswith("adb")
            way = (
                "Android has none: install Termux, its python, numpy and sshd, and give ssh://phone:8022"
                if android
                else "install Python 3.9 or later there"
            )
            raise UserError(
                f"{self.link.url}: no {one_line(self._python, 60)} there; {way}, or say where it is with --device-python"
            )
        if (int(found[1]), int(found[2])) < _OLDEST_PYTHON:
            raise UserError(
                f"{self.link.url}: Python {found[1]}.{found[2]} there, 3.9 or later is needed; give another with --device-python"
            )

    def _shell(self, *words: str) -> Done:
        done = self.link.run(list(words))
        if done.code:
            raise UserError(
                f"{self.link.url}: {words[0]} failed there ({one_line(done.err.strip() or 'no reason given', 160)})"
            )
        return done

    def _steadily(self, action: Callable[[], T]) -> T:
        """Do it; where the link breaks, again after a while. Raises UserError when it stays broken."""
        for wait in WAITS:
            try:
                return action()
            except LinkDown as error:
                self._note(f"the link broke ({one_line(error, 100)}); trying again in {wait:.0f} s")
                time.sleep(wait)
        try:
            return action()
        except LinkDown as error:
            raise UserError(f"{self.link.url}: the device does not answer ({one_line(error, 120)})") from None


def last_record(text: str) -> dict[str, Any]:
    """The last line that is a JSON object; {} without one."""
    for line in reversed(text.splitlines()):
        record = record_of(line.encode())
        if record:
            return record
    return {}


def record_of(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; {} where it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
