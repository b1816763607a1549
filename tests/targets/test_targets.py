"""The table of targets: what `all` stands for, what a missing library costs, and what one plan for several targets costs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from helpers.requests import asking
from helpers.tiny import write_tiny_llama

from edgewright import compiler
from edgewright.bundle import write_manifest
from edgewright.errors import UserError, VerificationFailure
from edgewright.exporters.artefact import Options
from edgewright.pipeline.lower import lower, lower_apart
from edgewright.quant.allocator import expected_loss
from edgewright.runtimes.session import Placement, place
from edgewright.targets import target as target_module
from edgewright.targets.registry import NAMES, TARGETS, choose, require
from edgewright.targets.storage import common_bits, native_bits, stored_bytes
from edgewright.verification.checking import VerifyOptions, verify_here
from edgewright.verification.report import Agreement, Report, TargetReport, require_placement

pytestmark = pytest.mark.exports


NAMED = tuple(name for name, target in TARGETS.items() if not target.graphs)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`without("coremltools")`: from now on that module cannot be found."""
    hidden: set[str] = set()
    real = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        return None if name in hidden else real(name, package)

    monkeypatch.setattr(target_module.importlib.util, "find_spec", find)
    return lambda *names: hidden.update(names)


def test_every_target_is_complete() -> None:
    assert tuple(TARGETS) == NAMES
    for name, target in TARGETS.items():
        assert target.install.startswith("pip install ")
        assert name == "onnx" or f"edgewright[{name}]" in target.install


def test_formats_are_kept_in_order_and_once() -> None:
    assert choose(()) == (("onnx",), [])
    assert choose(("qnn", "onnx", "qnn")) == (("qnn", "onnx"), [])


def test_all_leaves_out_what_is_not_installed_and_says_so(without: Any) -> None:
    without("coremltools", "tensorrt_rtx_bindings", "tensorrt")
    formats, left = choose(("all",))
    assert formats == tuple(n for n in NAMED if n not in ("coreml", "tensorrt") and TARGETS[n].installed)
    assert "coreml is left out: pip install 'edgewright[coreml]'" in left
    assert any(line.startswith("tensorrt is left out") for line in left)


def test_a_target_asked_for_by_name_is_never_left_out(without: Any) -> None:
    without("coremltools")
    formats, left = choose(("all", "coreml"))
    assert "coreml" in formats
    assert not any(line.startswith("coreml") for line in left)
    with pytest.raises(UserError, match=r"--format coreml needs coremltools.*pip install 'edgewright\[coreml\]'"):
        require("coreml")


def test_either_tensorrt_will_do(without: Any) -> None:
    without("tensorrt_rtx_bindings")
    assert TARGETS["tensorrt"].installed == (importlib.util.find_spec("tensorrt") is not None)


def test_an_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="--format tflite is not known; choose from onnx, executorch"):
        require("tflite")


# One plan for several targets


def test_a_plan_for_several_targets_uses_what_all_of_them_store_whole(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model")
    formats = ("onnx", "executorch", "coreml", "tensorrt", "qnn")
    planned = compiler.plan(asking(str(model), formats, bits=5.5))
    assert common_bits(formats) == (4, 8)
    assert {e.bits for e in planned.plan.entries.values()} <= {4, 8}
    assert set(planned.alone) == set(formats)
    for target, alone in planned.alone.items():
        assert alone.widths == native_bits(target)
        assert alone.loss_ratio >= 1 - 1e-9
    # Core ML alone has 3 and 6 bits besides: at this budget they are worth something.
    assert planned.alone["coreml"].loss_ratio > 1.05
    single = compiler.plan(asking(str(model), ("coreml",), bits=5.5))
    assert single.alone == {}
    ratio = expected_loss(planned.plan, planned.units) / expected_loss(single.plan, single.units)
    assert planned.alone["coreml"].loss_ratio == pytest.approx(ratio)
    for target in formats:
        entries = planned.plan.entries
        weights = [w for u in planned.units for w in u.weights]
        true = sum(stored_bytes(target, entries[w.name].bits, entries[w.name].group_size, *w.shape) for w in weights)
        assert planned.true_bytes(target) == true >= 0.99 * planned.plan.total_bytes


@pytest.mark.parametrize("data", [None, pytest.param("task.tsv", marks=pytest.mark.slow)])
def test_the_negative_scales_that_one_of_several_targets_forgoes_are_in_its_price(data: str | None) -> None:
    model = Path(__file__).parent.parent.parent / "examples" / "deltanet-g2p"
    request = asking(
        str(model), ("onnx", "executorch"), bits=4.5, widths=(4, 8), groups=(64,), task=data and model / data
    )
    price = {target: alone.loss_ratio for target, alone in compiler.plan(request).alone.items()}
    assert price["executorch"] == pytest.approx(1.0)  # the same choices, the same scales
    assert 1.04 < price["onnx"] < 1.25


# Placement


def test_ops_are_sorted_by_unit_and_by_whose_choice_it_was() -> None:
    units = {"step": {"NPU": {"MatMul": 3}, "CPU": {"Gather": 1, "Scan": 2}}, "encoder": {"NPU": {"MatMul": 1}}}
    found = place(units, ("NPU",), {"Gather"}, "the runtime")
    assert found.accelerated == {"step": {"MatMul": 3}, "encoder": {"MatMul": 1}}
    assert found.host == {"step": {"Gather": 1}}
    assert found.fallback == {"step": {"Scan": 2}}


def reported(placement: Placement) -> Report:
    same = Agreement(0.0, 0.0, 1.0, 1, 1, 1)
    return Report([TargetReport("qnn", "float16", same, same, placement, 1, 1)])


def test_strict_placement_names_what_fell_back() -> None:
    require_placement(reported(Placement("NPU", {"step": {"MatMul": 3}}, {"step": {"Gather": 1}})))
    with pytest.raises(VerificationFailure, match="qnn: step: not on NPU: Scan x2"):
        require_placement(reported(Placement("NPU", {}, {}, {"step": {"Scan": 2}})))


def test_strict_placement_does_not_pass_what_nobody_knows() -> None:
    with pytest.raises(VerificationFailure, match=r"not known here \(ask a Mac\)"):
        require_placement(reported(Placement("NPU", {}, source="ask a Mac", known=False)))


# A bundle where a library is missing


def test_verify_skips_a_target_whose_library_is_missing_and_says_so(tmp_path: Path, without: Any) -> None:
    model = write_tiny_llama(tmp_path / "model", num_hidden_layers=1)
    made = compiler.export(asking(str(model), bits=6.0, verify=False), tmp_path / "bundle").manifest
    (entry,) = made.targets
    (tmp_path / "bundle" / "coreml").mkdir()
    both = (entry, entry.model_copy(update={"format": "coreml", "files": ()}))
    write_manifest(tmp_path / "bundle", made.model_copy(update={"targets": both}))
    without("coremltools")
    report = verify_here(tmp_path / "bundle")
    assert [t.format for t in report.targets] == ["onnx"]
    assert report.notes == ["coreml was not checked here: pip install 'edgewright[coreml]'"]
    with pytest.raises(UserError, match="--format coreml needs coremltools"):
        verify_here(tmp_path / "bundle", VerifyOptions(formats=("coreml",)))
    without("onnxruntime")
    with pytest.raises(UserError, match="none of its targets can be checked here"):
        verify_here(tmp_path / "bundle")


# A target in a process of its own


@pytest.mark.slow
def test_what_an_exporter_refuses_elsewhere_is_the_same_line(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    model = write_tiny_llama(tmp_path / "model", num_hidden_layers=1)
    both = compiler.plan(asking(str(model), ("onnx", "tensorrt"), bits=6.0)).plan  # scales are positive
    made = compiler.export(asking(str(model), plan=both, verify=False), tmp_path / "bundle")
    checkpoint, options, said = made.path / "checkpoint", Options(16, choices=(75,)), []
    for lowering in (lower, lower_apart):
        with pytest.raises(UserError, match=r"SM 75 is not supported"):
            lowering("tensorrt", checkpoint, tmp_path, options, said.append)
    (tmp_path / "onnx").mkdir()
    found = lower_apart("onnx", checkpoint, tmp_path / "onnx", options, said.append)
    assert found == lower("onnx", checkpoint, tmp_path / "onnx", options, said.append)
    assert said == ["onnx: decoder", "onnx: decoder"]


@pytest.mark.slow
def test_an_exporter_that_dies_elsewhere_is_one_line(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model", num_hidden_layers=1)
    made = compiler.export(asking(str(model), bits=6.0, verify=False), tmp_path / "bundle")
    with pytest.raises(
        UserError, match=r"--format onnx: lowering ended with status 1 \(.*No such file.*leave this target"
    ):
        lower_apart("onnx", made.path / "checkpoint", tmp_path / "absent", Options(16), lambda _: None)


# The default budget


def test_without_a_budget_the_nearest_to_the_default_is_taken(tmp_path: Path) -> None:
    model = str(write_tiny_llama(tmp_path / "model", num_hidden_layers=1))
    usual = compiler.plan(asking(model)).plan.average_bits
    assert 4.3 < usual <= 4.5
    low = compiler.plan(asking(model, widths=(2,))).plan
    assert {e.bits for e in low.entries.values()} == {2}
    high = compiler.plan(asking(model, ("ethosu",), widths=(8,))).plan
    assert {(e.bits, e.group_size) for e in high.entries.values()} <= {(8, 64), (8, 96)}
    with pytest.raises(UserError, match="above the ceiling"):
        compiler.plan(asking(model, widths=(2,), bits=4.5))
