"""What graphs ask of a device, counted on shapes, and what is predicted of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import tiny

from edgewright.checkpoints.opening import read_config
from edgewright.cli import main
from edgewright.device_profiles.predict import STAND_INS, predict, units_of
from edgewright.device_profiles.profile import list_profiles, load
from edgewright.errors import UserError
from edgewright.models.language_model import LanguageModel
from edgewright.models.registry import build
from edgewright.quant.prediction import Asked, predicted_rows
from edgewright.quant.units import quantizable_units
from edgewright.quant.workload import as_work, graph_work, planned_names
from edgewright.targets.registry import TARGETS

EXAMPLES = tiny.EXAMPLE.parent


@pytest.fixture(autouse=True)
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def llama(**changes: Any) -> LanguageModel:
    return build(tiny.LLAMA | changes)


@pytest.mark.parametrize(("tokens", "depth"), [(1, 0), (1, 30), (8, 0), (8, 12)])
def test_a_decoder_is_counted_by_its_formulas(tokens: int, depth: int) -> None:
    model = llama()
    config, planned = tiny.LLAMA, planned_names(quantizable_units(model))
    work = graph_work(model, model.graphs()[0], tokens, depth, 0, planned)
    layers, heads, kv = config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    body = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n)
    head = config["vocab_size"] * config["hidden_size"]
    assert work.products == 2 * (tokens * body + head)  # the head reads one position
    assert work.attention == 2 * layers * tokens * heads * width * (depth + (tokens + 1) / 2)
    assert work.cache == 2 * layers * kv * width * (depth + tokens)
    assert (work.layers, work.recurrent_layers, work.state_bytes) == (layers, 0, 0)


def test_windows_bound_what_is_seen() -> None:
    model = build(tiny.GEMMA3)
    planned = planned_names(quantizable_units(model))
    far, near = (graph_work(model, model.graphs()[0], 1, depth, 0, planned) for depth in (50, 3))
    windowed = 2 * tiny.GEMMA3["sliding_window"]  # two of three layers
    assert far.attention / (2 * 4 * 32) == windowed + 51
    assert near.attention / (2 * 4 * 32) == 3 * 4


def test_a_hybrid_has_recurrences_whose_states_are_read_and_written() -> None:
    model = build(read_config(str(EXAMPLES / "deltanet-g2p")))
    planned = planned_names(quantizable_units(model))
    work = graph_work(model, model.graphs()[0], 1, 10, 0, planned)
    assert work.recurrent_layers == 4
    assert work.attention_layers == 2
    deeper = graph_work(model, model.graphs()[0], 1, 40, 0, planned)
    assert deeper.state_bytes == work.state_bytes > 0
    assert deeper.cache > work.cache


@pytest.mark.parametrize("target", [t for t, facts in TARGETS.items() if not facts.graphs])
def test_more_bits_are_more_bytes(target: str) -> None:
    model = llama()
    work = graph_work(model, model.graphs()[0], 1, 8, 0, planned_names(quantizable_units(model)))
    four, eight = (as_work(work, "decode", target, None, bits).terms for bits in (4, 8))
    assert eight["weights"] > 1.5 * four["weights"]
    assert {k: v for k, v in four.items() if k != "weights"} == {k: v for k, v in eight.items() if k != "weights"}


def test_every_device_gives_a_prediction_for_each_target_it_runs() -> None:
    model = llama()
    units, devices = quantizable_units(model), list_profiles()
    targets = [t for t, facts in TARGETS.items() if not facts.graphs]
    rows = predicted_rows(model, units, None, devices, targets, Asked(32, 16, 8), 128)
    on = {(r.predicted.device, r.target) for r in rows}
    assert on == {(d.name, t) for d in devices for t in targets if units_of(t, d)}
    assert len({d for d, _ in on}) >= 40
    for row in rows:
        p = row.predicted
        assert 0 < p.low < p.seconds < p.high
        assert sum(p.parts.values()) == pytest.approx(p.seconds)
        assert p.energy is None or p.energy.joules > 0


def test_a_bound_step_follows_memory_and_depth() -> None:
    """A 1B decoder: twice the bits cost more, more depth costs more, an unseen device is less sure."""
    model = llama(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    )
    units = quantizable_units(model)
    seen, other = load("samsung-galaxy-s25"), load("pixel-9")

    def step(bits: int, depth: int, device: Any) -> Any:
        rows = predicted_rows(model, units, None, [device], ["onnx"], Asked(128, 16, depth), 128, bits)
        return next(r for r in rows if r.test.startswith("tg")).predicted

    assert step(8, 0, seen).seconds > 1.3 * step(4, 0, seen).seconds
    assert step(4, 4000, seen).seconds > step(4, 0, seen).seconds
    known, unknown = step(4, 0, seen), step(4, 0, other)
    assert (known.seen, unknown.seen) == (True, False)
    assert unknown.high / unknown.low > known.high / known.low
    # Published: 63 to 75 tokens a second for Llama 3.2 1B at Q4_0 on phones of this class.
    assert 20 < 16 / known.seconds < 120


def test_the_unit_of_a_graph_is_the_fastest_and_says_why() -> None:
    model = llama()
    device = load("iphone-17-pro")
    rows = predicted_rows(model, quantizable_units(model), None, [device], ["coreml"], Asked(64, 8), 128)
    for row in rows:
        assert row.reason.startswith(f"{row.predicted.unit}: ")
        assert "as long" in row.reason
    work = graph_work(model, model.graphs()[0], 1, 4, 0, planned_names(quantizable_units(model)))
    each = [
        predict(as_work(work, "decode", "coreml", None), 8, "coreml", unit, device)
        for unit in units_of("coreml", device)
    ]
    chosen = next(r for r in rows if r.test == "tg8").predicted
    assert chosen.seconds == pytest.approx(min(p.seconds for p in each), rel=0.05)


def test_stand_ins_are_of_targets_and_runtimes_that_are_known() -> None:
    assert {target for target, _ in STAND_INS} <= set(TARGETS)
    assert all(stand_in.wider >= 1 and stand_in.note for stand_in in STAND_INS.values())


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["profile", *map(str, arguments)])


def test_the_command_predicts_from_a_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.LLAMA))
    devices = ("--device", "samsung-galaxy-s25", "--device", "raspberry-pi-5")
    result = invoke("-m", tmp_path, *devices, "-p", "16", "-n", "8", "-o", "json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["kind"] == "predicted"
    assert {r["device"] for r in found["rows"]} == {"samsung-galaxy-s25", "raspberry-pi-5"}
    energies = {r["device"]: r["energy_boundary"] for r in found["rows"]}
    assert energies == {"samsung-galaxy-s25": None, "raspberry-pi-5": "wall"}
    text = invoke("-m", tmp_path, *devices, "-p", "16", "-n", "8").output
    assert "PREDICTED" in text
    assert "not known" in text
    lines = invoke("-m", tmp_path, *devices, "-p", "16", "-n", "8", "-o", "csv").output.splitlines()
    assert len(lines) == 1 + len(found["rows"])


def test_an_alias_is_the_device_it_names(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.LLAMA))
    result = invoke("-m", tmp_path, "--device", "dragonwing-q-8750", "-p", "16", "-n", "8", "-o", "json")
    assert {r["device"] for r in json.loads(result.stdout)["rows"]} == {"samsung-galaxy-s25"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["-m", "M"], "is predicted, not measured; give --device NAME"),
        ([], "give a BUNDLE, or with --device NAME a checkpoint"),
        (["-m", "M", "--device", "galaxy"], "unknown device 'galaxy'"),
        (["-m", "M", "--device", "rtx-4090", "--format", "qnn"], "no prediction for qnn on rtx-4090"),
        (["-m", "M", "--device", "all", "--format", "onx"], "unknown target onx"),
        (["-m", "M", "--device", "all", "-p", "100000"], "tokens were asked for and the model takes"),
        (["-m", "M", "--device", "all", "--sustain", "5"], "--sustain is for a device behind a link"),
    ],
)
def test_refusals_are_one_line(arguments: list[str], line: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.LLAMA))
    result = invoke(*(str(tmp_path) if a == "M" else a for a in arguments))
    assert result.exit_code == 2
    assert line in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_model_that_no_device_holds_is_said(tmp_path: Path) -> None:
    big = tiny.LLAMA | {
        "hidden_size": 16384,
        "intermediate_size": 65536,
        "num_hidden_layers": 20,
        "num_attention_heads": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(big))
    result = invoke("-m", tmp_path, "--device", "samsung-galaxy-s25", "-p", "16", "-n", "8", "-o", "json")
    assert any(line.startswith("samsung-galaxy-s25 (onnx: ") for line in json.loads(result.stdout)["too_small"])


def test_a_device_that_runs_none_of_it_is_refused() -> None:
    model = llama()
    with pytest.raises(UserError, match="no prediction for onnx on ethos-u85-2048"):
        predicted_rows(model, quantizable_units(model), None, [load("ethos-u85-2048")], ["onnx"], Asked(), 128)
