"""Budgets of milliseconds: what a decode step reads, what that takes on a device, and the refusals."""

from __future__ import annotations

import pytest
from helpers import tiny
from helpers.allocation import allocated
from helpers.tiny_families import FAMILIES

from edgewright.device_profiles.profile import DeviceProfile, load, parse
from edgewright.errors import UserError
from edgewright.models.registry import build
from edgewright.quant.allocator import expected_loss
from edgewright.quant.latency import DecodeStep, PredictedRates, Rates, decode_step
from edgewright.quant.plan import Unit, WeightSpec
from edgewright.quant.prediction import Asked, predicted_rows
from edgewright.quant.units import quantizable_units
from edgewright.targets.storage import stored_bytes

UNITS = [Unit(f"u{i}", [WeightSpec(f"u{i}.weight", (64 + 16 * i, 640), i, "decoder")]) for i in range(12)]
SCORES = {unit.name: 1.0 + i for i, unit in enumerate(UNITS)}


def device(unit: str, memory: str = "", target: str = "onnx") -> DeviceProfile:
    return parse(
        f'name = "thing"\nkind = "board"\n{memory}\n[[units]]\nname = "one"\nkind = "cpu"\n{unit}\n'
        f'[[targets]]\nname = "{target}"\nsource = "public: here"\n',
        "the test",
    )


def quantity(value: float, unit: str) -> str:
    return f'{{ value = {value}, unit = "{unit}", source = "public: here", kind = "derived" }}'


STREAM = f"weight_stream = {quantity(1e9, 'bytes/s')}"
STEP = DecodeStep(Rates.of(device(STREAM), "onnx"), {w.name: 1.0 for u in UNITS for w in u.weights}, 10**6)


def test_reading_or_arithmetic_bounds_a_weight() -> None:
    weight = WeightSpec("w", (100, 640), 0, "decoder")
    reading = Rates.of(device(STREAM, f"[memory]\nbandwidth = {quantity(2e9, 'bytes/s')}"), "onnx")
    assert reading.seconds(weight, 4, 32) == pytest.approx(stored_bytes("onnx", 4, 32, 100, 640) / 1e9)
    assert reading.seconds(weight, 16, 640) == pytest.approx(100 * 640 * 2 / 2e9)
    slow = Rates.of(device(f"{STREAM}\npeak = {{ int8 = {quantity(0.1, 'GOP/s')} }}"), "onnx")
    assert slow.seconds(weight, 4, 32) == slow.seconds(weight, 2, 32) == pytest.approx(2 * 64000 / 1e8)


def test_the_plan_is_within_the_time_and_no_better_one_is() -> None:
    low, high = (
        STEP.milliseconds(allocated(UNITS, SCORES, bits=bits, targets=["onnx"]), UNITS) for bits in (2.13, 8.02)
    )
    middle = (low + high) / 2
    plan = allocated(UNITS, SCORES, latency_ms=middle, step=STEP, targets=["onnx"])
    assert 0.97 * middle < STEP.milliseconds(plan, UNITS) <= middle
    assert (plan.budget.kind, plan.budget.device) == ("latency", "thing")
    for size in range(plan.total_bytes // 2, 2 * plan.total_bytes, plan.total_bytes // 40):
        try:
            other = allocated(UNITS, SCORES, size=size, targets=["onnx"])
        except UserError:
            continue
        if STEP.milliseconds(other, UNITS) <= middle:
            assert expected_loss(other, UNITS) >= expected_loss(plan, UNITS) * (1 - 1e-9)


def test_a_width_that_rides_in_a_wider_container_saves_no_time() -> None:
    plan = allocated(UNITS, SCORES, latency_ms=0.45, step=STEP, targets=["onnx"])
    widths = {entry.bits for entry in plan.entries.values()}
    assert widths <= {2, 4, 8}  # 3 bits are stored as 4, 5 and 6 as 8


def test_refusals_name_floor_and_ceiling_in_milliseconds() -> None:
    with pytest.raises(UserError, match=r"step of 0\.001 ms is below the floor: .* from 0\.\d+ ms to 1\.\d+ ms") as low:
        allocated(UNITS, SCORES, latency_ms=0.001, step=STEP)
    with pytest.raises(UserError, match="above the ceiling"):
        allocated(UNITS, SCORES, latency_ms=1000.0, step=STEP)
    words = str(low.value).split()
    for end in (float(words[words.index("from") + 1]), float(words[words.index("to") + 1])):
        assert STEP.milliseconds(allocated(UNITS, SCORES, latency_ms=end, step=STEP), UNITS) <= end + 1e-6
    with pytest.raises(UserError, match="give --device"):
        allocated(UNITS, SCORES, latency_ms=1.0)
    with pytest.raises(UserError, match="one budget"):
        allocated(UNITS, SCORES, latency_ms=1.0, bits=4.0, step=STEP)
    with pytest.raises(UserError, match="nan is not a number"):
        allocated(UNITS, SCORES, latency_ms=float("nan"), step=STEP)


ENCODERS = {"modernbert", "bert", "roberta", "xlm-roberta", "distilbert"}


@pytest.mark.parametrize("family", sorted({"t5gemma", "llama", "gemma3_text", *FAMILIES} - ENCODERS))
def test_a_step_reads_the_decoder_and_not_the_encoder(family: str) -> None:
    config = {"t5gemma": tiny.T5GEMMA, "llama": tiny.LLAMA, "gemma3_text": tiny.GEMMA3, **FAMILIES}[family]
    model = build(config)
    units = quantizable_units(model)
    step = decode_step(model, units, load("samsung-galaxy-s25"), ("onnx",))
    assert step.rest > 0
    for weight in (w for u in units for w in u.weights):
        times = step.reads.get(weight.name, 0.0)
        vocab = weight.shape[0]
        twice = 2.0 if "modality_router" in weight.name else 1.0  # before a layer and behind it
        uses = twice + sum(stored == weight.name for stored in model.tied.values()) * (weight.layer is not None)
        assert any(times == pytest.approx(value) for value in (0.0, uses, 1 / vocab, 1 + 1 / vocab)), (
            weight.name,
            times,
        )
        if weight.layer is not None:  # of an encoder never, of a decoder each one once for each layer that it is in
            apart = "encoder" in weight.name.replace("main_decoder", "") or ".e." in weight.name
            cross = "cross_attn" in weight.name or ".cross" in weight.name
            assert times == (0.0 if apart else uses) or cross, weight.name
    assert any(step.reads.get(w.name) == 1.0 for u in units for w in u.weights)
    assert any(
        step.picoseconds(w, 8, w.shape[1]) > step.picoseconds(w, 4, w.shape[1]) for u in units for w in u.weights
    )


def test_what_a_device_does_not_say_is_refused() -> None:
    model = build(tiny.LLAMA)
    units = quantizable_units(model)
    with pytest.raises(UserError, match="is of one target, not of onnx, qnn"):
        decode_step(model, units, load("samsung-galaxy-s25"), ("onnx", "qnn"))
    with pytest.raises(UserError, match="sa8775p-adp is not known to run onnx, but qnn"):
        decode_step(model, units, load("sa8775p-adp"), ("onnx",))
    with pytest.raises(UserError, match="thing has no npu"):
        decode_step(model, units, device("", target="qnn"), ("qnn",))
    with pytest.raises(UserError, match="no decode step is predicted for ethosu"):
        decode_step(model, units, device(""), ("ethosu",))
    encoder = build(FAMILIES["modernbert"])
    with pytest.raises(UserError, match="this model has no decoder"):
        decode_step(encoder, quantizable_units(encoder), load("samsung-galaxy-s25"), ("onnx",))


def test_a_device_that_was_not_measured_is_predicted_and_sure_is_slower() -> None:
    model = build(tiny.LLAMA)
    units = quantizable_units(model)
    step, sure = (decode_step(model, units, load("pixel-9"), ("onnx",), sure=sure) for sure in (False, True))
    assert isinstance(step.rates, PredictedRates)
    weight = units[0].weights[0]
    factor = sure.picoseconds(weight, 8, weight.shape[1]) / step.picoseconds(weight, 8, weight.shape[1])
    assert factor == pytest.approx(sure.rest / step.rest, rel=0.01)
    assert factor > 2
    watts = decode_step(model, units, load("raspberry-pi-5"), ("onnx",)).rates
    assert isinstance(watts, PredictedRates)
    assert watts.watts == 11.9
    # What the whole plan takes is what `profile --device` says of it.
    plan = allocated(units, {u.name: 1.0 for u in units}, bits=6.0, targets=["onnx"])
    rows = predicted_rows(model, units, plan, [load("pixel-9")], ["onnx"], Asked(8, 2, 62), 128)
    said = next(r.predicted.seconds / r.tokens for r in rows if r.test.startswith("tg"))
    assert step.milliseconds(plan, units) == pytest.approx(said * 1e3, rel=0.01)
