"""What is read of a device, from folders laid out as Linux does; what is not there is not measured, never guessed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from edgewright.measuring.on_device import about as about_module
from edgewright.measuring.on_device import sensors
from edgewright.measuring.on_device.about import about, emulated, flash_is_broken
from edgewright.measuring.on_device.rows import Cool
from edgewright.measuring.on_device.sensors import NOT_MEASURED, Meter, Source


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


POLICY = "sys/devices/system/cpu/cpufreq/policy"
RAPL = "sys/class/powercap/intel-rapl:0"


def test_nothing_there_is_not_measured(tmp_path: Path) -> None:
    assert sensors.clocks(tmp_path) == NOT_MEASURED
    assert sensors.temperatures(tmp_path) == NOT_MEASURED
    assert sensors.throttling(tmp_path) == NOT_MEASURED
    assert sensors.memory(tmp_path) == NOT_MEASURED
    assert sensors.hottest(tmp_path) is None
    assert Meter([]).result(1.0) == NOT_MEASURED
    assert about(tmp_path, tmp_path)["memory_bytes"] is None


def test_clocks_by_cluster(tmp_path: Path) -> None:
    files = {}
    for first, cores, now, most in ((0, "0 1 2 3", 614400, 2265600), (10, "10", 3300000, 3300000), (4, "4 5", 1, 2)):
        files |= {
            f"{POLICY}{first}/related_cpus": cores,
            f"{POLICY}{first}/scaling_cur_freq": str(now),
            f"{POLICY}{first}/cpuinfo_max_freq": str(most),
            f"{POLICY}{first}/scaling_governor": "walt",
        }
    found = sensors.clocks(lay(tmp_path, files))
    assert [c["cores"] for c in found if isinstance(c, dict)] == ["0 1 2 3", "4 5", "10"]
    assert found[0] == {"cores": "0 1 2 3", "mhz": 614.4, "most_mhz": 2265.6, "governor": "walt"}


def test_the_fastest_cores() -> None:
    clusters = [
        {"cores": "0 1 2 3", "most_mhz": 1800.0},
        {"cores": "4 5 6", "most_mhz": 2400.0},
        {"cores": "7", "most_mhz": 2900.0},
    ]
    assert sensors.fastest_cores(clusters, 2) == {7, 4}
    assert sensors.fastest_cores(clusters, 4) == {7, 4, 5, 6}
    assert (
        sensors.fastest_cores(clusters, 0)
        == sensors.fastest_cores(clusters, 8)
        == sensors.fastest_cores(NOT_MEASURED, 2)
        == set()
    )
    assert sensors.fastest_cores([clusters[0], clusters[0]], 2) == set()


def test_temperatures_in_thousandths_or_degrees(tmp_path: Path) -> None:
    zones = {
        "0": ("cpu-thermal", "48312"),
        "1": ("tsens", "41"),
        "2": ("gone", "-274000"),
        "10": ("cpu-thermal", "47000"),
    }
    files = {
        f"sys/class/thermal/thermal_zone{n}/{name}": v
        for n, pair in zones.items()
        for name, v in zip(("type", "temp"), pair)
    }
    assert sensors.temperatures(lay(tmp_path, files)) == {"cpu-thermal": 48.312, "tsens": 41.0, "cpu-thermal 2": 47.0}
    assert sensors.hottest(tmp_path) == 48.312


def test_monitors_where_there_are_no_zones(tmp_path: Path) -> None:
    files = {"name": "k10temp", "temp1_input": "55000", "temp1_label": "Tctl", "temp3_input": "50000"}
    lay(tmp_path, {f"sys/class/hwmon/hwmon0/{name}": text for name, text in files.items()})
    assert sensors.temperatures(tmp_path) == {"k10temp Tctl": 55.0, "k10temp temp3": 50.0}


def test_memory_of_the_process(tmp_path: Path) -> None:
    lay(tmp_path, {"proc/self/status": "Name:\tpython\nVmHWM:\t  2048 kB\nRssAnon:\t    1024 kB"})
    assert sensors.memory(tmp_path) == {"peak_resident": 2 << 20, "anonymous": 1 << 20}


def found(root: Path) -> dict[str, Source]:
    return {source.name: source for source in sensors.sources(root)}


def test_a_counter_is_read_at_both_ends_and_wraps(tmp_path: Path) -> None:
    lay(
        tmp_path, {f"{RAPL}/name": "package-0", f"{RAPL}/energy_uj": "900000", f"{RAPL}/max_energy_range_uj": "1000000"}
    )
    lay(
        tmp_path, {"sys/class/powercap/intel-rapl:0:0/name": "core", "sys/class/powercap/intel-rapl:0:0/energy_uj": "1"}
    )
    sources = found(tmp_path)
    assert list(sources) == ["RAPL package-0"]  # its parts are in it
    meter = Meter(list(sources.values()))
    for before, after in ((900_000, 950_000), (950_000, 50_000)):
        (tmp_path / RAPL / "energy_uj").write_text(str(before))
        with meter:
            (tmp_path / RAPL / "energy_uj").write_text(str(after))
    meter.seconds = 2.0
    (entry,) = meter.result(10.0)
    assert entry == {
        "source": "RAPL package-0",
        "boundary": "package",
        "joules": pytest.approx(0.15),
        "joules_a_unit": pytest.approx(0.015),
        "watts": pytest.approx(0.075),
    }


def test_too_short_a_time_is_said(tmp_path: Path) -> None:
    lay(tmp_path, {f"{RAPL}/name": "package-0", f"{RAPL}/energy_uj": "5", f"{RAPL}/max_energy_range_uj": "9"})
    meter = Meter(list(found(tmp_path).values()))
    with meter:
        pass
    (entry,) = meter.result(1.0)
    assert entry["joules"].startswith("not measured: 0.0 s are too short")


def test_a_counter_that_vanishes_is_not_measured(tmp_path: Path) -> None:
    lay(tmp_path, {f"{RAPL}/name": "package-0", f"{RAPL}/energy_uj": "5"})
    meter = Meter(list(found(tmp_path).values()))
    with meter:
        (tmp_path / RAPL / "energy_uj").unlink()
    (entry,) = meter.result(1.0)
    assert entry["joules"] == "not measured: it could not be read all the time"


def test_rails_of_a_jetson(tmp_path: Path) -> None:
    chip = {"name": "ina3221", "in1_label": "VDD_IN", "in1_input": "5000", "curr1_input": "1200"}
    chip |= {"in7_label": "Sum of shunt voltages", "in7_input": "1", "curr7_input": "1", "curr3_input": "9"}
    lay(tmp_path, {f"sys/class/hwmon/hwmon1/{name}": text for name, text in chip.items()})
    sources = found(tmp_path)
    assert list(sources) == ["ina3221 VDD_IN"]
    assert sources["ina3221 VDD_IN"].boundary == "rail"
    assert sources["ina3221 VDD_IN"].read() == pytest.approx(6.0)
    meter = Meter(list(sources.values()))
    with meter:
        time.sleep(0.15)
    meter.seconds = 4.0
    (entry,) = meter.result(8.0)
    assert entry["joules"] == pytest.approx(24.0)
    assert entry["joules_a_unit"] == pytest.approx(3.0)


@pytest.mark.parametrize(("status", "names"), [("Discharging", ["battery BAT0"]), ("Charging", []), ("Full", [])])
def test_a_battery_tells_only_while_it_discharges(tmp_path: Path, status: str, names: list[str]) -> None:
    battery = {"type": "Battery", "status": status, "current_now": "-1500000", "voltage_now": "4000000"}
    lay(tmp_path, {f"sys/class/power_supply/BAT0/{name}": text for name, text in battery.items()})
    sources = found(tmp_path)
    assert list(sources) == names
    for source in sources.values():
        assert source.read() == pytest.approx(6.0)
        assert (source.boundary, source.least) == ("device", 10.0)


def test_android_battery_counts_charge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "dumpsys"
    program.write_text(
        "#!/bin/sh\necho '  USB powered: false'; echo '  Charge counter: 2000000'; echo '  voltage: 4000'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    source = found(tmp_path)["Android battery"]
    assert source.read() == pytest.approx(-2.0 * 3600 * 4.0)
    assert (source.boundary, source.grows, source.least) == ("device", True, 60.0)


def test_a_raspberry_pi_tells_its_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "vcgencmd"
    program.write_text("#!/bin/sh\necho throttled=0x50005\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert sensors.throttling() == "Raspberry Pi throttled=0x50005"


def test_it_waits_until_the_device_is_cool(monkeypatch: pytest.MonkeyPatch) -> None:
    heat = iter([60.0, 71.0, 68.0, 64.0])
    monkeypatch.setattr(sensors, "hottest", lambda: next(heat))
    monkeypatch.setattr(sensors, "throttling", lambda: NOT_MEASURED)
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    cool = Cool(300.0)
    assert cool.limit == 65.0
    assert cool.wait()["cool"] is True
    assert len(waits) == 2


def test_a_device_that_stays_hot_is_measured_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    heat = iter([30.0, 90.0])
    monkeypatch.setattr(sensors, "hottest", lambda: next(heat))
    monkeypatch.setattr(sensors, "throttling", lambda: NOT_MEASURED)
    cool = Cool(0.0)
    assert cool.limit == 50.0
    assert cool.wait()["cool"] is False


def test_a_run_that_goes_on_waits_for_the_coolness_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors, "hottest", lambda: 80.0)
    assert Cool(300.0, [{"cool": {"limit_celsius": 52.0}}, {"test": "answer"}]).limit == 52.0


def test_androids_status_counts_more_than_a_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    status = iter(["Android thermal status 2", "Android thermal status 0"])
    monkeypatch.setattr(sensors, "hottest", lambda: 20.0)
    monkeypatch.setattr(sensors, "throttling", lambda: next(status))
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    assert Cool(300.0).wait()["cool"] is True
    assert len(waits) == 1


def test_no_temperature_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors, "hottest", lambda: None)
    monkeypatch.setattr(sensors, "throttling", lambda: NOT_MEASURED)
    assert Cool(300.0).wait() == {"cool": NOT_MEASURED, "waited_s": 0.0, "limit_celsius": None}


def test_an_emulator_is_known_by_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, {"proc/sys/kernel/arch": "x86_64"})
    for machine, expected in (("aarch64", True), ("armv7l", True), ("x86_64", False), ("i686", False)):
        monkeypatch.setattr(about_module.platform, "machine", lambda machine=machine: machine)
        assert emulated(tmp_path) is expected
    lay(tmp_path, {"proc/sys/kernel/arch": "aarch64"})
    monkeypatch.setattr(about_module.platform, "machine", lambda: "armv8l")
    assert not emulated(tmp_path)


@pytest.mark.parametrize(
    ("told", "kernel", "version", "broken"),
    [(2 << 20, "", "1.24.1", False), (0, "", "1.32.0", True), (0, "2", "1.32.0", False), (0, "2", "1.29.0", True)],
)
def test_who_needs_the_plain_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: int, kernel: str, version: str, broken: bool
) -> None:
    """The runtime sizes tiles by what the C library tells, from 1.30 on by what the kernel tells."""
    monkeypatch.setattr(about_module.os, "sysconf", lambda _: told)
    monkeypatch.setattr(about_module.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.delenv("ANDROID_ROOT", raising=False)
    if kernel:
        lay(tmp_path, {"sys/devices/system/cpu/cpu0/cache/index2/level": kernel})
    assert bool(flash_is_broken(version, tmp_path)) is broken
    monkeypatch.setenv("ANDROID_ROOT", "/system")
    assert "33196" in flash_is_broken(version, tmp_path)


def test_this_machine_tells_of_itself(tmp_path: Path) -> None:
    told = about(tmp_path)
    assert told["python"] == sys.version.split()[0]
    assert told["onnxruntime"]
    assert told["problems"] == {}
    assert 0 < told["memory_free_bytes"] <= told["memory_bytes"]
    assert told["disk_free_bytes"] > 0
    assert not told["emulated"]
