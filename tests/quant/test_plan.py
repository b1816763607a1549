"""What a plan says beside bits: quantizer, predicted loss, calibration data; and plans written before it said so."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers.allocation import allocated

from edgewright.errors import UserError
from edgewright.quant.allocator import Losses, Problem, expected_loss, reach
from edgewright.quant.overrides import Override
from edgewright.quant.plan import BitPlan, Choice, Unit, WeightSpec

OLD = """{
  "version": 1,
  "method": "zd",
  "budget": {"kind": "bits", "value": 4.5},
  "average_bits": 4.5,
  "total_bytes": 4608,
  "entries": {
    "a.weight": {"bits": 4, "group_size": 32, "score": 1.0, "why": "importance 1"}
  }
}
"""
UNITS = [
    Unit("qk", [WeightSpec("q.weight", (48, 128), 0, "decoder"), WeightSpec("k.weight", (16, 128), 0, "decoder")]),
    Unit("o", [WeightSpec("o.weight", (64, 128), 0, "decoder")]),
    Unit("gate", [WeightSpec("gate.weight", (4, 128), 0, "decoder")]),
]
SCORES = {unit.name: 1.0 for unit in UNITS}


def measured() -> Losses:
    """Losses of q/k and o: gptq halves what rtn loses at 4 bits and does nothing at 2; o hardly matters."""
    sizes = {Choice(2, 64): 0.4, Choice(4, 64): 0.02, Choice(8, 0): 0.0001}
    of = sizes | {Choice(2, 64, "gptq"): 0.4, Choice(4, 64, "gptq"): 0.01}
    return {"qk": of, "o": {choice: loss / 1000 for choice, loss in of.items()}, "gate": {Choice(8, 0): 0.0}}


def test_a_plan_of_before_reads_and_is_written_as_it_was() -> None:
    plan = BitPlan.from_json(OLD)
    assert plan.entries["a.weight"].quantizer == "rtn"
    assert plan.entries["a.weight"].loss is None
    assert plan.calibration is None
    assert plan.to_json() == OLD


def test_quantizer_loss_and_calibration_survive_the_file() -> None:
    value = json.loads(OLD)
    value["calibration"] = "0123456789abcdef" * 4
    value["entries"]["a.weight"] |= {"quantizer": "gptq", "loss": 0.25}
    plan = BitPlan.from_json(json.dumps(value))
    assert (plan.entries["a.weight"].quantizer, plan.entries["a.weight"].loss) == ("gptq", 0.25)
    assert BitPlan.from_json(plan.to_json()) == plan
    assert plan.digest() != BitPlan.from_json(OLD).digest()
    unit = Unit("a", [WeightSpec("a.weight", (64, 128), None, "x")])
    assert plan.validate([unit]).calibration == value["calibration"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["entries"]["a.weight"].update(quantizer="awq"), "quantizer"),
        (lambda v: v["entries"]["a.weight"].update(quantizer=None), "quantizer"),
        (lambda v: v["entries"]["a.weight"].update(loss="small"), "loss"),
        (lambda v: v.update(calibration="../x"), "calibration"),
        (lambda v: v.update(calibration="AB" * 32), "calibration"),
        (lambda v: v["budget"].update(device=""), "device"),
    ],
)
def test_a_wrong_value_is_named(change: object, message: str) -> None:
    value = json.loads(OLD)
    change(value)  # type: ignore[operator]
    with pytest.raises(UserError, match=f"plan: .*{message}"):
        BitPlan.from_json(json.dumps(value))


def test_measured_losses_decide_bits_and_quantizer() -> None:
    plan = allocated(UNITS, SCORES, bits=5.3, widths=(2, 4, 8), groups=(64,), losses=measured(), method="fisher")
    chosen = {name: (entry.bits, entry.quantizer) for name, entry in plan.entries.items()}
    assert chosen == {
        "q.weight": (8, "rtn"),
        "k.weight": (8, "rtn"),
        "o.weight": (2, "rtn"),  # at 2 bits gptq gains nothing
        "gate.weight": (8, "rtn"),
    }
    tight = allocated(UNITS, SCORES, bits=4.4, widths=(2, 4, 8), groups=(64,), losses=measured())
    assert {tight.entries[name].quantizer for name in ("q.weight", "k.weight", "o.weight")} == {"gptq"}
    assert tight.entries["q.weight"].loss == pytest.approx(0.01 * 48 / 64)
    assert expected_loss(tight, UNITS) == pytest.approx(0.01 + 0.00001)
    assert expected_loss(BitPlan.from_json(tight.to_json()), UNITS) == expected_loss(tight, UNITS)


def test_a_choice_without_a_loss_is_not_offered() -> None:
    losses = dict(measured())
    losses["o"] = {Choice(2, 64): 0.3}
    plan = allocated(UNITS, SCORES, bits=5.2, widths=(2, 4, 8), groups=(64,), losses=losses)
    assert plan.entries["o.weight"].bits == 2
    problem = Problem(UNITS, SCORES, widths=(2, 4, 8), groups=(64,))
    ends = reach(replace(problem, losses=losses))
    assert ends[1] < 5.4 < reach(problem)[1]
    with pytest.raises(UserError, match=r"above the ceiling.*to 5\.\d+ "):
        allocated(UNITS, SCORES, bits=7, widths=(2, 4, 8), groups=(64,), losses=losses)
    with pytest.raises(UserError, match="unit gate: no loss was predicted at 2 bits, 4 bits"):
        allocated(UNITS, SCORES, bits=4, widths=(2, 4), groups=(64,), losses=losses)


def test_losses_must_be_numbers_and_kept_weights_need_none() -> None:
    losses = {name: of for name, of in measured().items() if name != "gate"}
    kept = [Override("^gate", 16)]
    plan = allocated(UNITS, SCORES, bits=5, widths=(2, 4, 8), groups=(64,), losses=losses, overrides=kept)
    assert (plan.entries["gate.weight"].bits, plan.entries["gate.weight"].loss) == (16, 0.0)
    for bad in (float("nan"), float("inf"), -1.0):
        broken = dict(measured()) | {"o": {Choice(4, 64): bad, Choice(2, 64): 1.0}}
        with pytest.raises(UserError, match="unit o has a predicted loss of"):
            allocated(UNITS, SCORES, bits=5, widths=(2, 4, 8), groups=(64,), losses=broken)


def test_gptq_may_be_written_by_hand() -> None:
    plan = allocated(UNITS, SCORES, bits=4.5)
    by_hand = plan.entries | {"o.weight": replace(plan.entries["o.weight"], quantizer="gptq")}
    edited = BitPlan.from_json(replace(plan, entries=by_hand).to_json()).validate(UNITS)
    assert edited.entries["o.weight"].quantizer == "gptq"
    assert edited.total_bytes == plan.total_bytes
