"""Clocks, temperatures, energy and memory, read from what a Linux or Android device offers; what it does not offer is not measured.

`root` is the file system's; tests give another.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOT_MEASURED = "not measured"

ROOT = Path("/")
_SAMPLE = 0.1
"""Seconds between two readings of a power."""


def text_of(path: Path) -> str:
    """A small file's text without space around it; "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()[: 1 << 16]
    except OSError:
        return ""


def number_of(path: Path) -> float | None:
    """The number in a small file; None where there is none."""
    try:
        return float(text_of(path))
    except ValueError:
        return None


def said(*command: str) -> str:
    """What a command prints; "" where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def clocks(root: Path = ROOT) -> list[dict[str, Any]] | str:
    """The clusters of the CPU: their cores, the clock now and the highest one in MHz, the governor."""
    found = []
    for policy in sorted(root.glob("sys/devices/system/cpu/cpufreq/policy*"), key=_numbered):
        now, most = number_of(policy / "scaling_cur_freq"), number_of(policy / "cpuinfo_max_freq")
        found.append(
            {
                "cores": text_of(policy / "related_cpus"),
                "mhz": None if now is None else now / 1e3,
                "most_mhz": None if most is None else most / 1e3,
                "governor": text_of(policy / "scaling_governor"),
            }
        )
    return found or NOT_MEASURED


def fastest_cores(clusters: list[dict[str, Any]] | str, count: int) -> set[int]:
    """So many cores of the highest clocks; none where all are alike, or `count` is 0 or all of them."""
    if isinstance(clusters, str) or len({cluster["most_mhz"] for cluster in clusters}) < 2:
        return set()
    ordered = sorted(clusters, key=lambda cluster: -(cluster["most_mhz"] or 0.0))
    cores = [int(core) for cluster in ordered for core in re.findall(r"\d+", cluster["cores"])]
    return set(cores[:count]) if 0 < count < len(cores) else set()


def temperatures(root: Path = ROOT) -> dict[str, float] | str:
    """Degrees Celsius by the sensor's name: thermal zones, else hardware monitors, else Android's thermal service."""
    found: dict[str, float] = {}
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*"), key=_numbered):
        _add(found, text_of(zone / "type") or zone.name, number_of(zone / "temp"))
    if not found:
        for value in sorted(root.glob("sys/class/hwmon/hwmon*/temp*_input")):
            label = text_of(value.with_name(value.name.replace("_input", "_label"))) or value.name.partition("_")[0]
            _add(found, f"{text_of(value.parent / 'name')} {label}".strip(), number_of(value))
    if not found:
        now = (
            said("dumpsys", "thermalservice")
            .partition("Current temperatures from HAL")[2]
            .partition("Current cooling")[0]
        )
        for celsius, name in re.findall(r"Temperature\{mValue=(-?[0-9.]+), mType=-?\d+, mName=([^,}]{1,40})", now):
            found[name] = float(celsius)
    return found or NOT_MEASURED


def throttling(root: Path = ROOT) -> str:
    """What the system says of throttling: Android's thermal status, or a Raspberry Pi's flags."""
    status = re.search(r"Thermal Status: (\d+)", said("dumpsys", "thermalservice"))
    if status is not None:
        return f"Android thermal status {status[1]}"
    flags = re.search(r"throttled=(0x[0-9a-fA-F]+)", said("vcgencmd", "get_throttled"))
    if flags is not None:
        return f"Raspberry Pi throttled={flags[1]}"
    return NOT_MEASURED


def state(root: Path = ROOT) -> dict[str, Any]:
    """Clocks, temperatures and throttling now."""
    return {"clocks": clocks(root), "celsius": temperatures(root), "throttling": throttling(root)}


def hottest(root: Path = ROOT) -> float | None:
    """The highest temperature; None where none can be read."""
    found = temperatures(root)
    return max(found.values()) if isinstance(found, dict) else None


def memory(root: Path = ROOT) -> dict[str, int] | str:
    """Bytes of this process: the peak of what was resident, and anonymous memory now."""
    fields = dict(re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB", text_of(root / "proc/self/status"), re.MULTILINE))
    if "VmHWM" not in fields:
        return NOT_MEASURED
    return {"peak_resident": int(fields["VmHWM"]) << 10, "anonymous": int(fields.get("RssAnon", 0)) << 10}


class Source:
    """Something that tells of energy.

    boundary: what its figure counts: rail, package, gpu or device. grows: whether `read` gives joules since some start, which only
    grow, or watts now. least: seconds below which its figure says nothing. wraps: joules at which a counter begins again.
    """

    def __init__(
        self, name: str, boundary: str, read: Callable[[], float | None], grows: bool, least: float, wraps: float = 0.0
    ) -> None:
        self.name, self.boundary, self.read, self.grows, self.least, self.wraps = (
            name,
            boundary,
            read,
            grows,
            least,
            wraps,
        )


def sources(root: Path = ROOT) -> list[Source]:
    """All sources that can be read here."""
    every = [*_rapl(root), *_ina(root), *_gpus(), *_batteries(root)]
    return [source for source in every if source.read() is not None]


class Meter:
    """Energy while it is entered, which may be many times: counters are read at both ends, powers by a thread."""

    def __init__(self, found: list[Source]) -> None:
        self.seconds = 0.0
        self._found = found
        self._joules = {source.name: 0.0 for source in found}
        self._gone: set[str] = set()
        self._start: dict[str, float | None] = {}
        self._began = 0.0
        self._watts: dict[str, list[float]] = {source.name: [] for source in found if not source.grows}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        self._start = {source.name: source.read() for source in self._found if source.grows}
        if self._watts:
            self._stop.clear()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
        for source in self._found:
            if not source.grows:
                continue
            before, after = self._start[source.name], source.read()
            if before is None or after is None:
                self._gone.add(source.name)
                continue
            self._joules[source.name] += after - before + (source.wraps if after < before else 0.0)

    def result(self, work: float) -> list[dict[str, Any]] | str:
        """Joules of each source, and by unit of `work`; why a source says nothing, where it does not."""
        return [self._of(source, work) for source in self._found] or NOT_MEASURED

    def _of(self, source: Source, work: float) -> dict[str, Any]:
        entry: dict[str, Any] = {"source": source.name, "boundary": source.boundary}
        watts = self._watts.get(source.name, [])
        joules = self._joules[source.name] if source.grows else self.seconds * sum(watts) / max(1, len(watts))
        if source.name in self._gone or not (source.grows or watts):
            return {**entry, "joules": f"{NOT_MEASURED}: it could not be read all the time"}
        if self.seconds < source.least:
            return {
                **entry,
                "joules": f"{NOT_MEASURED}: {self.seconds:.1f} s are too short for it, {source.least:g} s are needed",
            }
        if joules <= 0:
            return {**entry, "joules": f"{NOT_MEASURED}: it did not move"}
        return {**entry, "joules": joules, "joules_a_unit": joules / work, "watts": joules / self.seconds}

    def _sample(self) -> None:
        while True:
            for source in self._found:
                if not source.grows:
                    watts = source.read()
                    if watts is not None:
                        self._watts[source.name].append(watts)
            if self._stop.wait(_SAMPLE):
                return


def _rapl(root: Path) -> list[Source]:
    """Packages of Intel's and AMD's running average power limit; reading them may need root."""
    found = []
    for zone in sorted(root.glob("sys/class/powercap/intel-rapl:*")):
        if not re.fullmatch(r"intel-rapl:\d+", zone.name):
            continue
        name = text_of(zone / "name") or zone.name
        range_ = (number_of(zone / "max_energy_range_uj") or 0.0) / 1e6
        boundary = "device" if name == "psys" else "package"
        found.append(Source(f"RAPL {name}", boundary, _scaled(zone / "energy_uj", 1e-6), True, 1.0, range_))
    return found


def _ina(root: Path) -> list[Source]:
    """Rails behind INA sensors, as on a Jetson."""
    found = []
    for chip in sorted(root.glob("sys/class/hwmon/hwmon*")):
        name = text_of(chip / "name")
        if not name.startswith("ina"):
            continue
        powers = sorted(chip.glob("power*_input"))
        found += [Source(f"{name} {p.name.partition('_')[0]}", "rail", _scaled(p, 1e-6), False, 1.0) for p in powers]
        if powers:
            continue
        for amperes in sorted(chip.glob("curr*_input")):
            number = re.sub(r"\D", "", amperes.name)
            label, volts = text_of(chip / f"in{number}_label"), chip / f"in{number}_input"
            if label and "sum" not in label.lower() and number_of(volts) is not None:
                found.append(Source(f"{name} {label}", "rail", _product(amperes, volts, 1e-6), False, 1.0))
    return found


def _batteries(root: Path) -> list[Source]:
    """Batteries that discharge: a charging one tells nothing of what the device draws."""
    found = []
    for supply in sorted(root.glob("sys/class/power_supply/*")):
        if text_of(supply / "type") == "Battery" and text_of(supply / "status") == "Discharging":
            watts = _product(supply / "current_now", supply / "voltage_now", 1e-12)
            found.append(Source(f"battery {supply.name}", "device", watts, False, 10.0))
    if not found and not re.search(r"powered: true", said("dumpsys", "battery")):
        found.append(Source("Android battery", "device", _android_battery, True, 60.0))
    return found


def _android_battery() -> float | None:
    """Joules drawn from a full battery, by Android's charge counter (microampere-hours) and voltage (mV)."""
    fields = dict(re.findall(r"^\s*(Charge counter|voltage): (-?\d+)", said("dumpsys", "battery"), re.MULTILINE))
    if len(fields) < 2:
        return None
    return -int(fields["Charge counter"]) * 1e-6 * 3600.0 * int(fields["voltage"]) * 1e-3


def _gpus() -> list[Source]:
    """NVIDIA GPUs whose driver counts millijoules (NVML)."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    count = ctypes.c_uint()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return []
    found = []
    for index in range(count.value):
        handle = ctypes.c_void_p()
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0:
            found.append(Source(f"NVML GPU {index}", "gpu", _gpu_energy(nvml, handle), True, 1.0))
    return found


def _gpu_energy(nvml: Any, handle: Any) -> Callable[[], float | None]:
    def read() -> float | None:
        millijoules = ctypes.c_ulonglong()
        if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            return None
        return millijoules.value / 1e3

    return read


def _scaled(path: Path, factor: float) -> Callable[[], float | None]:
    def read() -> float | None:
        value = number_of(path)
        return None if value is None else value * factor

    return read


def _product(one: Path, other: Path, factor: float) -> Callable[[], float | None]:
    """The absolute product of two readings: a battery's current may be negative."""

    def read() -> float | None:
        a, b = number_of(one), number_of(other)
        return None if a is None or b is None else abs(a * b) * factor

    return read


def _numbered(path: Path) -> tuple[int, str]:
    return int(re.sub(r"\D", "", path.name) or 0), path.name


def _add(found: dict[str, float], name: str, value: float | None) -> None:
    """A temperature in thousandths of a degree, or in degrees where it is small; sensors of one name are numbered."""
    if value is None or value <= -40_000:
        return
    celsius = value / 1e3 if abs(value) >= 200 else value
    if -40 < celsius < 150:
        numbered = [name, *(f"{name} {n}" for n in range(2, 64))]
        found[next(n for n in numbered if n not in found)] = celsius
