"""The runner under an arm64 Python without numpy and onnxruntime: wheels travel with it, its tokens are right, no time is told."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
from helpers.arm64 import arm64_python
from helpers.requests import asking

from edgewright.bundle import Bundle
from edgewright.commands.profile import ProfileLengths
from edgewright.commands.profile_devices import profile_devices
from edgewright.compiler import export
from edgewright.measuring.measure import Settings
from edgewright.reports.measured import measured_text

ROOT = Path(__file__).parent.parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.exports]


@pytest.mark.parametrize("name", ["deltanet-g2p", "t5gemma-g2p"])
def test_the_runner_on_another_machine(name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    if platform.machine() == "aarch64":
        pytest.skip("this machine is one")
    python = arm64_python(tmp_path_factory.getbasetemp() / "arm64")
    request = asking(str(ROOT / "examples" / name), bits=4.5, importance="zd", max_context=320, verify=False)
    path = export(request, tmp_path / "bundle").path
    device = Path(os.environ.get("EDGEWRIGHT_ARM64", tmp_path_factory.getbasetemp() / "arm64")) / "device"
    notes: list[str] = []
    lengths = ProfileLengths(prompts=(8,), new=4, repeats=1)
    settings = Settings(threads=1, python=str(python), cool_within=0.0)
    (result,) = profile_devices(path, [f"local://{device}"], lengths, settings, notes.append)
    about = result.about
    assert (about.machine, about.emulated, about.python_tag) == ("aarch64", True, "cp311")
    assert about.onnxruntime is not None
    assert (device / "site-cp311-1.30.0").exists() or list(device.glob("site-cp311-*"))
    for row in result.rows:
        assert row.figure == "emulated"
        assert row.rate is row.median is row.rates is row.deviation is row.energy is None
    assert result.load_s is result.load_again_s is None
    assert result.rows[-1].answer == result.answer_here
    assert len(result.rows[-1].answer or ()) > 2
    printed = measured_text([result], "md")
    assert "no time is told" in printed
    assert "emulated" in printed
    assert any("an emulator runs the device's programs" in n for n in notes)
    assert Bundle.open(path).manifest.prompts
