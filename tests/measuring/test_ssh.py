"""`profile --device ssh://…` against a real sshd: whole, killed, cut, interrupted; no finished row is lost or there twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.cli_runner import edgewright, passed, refused
from helpers.loopback_sshd import Sshd

from edgewright.commands.profile import ProfileLengths
from edgewright.commands.profile_devices import profile_devices
from edgewright.errors import UserError
from edgewright.measuring import device as device_module
from edgewright.measuring import measure as measure_module
from edgewright.measuring.measure import DeviceResult, Settings

pytestmark = pytest.mark.exports

LENGTHS = ProfileLengths(prompts=(8, 16, 24), new=12, depths=(0, 16), repeats=60)
ROWS = ["pp8", "pp16", "pp24", "tg12", "tg12 @ d16", "answer"]
SETTINGS = Settings(threads=1, python=sys.executable, cool_within=0.0)


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    server = Sshd(tmp_path_factory.mktemp("sshd"))
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{server.programs}{os.pathsep}{before}"
    try:
        yield server
    finally:
        os.environ["PATH"] = before
        server.close()


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (device_module, measure_module):
        monkeypatch.setattr(module, "WAITS", (0.1, 0.1, 0.2, 0.5, 1.0))


def journal(device: Path, kind: str = "row") -> list[dict[str, Any]]:
    """The rows in the device's journal, or its records of another kind."""
    (file,) = device.glob("rows-*.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [record for record in records if record["record"] == kind]


def runner_of(device: Path) -> int:
    (lock,) = device.glob("rows-*.jsonl.lock")
    return int(lock.read_text())


def watched(
    bundle: Path, url: str, device: Path, at: str = "", act: Callable[[], None] = lambda: None, runners: int = 1
) -> tuple[DeviceResult, list[str]]:
    """Profile, and `act` when the row `at` has come back; checks the device's journal before it is removed.

    runners: how many processes measured, one after the other.
    """
    notes: list[str] = []
    seen: list[list[str]] = []
    loads: list[int] = []

    def note(text: str) -> None:
        notes.append(text)
        if text.startswith(f"{at}:") and not any(n.startswith(f"{at}:") for n in notes[:-1]):
            act()
        if text == "answer":  # the last row
            seen.append([row["test"] for row in journal(device)])
            loads.append(len(journal(device, "loaded")))

    (result,) = profile_devices(bundle, [url], LENGTHS, SETTINGS, note)
    assert seen == [ROWS]
    assert loads == [runners]
    assert list(device.glob("rows-*")) == []
    assert list((bundle / "reports").glob("rows-*")) == []
    return result, notes


def complete(result: DeviceResult) -> None:
    assert [row.test for row in result.rows] == ROWS
    assert result.not_measured == {}
    for row in result.rows[:-1]:
        assert (row.figure, row.n, row.unit) == ("measured", 60, "tokens")
        assert row.rates is not None
        assert row.rate == pytest.approx(sum(row.rates) / 60)
        assert row.median is not None
        assert min(row.rates) <= row.median <= max(row.rates)
    assert result.rows[-1].answer == result.answer_here
    assert result.about.onnxruntime
    assert result.load_again_s


def test_every_row_comes_back(bundle: Path, sshd: Sshd, tmp_path: Path) -> None:
    device = tmp_path / "device"
    result, notes = watched(bundle, sshd.url(device), device)
    complete(result)
    assert any(n.startswith("sending weights.bin") for n in notes)
    _, again = watched(bundle, sshd.url(device), device)
    assert not any(n.startswith("sending") for n in again)


def test_a_killed_runner_goes_on(bundle: Path, sshd: Sshd, tmp_path: Path) -> None:
    device = tmp_path / "device"
    result, notes = watched(
        bundle, sshd.url(device), device, "pp16", lambda: os.kill(runner_of(device), signal.SIGKILL), runners=2
    )
    complete(result)
    assert sum("was killed; is there memory enough?" in n for n in notes) == 1


@pytest.mark.slow
def test_a_cut_link_loses_nothing_and_the_runner_goes_on(bundle: Path, sshd: Sshd, tmp_path: Path) -> None:
    device = tmp_path / "device"
    result, notes = watched(bundle, sshd.url(device), device, "pp16", sshd.cut)
    complete(result)
    assert sum("the link broke" in n for n in notes) == 1


@pytest.mark.slow
def test_a_server_that_is_away_for_a_while(bundle: Path, sshd: Sshd, tmp_path: Path) -> None:
    """The link is cut and nobody answers; the runner is killed meanwhile, too."""
    device = tmp_path / "device"

    def away() -> None:
        pid = runner_of(device)
        sshd.stop()
        os.kill(pid, signal.SIGKILL)

    def back(_: float) -> None:
        if sshd._process.poll() is not None:
            sshd.start_again()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", back)
        result, notes = watched(bundle, sshd.url(device), device, "pp8", away, runners=2)
    complete(result)
    assert any("the link broke" in n for n in notes)


@pytest.mark.slow
def test_a_device_that_stays_away_keeps_the_rows(bundle: Path, sshd: Sshd, tmp_path: Path) -> None:
    device = tmp_path / "device"
    long = replace(LENGTHS, repeats=300)
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        if text.startswith("pp16:"):
            os.kill(runner_of(device), signal.SIGKILL)
            sshd.stop()

    with pytest.raises(UserError, match="does not answer"):
        list(profile_devices(bundle, [sshd.url(device)], long, SETTINGS, note))
    kept = {row["test"]: row for row in journal(device)}
    assert {"pp8", "pp16"} <= kept.keys()
    shutil.rmtree(device)  # the device forgets everything
    sshd.start_again()
    (whole,) = profile_devices(bundle, [sshd.url(device)], long, SETTINGS, notes.append)
    assert [row.test for row in whole.rows] == ROWS
    assert any("going on with a run that ended early" in n for n in notes)
    assert whole.rows[0].at == kept["pp8"]["at"]
    assert whole.rows[1].at == kept["pp16"]["at"]


def start(bundle: Path, url: str) -> subprocess.Popen[str]:
    words = ["profile", str(bundle), "--device", url, "-p", "8,16,24", "-n", "12", "-d", "0,16", "-r", "60", "-t", "1"]
    words += ["--cool-within", "0", "--device-python", sys.executable, "-o", "json"]
    command = [sys.executable, "-m", "edgewright.cli", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"it ended without '{text}'")


@pytest.mark.slow
def test_a_killed_command_goes_on(bundle: Path, sshd: Sshd, tmp_path: Path) -> None:
    """SIGKILL for the command here; the runner there goes on, and the next command takes its rows."""
    device = tmp_path / "device"
    process = start(bundle, sshd.url(device))
    until(process, "pp16: ")
    process.kill()
    process.communicate()
    kept = {row["test"]: row["at"] for row in journal(device)}
    assert {"pp8", "pp16"} <= kept.keys()
    second = start(bundle, sshd.url(device))
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert "going on with a run that ended early" in err
    (result,) = [DeviceResult.model_validate(r) for r in json.loads(out)]
    complete(result)
    assert {row.test: row.at for row in result.rows if row.test in kept} == kept
    assert json.loads((bundle / "reports" / "devices.json").read_text())["devices"] == json.loads(out)


@pytest.mark.slow
def test_an_interrupted_command_stops_the_runner(bundle: Path, sshd: Sshd, tmp_path: Path) -> None:
    device = tmp_path / "device"
    process = start(bundle, sshd.url(device))
    until(process, "pp8: ")
    pid = runner_of(device)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_no_resume_measures_everything_again(bundle: Path, sshd: Sshd, tmp_path: Path) -> None:
    device = tmp_path / "device"
    process = start(bundle, sshd.url(device))
    until(process, "pp16: ")
    process.kill()
    process.communicate()
    old = {row["at"] for row in journal(device)}
    fresh = replace(SETTINGS, resume=False)
    (result,) = profile_devices(bundle, [sshd.url(device)], LENGTHS, fresh)
    complete(result)
    assert not old & {row.at for row in result.rows}


@pytest.mark.slow
def test_a_device_that_fails_takes_no_other_with_it(bundle: Path, sshd: Sshd, tmp_path: Path) -> None:
    good, bad = sshd.url(tmp_path / "device"), f"local://{tmp_path}/other"
    words = [
        "profile",
        bundle,
        "--device",
        good,
        "--device",
        bad,
        "-p",
        "8",
        "-n",
        "0",
        "-r",
        "1",
        "--cool-within",
        "0",
    ]
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *{tmp_path}/other*) exit 9;; esac\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    result = edgewright(*words, "--device-python", wrapper)
    assert result.exit_code == 2
    assert f"| {good} | onnxruntime" in " ".join(result.stdout.split())
    assert f"error: {bad}: the runner ended with status 9" in result.stderr


def test_doctor_says_what_the_device_has(sshd: Sshd, tmp_path: Path) -> None:
    said = passed(edgewright("doctor", "--device", sshd.url(tmp_path / "d"), "--device-python", sys.executable))
    assert f"python      {sys.version.split()[0]}, onnxruntime 1." in said
    assert "ready       edgewright profile BUNDLE --device ssh://" in said
    told = json.loads(
        passed(edgewright("doctor", "--device", sshd.url(tmp_path / "d"), "--device-python", "/no/python", "--json"))
    )
    assert "no /no/python there; install Python" in told["missing"]["python"]
    assert told["shell"][0].startswith("Linux ")


def test_a_server_that_lets_nobody_in(bundle: Path, sshd: Sshd, tmp_path: Path) -> None:
    url = sshd.url(tmp_path / "device").replace("://", "://nobody_of_this_name_", 1)
    line = refused(edgewright("profile", bundle, "--device", url))
    assert "Permission denied" in line
    assert "logs in without a question" in line
