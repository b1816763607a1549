"""`profile --device adb://…`: the real adb client and server, a device end of ours whose shell is this machine's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.cli_runner import edgewright, passed, refused
from helpers.fake_adbd import FakeAdbd

from edgewright.commands.profile import ProfileLengths
from edgewright.commands.profile_devices import profile_devices
from edgewright.errors import UserError
from edgewright.measuring import device as device_module
from edgewright.measuring import links
from edgewright.measuring import measure as measure_module
from edgewright.measuring.measure import Settings

pytestmark = pytest.mark.exports

LENGTHS = ProfileLengths(prompts=(8, 16, 24), new=12, depths=(0,), repeats=30)
ROWS = ["pp8", "pp16", "pp24", "tg12", "answer"]
THERMAL = """IsStatusOverride: false
ThermalEventListeners:
Thermal Status: 0
Cached temperatures:
Temperature{mValue=99.0, mType=0, mName=CPU9, mStatus=0}
HAL Ready: true
Current temperatures from HAL:
Temperature{mValue=41.5, mType=0, mName=CPU0, mStatus=0}
Temperature{mValue=36.2, mType=3, mName=SKIN, mStatus=0}
Current cooling devices from HAL:
CoolingDevice{mValue=0, mType=2, mName=cpu0}"""
BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: true
  Charge counter: 2710000
  voltage: 4100"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A server of the real adb on a port of its own, with a home of its own."""
    if shutil.which("adb") is None:
        pytest.skip("no adb here: apt-get install adb")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    own = {"ANDROID_ADB_SERVER_PORT": port, "HOME": str(tmp_path_factory.mktemp("home")), "ADB_MDNS": "0"}
    before = {key: os.environ.get(key) for key in own}
    os.environ.update(own)
    try:
        # the server would keep a pipe open
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        if subprocess.run(["adb", "start-server"], **quiet, timeout=60, check=False).returncode:
            pytest.skip("adb starts no server here")
        yield
    finally:
        subprocess.run(["adb", "kill-server"], capture_output=True, check=False)
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


@pytest.fixture
def phone(server: None, tmp_path: Path) -> Iterator[FakeAdbd]:
    device = FakeAdbd(tmp_path / "phone")
    device.program(
        "getprop", 'case "$1" in ro.product.model) echo Paper Phone;; ro.build.version.release) echo 16;; esac'
    )
    device.program(
        "dumpsys", f'case "$1" in thermalservice) cat <<E\n{THERMAL}\nE\n;; battery) cat <<E\n{BATTERY}\nE\n;; esac'
    )
    device.program("python3", f'exec {sys.executable} "$@"')
    connect(device)
    yield device
    subprocess.run(["adb", "disconnect", device.serial], capture_output=True, check=False)
    device.close()


def connect(device: FakeAdbd) -> None:
    done = subprocess.run(["adb", "connect", device.serial], capture_output=True, text=True, timeout=60, check=False)
    assert "connected to" in done.stdout, done.stdout + done.stderr


def settings() -> Settings:
    return Settings(threads=1, cool_within=5.0)


def test_every_row_comes_back(bundle: Path, phone: FakeAdbd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_PART", 100_000)  # so that a file goes in several pieces
    notes: list[str] = []
    (result,) = profile_devices(bundle, [phone.url], LENGTHS, settings(), notes.append)
    assert [row.test for row in result.rows] == ROWS
    assert result.rows[-1].answer == result.answer_here
    assert result.about.board == "Paper Phone"
    assert result.about.system.startswith("Android 16, ")
    assert result.about.android
    for row in result.rows[:-1]:
        assert (row.figure, row.n) == ("measured", 30)
        assert row.cool == {"cool": True, "waited_s": 0.0, "limit_celsius": 50.0}
        assert row.before is not None
        assert row.after is not None
        assert row.before.throttling == row.after.throttling == "Android thermal status 0"
        assert row.before.celsius == {"CPU0": 41.5, "SKIN": 36.2}
        assert row.energy == "not measured"  # it is on a cable
    # the runner sets what cures onnxruntime#33196, and says so
    ((setting, why),) = result.settings.items()
    assert setting == "ORT_GQA_DISABLE_FLASH_ATTENTION=1"
    assert "33196" in why
    assert any(setting in n and "33196" in n for n in notes)
    assert any(service.startswith("shell,v2") for service in phone.services)
    assert any(service.startswith("sync:") for service in phone.services)
    stored = phone.stored
    sent = {p.relative_to(q).as_posix() for q in stored.glob("bundles/*") for p in q.rglob("*") if p.is_file()}
    assert sent == {"manifest.json", "onnx/decoder.onnx", "onnx/weights.bin"}
    for name in sent:
        (copy,) = stored.glob(f"bundles/*/{name}")
        assert copy.read_bytes() == (bundle / name).read_bytes()


def test_a_killed_runner_and_a_lost_device_lose_nothing(
    bundle: Path, phone: FakeAdbd, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (device_module, measure_module):
        monkeypatch.setattr(module, "WAITS", (0.1, 0.2, 0.5, 1.0, 2.0))
    notes: list[str] = []
    seen: list[list[str]] = []
    stored = phone.stored

    def note(text: str) -> None:
        first = text not in notes
        notes.append(text)
        if text.startswith("pp8:") and first:
            (lock,) = stored.glob("rows-*.jsonl.lock")
            os.kill(int(lock.read_text()), signal.SIGKILL)
        if text.startswith("pp16:") and first:
            phone.cut()
            subprocess.run(["adb", "disconnect", phone.serial], capture_output=True, check=False)
            connect(phone)
        if text == "answer":
            (file,) = stored.glob("rows-*.jsonl")
            records = [json.loads(line) for line in file.read_text().splitlines()]
            seen.append([r["test"] for r in records if r["record"] == "row"])

    (result,) = profile_devices(bundle, [phone.url], replace(LENGTHS, repeats=200), settings(), note)
    assert [row.test for row in result.rows] == ROWS
    assert seen == [ROWS]
    assert any("was killed" in n for n in notes)
    assert any("the link broke" in n for n in notes), notes


def test_a_phone_without_python(bundle: Path, phone: FakeAdbd) -> None:
    (phone.folder / "bin" / "python3").unlink()
    phone.program("python3", "echo not found >&2; exit 127")
    line = refused(edgewright("profile", bundle, "--device", phone.url))
    assert "no python3 there; Android has none" in line
    assert "ssh://phone:8022" in line
    said = passed(edgewright("doctor", "--device", phone.url))
    assert "it says     Paper Phone" in said
    assert "missing     python: no python3 there" in said


def test_doctor_of_a_phone(phone: FakeAdbd) -> None:
    said = passed(edgewright("doctor", "--device", phone.url))
    assert "Paper Phone" in said
    assert "heat        CPU0 42 °C, SKIN 36 °C; throttling: Android thermal status 0" in said
    assert f"ready       edgewright profile BUNDLE --device {phone.url}" in said


def test_a_phone_that_is_not_there(bundle: Path, server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "WAITS", (0.0,))
    with pytest.raises(UserError, match=r"the device does not answer .*not found"):
        list(profile_devices(bundle, ["adb://no-such-phone"], LENGTHS, settings()))
