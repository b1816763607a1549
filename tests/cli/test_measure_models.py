"""`devices measure --models`: real exports and runs of models of random weights, the costs fitted to them, and predictions from
those."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgewright.commands.measure_models import SHAPES, measure_models
from edgewright.device_profiles.efficiencies import OWN_RUNTIME, load_efficiencies, read_entries, user_file
from edgewright.device_profiles.predict import predict, units_of
from edgewright.device_profiles.profile import load, parse, save, user_path
from edgewright.models.registry import build
from edgewright.quant.latency import PredictedRates, decode_step
from edgewright.quant.units import quantizable_units
from edgewright.quant.workload import as_work, graph_work, planned_names

pytestmark = pytest.mark.exports

HOST = (
    'name = "host"\nkind = "host"\n[[units]]\nname = "here"\nkind = "cpu"\n[[targets]]\nname = "onnx"\n'
    'source = "measured by the test"\n'
)


@pytest.fixture
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    save(parse(HOST, "the test"), user_path("host"))


@pytest.mark.slow
def test_predictions_for_this_machine_rest_on_what_was_run_here(own_config: None) -> None:
    small = SHAPES["decoder of 3 million weights"]
    sizes = {"one": small, "two": small | {"num_hidden_layers": 8}, "three": small | {"hidden_size": 128}}
    lines: list[str] = []
    path = measure_models("host", lines.append, sizes, repeats=1)
    assert path == user_file()
    assert len(lines) == 3
    own = [e for e in read_entries() if e.runtime == OWN_RUNTIME]
    assert {e.phase for e in own} == {"decode", "prefill"}
    assert {e.n for e in own} == {9, 6}  # three shapes: three depths, two prompts
    assert any(e.runtime == "geniex_qairt" for e in read_entries())  # the published ones stay
    model, host = build(small), load("host")
    work = graph_work(model, model.graphs()[0], 1, 16, 0, planned_names(quantizable_units(model)))
    predicted = predict(as_work(work, "decode", "onnx", None), 1, "onnx", units_of("onnx", host)[0], host)
    assert predicted.seen
    assert "fitted here" in predicted.note
    other = load("samsung-galaxy-s25")
    elsewhere = predict(as_work(work, "decode", "onnx", None), 1, "onnx", units_of("onnx", other)[0], other)
    assert "llama.cpp" in elsewhere.note
    assert load_efficiencies().has(OWN_RUNTIME, "cpu", "decode")
    # Twice the layers take longer.
    deep = build(sizes["two"])
    deeper = graph_work(deep, deep.graphs()[0], 1, 16, 0, planned_names(quantizable_units(deep)))
    slower = predict(as_work(deeper, "decode", "onnx", None), 1, "onnx", units_of("onnx", host)[0], host)
    assert slower.seconds > predicted.seconds
    # A budget of time rests on the same costs, though the profile has measured kernels.
    stream = "weight_stream = { value = 5e9, unit = 'bytes/s', source = 'measured by the test', kind = 'measured' }\n"
    save(parse(HOST.replace("[[targets]]", f"{stream}[[targets]]"), "the test"), user_path("host"))
    step = decode_step(model, quantizable_units(model), load("host"), ("onnx",))
    assert isinstance(step.rates, PredictedRates)
    # The profile's bandwidth, which the costs know already, changes nothing.
    memory = (
        "[memory]\nbandwidth = { value = 5e9, unit = 'bytes/s', source = 'measured by the test', kind = 'measured' }\n"
    )
    save(parse(HOST.replace("[[units]]", f"{memory}[[units]]"), "the test"), user_path("host"))
    again = predict(as_work(work, "decode", "onnx", None), 1, "onnx", units_of("onnx", host)[0], load("host"))
    assert again.seconds == pytest.approx(predicted.seconds)


def test_the_shapes_build() -> None:
    for config in SHAPES.values():
        assert build(config).task == "causal"
