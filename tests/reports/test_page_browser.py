"""The page of a real model's bundle in headless Chromium, opened from the file system: desk and phone, light, dark and print."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.apps import TOOLS, make_bundle
from helpers.cli_runner import edgewright, passed

pytestmark = [pytest.mark.slow, pytest.mark.exports]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MODULES = TOOLS / "web"
SCRIPT = Path(__file__).parent / "browser.mjs"
WHITE = "rgb(255, 255, 255)"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of the T5Gemma example's bundle: measured with predictions, and compared with itself."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    folder = tmp_path_factory.mktemp("report")
    bundle = make_bundle("t5gemma-g2p", folder, folder)
    passed(edgewright("verify", bundle))
    passed(edgewright("profile", bundle, "-p", 16, "-n", 8, "-d", "0,16", "-r", 2, "-t", 1, "-o", folder / "own.html"))
    devices = ("--device", "samsung-galaxy-s25", "--device", "jetson-orin-nano", "--device", "iphone-17-pro")
    passed(edgewright("profile", bundle, *devices, "-p", 16, "-n", 8, "-o", folder / "devices.html"))
    passed(edgewright("compare", bundle, bundle, "-o", folder / "compare.html"))
    return {name: folder / f"{name}.html" for name in ("own", "devices", "compare")}


@pytest.mark.parametrize("name", ["compare", "devices", "own"])
def test_chromium_alone_opens_it_without_a_word(reports: dict[str, Path], name: str) -> None:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom", reports[name].as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    assert 'id="kinds"' in done.stdout
    assert '<button type="button" id="theme">' in done.stdout  # the script ran: it shows the button


@pytest.mark.parametrize("name", ["compare", "devices", "own"])
def test_it_looks_right_on_every_screen(reports: dict[str, Path], tmp_path: Path, name: str) -> None:
    if shutil.which("node") is None or not (MODULES / "node_modules" / "playwright-core").is_dir():
        pytest.skip("no playwright-core here: make apps-tools")
    command = ["node", str(SCRIPT), str(MODULES), str(CHROMIUM), str(reports[name]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["said"] == []
    assert {url.partition(":")[0] for url in found["asked"]} <= {"file", "data"}
    wanted = [
        "about",
        "quality",
        "bytes",
        "roofline",
        "layers",
        "context",
        "placement",
        "devices",
        "simulated",
        "kinds",
    ]
    if name == "compare":
        wanted = ["sides", "frontier", "bytes", "speed", "placement", "kinds"]
    for screen, look in found["looks"].items():
        assert look["sections"] == wanted, screen
        assert look["overflow"] <= 0, screen
        assert look["outside"] == 0, screen
        assert look["squeezed"] == 0, screen
        assert look["tip"], screen
        assert look["turned"] != look["background"], screen
    assert found["looks"]["desk light"]["background"] != found["looks"]["desk dark"]["background"]
    assert found["looks"]["desk dark"]["printed"] == WHITE
    assert found["looks"]["desk dark"]["pdf"] > 10_000
    assert found["looks"]["phone light"]["dots"] >= {"compare": 2, "devices": 20, "own": 5}[name]
