"""Budgets of time, energy and memory on devices that were not measured: the prediction meets them, or they are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import tiny

from edgewright.checkpoints.opening import read_config
from edgewright.cli import main
from edgewright.models.registry import build
from edgewright.quant.plan import BitPlan
from edgewright.quant.prediction import memory_bytes
from edgewright.quant.units import quantizable_units


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tiny_t5gemma(tmp_path_factory.mktemp("budgets") / "model")


def planned(model: Path, out: Path, *arguments: str) -> Any:
    common = ["--format", "onnx", "--importance", "uniform", "--calibration", "none", "-o", str(out)]
    return CliRunner().invoke(main, ["plan", "-m", str(model), *common, *arguments])


def ends(message: str) -> tuple[float, float]:
    """The milliseconds that a refusal says can be reached."""
    found = re.search(r"reach from ([\d.]+) ms to ([\d.]+) ms", " ".join(message.split()))
    assert found is not None, message
    return float(found[1]), float(found[2])


@pytest.mark.parametrize("sure", [(), ("--sure",)])
def test_a_time_is_met_by_the_prediction(sure: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    device = ("--device", "pixel-9", *sure)
    refused = planned(model, tmp_path / "p.json", "--latency", "0.0001ms", *device)
    assert refused.exit_code == 2
    low, high = ends(refused.output)
    assert not (tmp_path / "p.json").exists()
    for share in (0.0, 0.4, 1.0):
        asked = low + share * (high - low)
        result = planned(model, tmp_path / "p.json", "--latency", f"{asked:.9f}ms", *device)
        assert result.exit_code == 0, result.output
        said = re.search(r"predicted decode step on pixel-9: ([\d.]+) ms", result.output)
        assert said is not None
        assert float(said[1]) <= asked + 5e-4  # it is shown with three decimals
        assert "stand in for ONNX Runtime's" in " ".join(result.output.split())


def test_to_be_sure_costs_bits(model: Path, tmp_path: Path) -> None:
    """The time that takes most bits at the middle of the interval is below the floor at its slow end."""
    _, high = ends(planned(model, tmp_path / "p", "--latency", "0.0001ms", "--device", "pixel-9").output)
    assert planned(model, tmp_path / "p", "--latency", f"{high}ms", "--device", "pixel-9").exit_code == 0
    sure = planned(model, tmp_path / "q", "--latency", f"{high}ms", "--device", "pixel-9", "--sure")
    assert sure.exit_code == 2
    assert ends(sure.output)[0] > high


def test_an_energy_is_a_time_at_a_power(model: Path, tmp_path: Path) -> None:
    refused = planned(model, tmp_path / "p", "--energy", "1e-9", "--device", "raspberry-pi-5")
    low, _ = ends(refused.output)
    result = planned(model, tmp_path / "p", "--energy", f"{low * 1.02 * 11.9 / 1e3:.9f}", "--device", "raspberry-pi-5")
    assert result.exit_code == 0, result.output
    said = re.search(r"on raspberry-pi-5: ([\d.]+) ms", result.output)
    assert said is not None
    assert float(said[1]) * 11.9 / 1e3 <= low * 1.02 * 11.9 / 1e3 + 1e-5


def test_a_memory_holds_weights_and_states(model: Path, tmp_path: Path) -> None:
    built = build(read_config(str(model)))
    units = quantizable_units(built)
    bits = []
    for most in (205_000, 220_000, 10**9):
        result = planned(model, tmp_path / "p.json", "--memory", str(most))
        assert result.exit_code == 0, result.output
        plan = BitPlan.from_json((tmp_path / "p.json").read_text())
        taken = memory_bytes(built, units, plan, ["onnx"], built.max_context, 4)["onnx"]
        assert taken <= most
        assert most == 10**9 or taken > 0.93 * most
        bits.append(plan.average_bits)
    assert bits == sorted(set(bits))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--energy", "0.01", "--device", "pixel-9"), "the power of pixel-9 is not known"),
        (("--energy", "0.01"), "--energy is an energy on a device, --device says which"),
        (("--energy", "0", "--device", "pixel-9"), "--energy 0: give joules above 0"),
        (("--sure",), "--sure is of a prediction"),
        (("--memory", "10k"), "10000 bytes of memory at a context of"),
        (("--memory", "1m", "--bits", "4"), "--bits and --memory are budgets, and there is one"),
        (("--latency", "1ms", "--device", "rtx-4090"), "rtx-4090 is not known to run onnx"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: tuple[str, ...], line: str, model: Path, tmp_path: Path) -> None:
    result = planned(model, tmp_path / "p.json", *arguments)
    assert result.exit_code == 2
    assert line in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


def test_a_plan_remembers_its_device(model: Path, tmp_path: Path) -> None:
    low, high = ends(planned(model, tmp_path / "p", "--latency", "0.0001ms", "--device", "pixel-9").output)
    result = planned(model, tmp_path / "p.json", "--latency", f"{(low + high) / 2:.6f}ms", "--device", "pixel-9")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "p.json").read_text())["budget"]["device"] == "pixel-9"
