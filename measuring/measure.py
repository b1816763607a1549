"""A bundle measured on a device: what it lacks is sent, rows come back as they are finished, a broken link and a killed run go on.

The device keeps each finished row in a journal of the run, and so does the bundle's folder `reports`. A run is all that a row
depends on: files, tests, settings, versions. When it is whole the journals are removed, and the next one measures anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..bundle import CHECKPOINT, EXAMPLES, MANIFEST, REPORTS, Bundle
from ..errors import UserError
from ..system.hashes import of_file
from ..system.reading import one_line, read_text
from .device import WAITS, About, Celsius, Clocks, Device, Note, Sent, record_of
from .links import Link, LinkDown
from .on_device.journal import Journal
from .runner import runner_name

FORMAT = "onnx"
_MOST_LINE = 4 << 20
_MOST_DEATHS = 2
_MOST_KEPT = 256 << 20
_Text = Annotated[str, Field(max_length=400)]
_Rate = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]


@dataclass(frozen=True)
class Settings:
    """How a device is measured.

    repeats: of each row, after one that does not count. threads: 0 is all cores. sustain: seconds that decoding goes on for its
    sustained rate; 0: none. cool_within: the most seconds to wait for a cool device before a row. python: the command that starts
    Python there. resume: whether a run that ended early goes on.
    """

    repeats: int = 5
    threads: int = 0
    sustain: float = 0.0
    cool_within: float = 300.0
    python: str = "python3"
    resume: bool = True


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=False)


class Energy(_Told):
    """One source. joules: or why it tells none."""

    source: _Text
    boundary: _Text
    joules: _Rate | _Text
    joules_a_unit: _Rate | None = None
    watts: _Rate | None = None


_Energies = Annotated[tuple[Energy, ...], Field(max_length=64)] | _Text


class Sustained(_Told):
    """Decoding that went on: the first window's rate, the rate of the last ones, whether they agree."""

    first: _Rate
    rate: _Rate
    settled: bool
    seconds: _Rate
    windows: Annotated[tuple[_Rate, ...], Field(max_length=4096)]
    energy: _Energies


class State(_Told):
    """A device before or after a row."""

    clocks: Clocks
    celsius: Celsius
    throttling: _Text


class MeasuredRow(_Told):
    """A finished row. Of an emulated device no time is told. answer: the tokens of a test that has no time."""

    record: Literal["row"]
    test: _Text
    kind: _Text
    figure: Literal["measured", "emulated"]
    unit: _Text = "tokens"
    rate: _Rate | None = None
    deviation: _Rate | None = None
    median: _Rate | None = None
    n: Annotated[int, Field(ge=0)] = 0
    rates: Annotated[tuple[_Rate, ...], Field(max_length=1 << 20)] | None = None
    energy: _Energies | None = None
    sustained: Sustained | None = None
    memory: dict[_Text, Annotated[int, Field(ge=0, le=1 << 60)]] | _Text = ""
    cool: dict[_Text, bool | float | _Text | None] = {}
    before: State | None = None
    after: State | None = None
    answer: Annotated[tuple[int, ...], Field(max_length=1 << 16)] | None = None
    at: _Rate = 0.0


class DeviceResult(BaseModel):
    """All of a device. load_s: of the first load, and of one after the rows. settings: what the runner set, and why.

    answer_here: what this machine answers to the prompt of the row "answer".
    """

    model_config = ConfigDict(frozen=True)
    device: str
    about: About
    rows: tuple[MeasuredRow, ...]
    load_s: float | None
    load_again_s: float | None
    settings: dict[str, str]
    not_measured: dict[str, str]
    answer_here: tuple[int, ...] | None = None


def measure(
    bundle: Bundle, link: Link, tests: Sequence[dict[str, Any]], oldest: str, settings: Settings, note: Note
) -> DeviceResult:
    """Run tests (`on_device.rows` says what they are) on a device.

    oldest: the onnxruntime that the graphs need. Raises UserError for a device that cannot be reached or does not run the graphs;
    what was finished is then kept for the same command.
    """
    device = Device(link, settings.python, note)
    about = device.bring_libraries(device.connect(), oldest)
    if about.emulated:
        note("an emulator runs the device's programs: no times are told")
    folder = _send(bundle, device)
    return _Run(bundle, device, about, folder, tests, settings, note).to_end()


def _send(bundle: Bundle, device: Device) -> str:
    """Send the graphs; returns their folder on the device."""
    graphs = {f"{FORMAT}/{graph.name}.onnx" for graph in bundle.manifest.graphs}
    names = [name for name in bundle.target(FORMAT).files if name in graphs or not name.endswith(".onnx")]
    if bundle.manifest.generation.task == "module":
        names.append(f"{CHECKPOINT}/{EXAMPLES}")
    digests = {MANIFEST: of_file(bundle.path / MANIFEST), **{name: bundle.manifest.files[name] for name in names}}
    folder = f"{device.link.folder}/bundles/{_digest(digests)}"
    device.send([Sent(f"{folder}/{name}", bundle.path / name, digest) for name, digest in digests.items()])
    return folder


class _Run:
    """One run of tests on a device, to be called once."""

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        about: About,
        folder: str,
        tests: Sequence[dict[str, Any]],
        settings: Settings,
        note: Note,
    ) -> None:
        self._device, self._about, self._tests, self._settings, self._note = device, about, tests, settings, note
        self._request: dict[str, Any] = {
            "bundle": folder,
            "tests": list(tests),
            "repeats": settings.repeats,
            "threads": settings.threads,
            "sustain": settings.sustain,
            "cool_within": settings.cool_within,
        }
        versions = [about.machine, about.system, about.python, about.numpy, about.onnxruntime, runner_name()]
        run = _digest({"request": self._request, "versions": versions})
        self._journal = f"{device.link.folder}/rows-{run}.jsonl"
        self._kept_path = bundle.path / REPORTS / f"rows-{_digest({'run': run, 'device': device.link.url})}.jsonl"
        self._rows: dict[str, MeasuredRow] = {}
        self._loads: list[dict[str, Any]] = []
        self._again: float | None = None
        self._given_up: dict[str, str] = {}
        self._deaths: dict[str, int] = {}
        self._ended = False

    def to_end(self) -> DeviceResult:
        """Run until every row is there or given up. Raises UserError."""
        if not self._settings.resume:
            self._forget()
        for record in self._kept_records():
            self._take(record, kept=True)
        if self._rows:
            self._note(f"going on with a run that ended early: {len(self._rows)} of {len(self._tests)} rows are there")
        misses = 0
        while not self._ended:
            before = len(self._rows) + len(self._given_up)
            try:
                self._once()
            except LinkDown as error:
                misses = 0 if len(self._rows) + len(self._given_up) > before else misses + 1
                if misses > len(WAITS):
                    raise UserError(
                        f"{self._device.link.url}: the device does not answer ({one_line(error, 120)}); "
                        f"{len(self._rows)} of {len(self._tests)} rows are kept: the same command goes on"
                    ) from None
                wait = WAITS[max(0, misses - 1)]
                self._note(f"the link broke ({one_line(error, 100)}); trying again in {wait:.0f} s")
                time.sleep(wait)
        lost = [t["name"] for t in self._tests if t["name"] not in self._rows and t["name"] not in self._given_up]
        if lost:
            raise UserError(
                f"{self._device.link.url}: the runner ended without {', '.join(lost)}; run the command again"
            )
        self._forget()
        loaded = self._loads[0] if self._loads else {}
        return DeviceResult(
            device=self._device.link.url,
            about=self._about,
            rows=tuple(self._rows[test["name"]] for test in self._tests if test["name"] in self._rows),
            load_s=_number(loaded.get("load_s")),
            load_again_s=self._again,
            settings={one_line(k, 100): one_line(v, 200) for k, v in _mapping(loaded.get("settings")).items()},
            not_measured=self._given_up,
        )

    def _once(self) -> None:
        """Start the runner and follow it until it ends. Raises LinkDown, UserError."""
        skip = {**self._given_up, **dict.fromkeys(self._rows, "it is here")}
        request = f"{self._journal}.request"
        asked = {**self._request, "journal": self._journal, "skip": skip}
        self._device.put(json.dumps(asked).encode(), request)
        process = self._device.link.start(self._device.command("measure", request))
        said = _Tail(process)
        current = ""
        try:
            assert process.stdout is not None
            while line := process.stdout.readline(_MOST_LINE):
                record = record_of(line)
                kind = record.get("record")
                if kind == "error":
                    raise UserError(f"{self._device.link.url}: {one_line(record.get('error'), 300)}")
                if kind == "begin":
                    current = one_line(record.get("test"), 100)
                self._take(record)
            code = process.wait()
        except BaseException as error:
            process.kill()
            process.wait()
            if isinstance(error, KeyboardInterrupt):
                self._stop()
            raise
        if self._ended:
            return
        err = said.text()
        self._device.link.require_up(code, err)
        if code == 0:  # adb's status where the device is lost
            raise LinkDown("the connection ended")
        self._died(current, code, err)

    def _take(self, record: dict[str, Any], kept: bool = False) -> None:
        """One record, as the runner told it or as it was kept here."""
        kind = record.get("record")
        if kind == "end":
            self._ended = not kept
        elif kind == "loaded again":
            self._again = _number(record.get("load_s"))
        elif kind == "loaded":
            if record in self._loads:
                return
            self._loads.append(record)
            if not kept and len(self._loads) == 1:
                for setting, why in _mapping(record.get("settings")).items():
                    self._note(f"set on the device: {one_line(setting, 80)}, as {one_line(why, 160)}")
        elif kind == "row":
            self._take_row(record, kept)
            return
        if kind in ("loaded", "loaded again") and not kept:
            self._keep(record)

    def _take_row(self, record: dict[str, Any], kept: bool) -> None:
        try:
            row = MeasuredRow.model_validate(record)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            what = f"a row's {one_line(where, 60)}: {one_line(first['msg'], 100)}"
            raise UserError(f"{self._device.link.url}: {what}; measure again with --no-resume") from None
        if row.test in self._rows or row.test not in {test["name"] for test in self._tests}:
            return
        self._rows[row.test] = row
        if not kept:
            self._keep(record)
            rate = "" if row.rate is None else f": {row.rate:.2f} {row.unit} a second"
            self._note(f"{row.test}{rate}")

    def _died(self, test: str, code: int, err: str) -> None:
        """The runner's process ended early though the link is up: once more; a test that it dies in twice is given up."""
        lines = [line for line in err.splitlines() if line.strip()]
        how = "was killed; is there memory enough?" if code in (137, 9, -9) else f"ended with status {code}"
        how += f" ({one_line(lines[-1], 160)})" if lines else ""
        self._deaths[test] = self._deaths.get(test, 0) + 1
        if self._deaths[test] < _MOST_DEATHS:
            self._note(f"the runner {how}; starting it again")
        elif test:
            self._given_up[test] = f"the runner {how}, {_MOST_DEATHS} times"
        else:
            raise UserError(f"{self._device.link.url}: loading the graphs the runner {how}")

    def _stop(self) -> None:
        """End the runner on the device: nobody waits for it any more."""
        try:
            self._device.link.run(self._device.command("stop", self._journal), 20.0)
        except (LinkDown, UserError):
            self._note("the device cannot be told to stop; it ends with its last row")

    def _kept_records(self) -> list[dict[str, Any]]:
        """What is kept here of a run that ended early. The bundle may be a stranger's."""
        if self._leads_out() or not self._kept_path.exists():
            return []
        text = read_text(self._kept_path, _MOST_KEPT)
        return [record_of(line.encode()) for line in text[: text.rfind("\n") + 1].splitlines()]

    def _keep(self, record: dict[str, Any]) -> None:
        # a bundle that cannot be written to: the device keeps the row
        with contextlib.suppress(OSError):
            if not self._leads_out():
                self._kept_path.parent.mkdir(exist_ok=True)
                Journal(self._kept_path).add(record)

    def _leads_out(self) -> bool:
        return self._kept_path.is_symlink() or self._kept_path.parent.is_symlink()

    def _forget(self) -> None:
        """Remove both journals; a process that still measures is ended first."""
        self._device.call("forget", self._journal)
        self._kept_path.unlink(missing_ok=True)


class _Tail:
    """The end of what a process writes to standard error, read beside it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._end = b""
        assert process.stderr is not None
        self._stream = process.stderr
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def text(self) -> str:
        self._thread.join(5.0)
        return self._end.decode("utf-8", "replace")

    def _read(self) -> None:
        while block := self._stream.read(4096):
            self._end = (self._end + block)[-8192:]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _number(value: object) -> float | None:
    """A number of seconds; None for anything else."""
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e9 else None


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
