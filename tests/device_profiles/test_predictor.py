"""The predictor: what it reaches on published rows that are held out, what it refuses, and its file."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.cli import main
from edgewright.commands.options import HOLD_OUTS
from edgewright.device_profiles.calibrate import calibrate
from edgewright.device_profiles.cost_fit import REFERENCE, fit
from edgewright.device_profiles.efficiencies import SHIPPED, fit_efficiencies, load_efficiencies, to_json, user_file
from edgewright.device_profiles.evaluate import HoldOut, predict_rows, summary
from edgewright.device_profiles.published_rows import SHIPPED_ROWS, Published, read_models, read_rows
from edgewright.device_profiles.work import TERMS, DecoderShape, Work, decode_work, prefill_work
from edgewright.errors import UserError


@pytest.fixture(autouse=True)
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture(scope="module")
def rows() -> list[Published]:
    return read_rows()[0]


def test_architectures_held_out(rows: list[Published]) -> None:
    found = summary(predict_rows(rows, rows, "architecture"))
    decode, prefill = found["decode"], found["prefill"]
    assert decode["rows"] > 600
    assert decode["median_error"] <= 0.12
    assert prefill["median_error"] <= 0.13
    assert max(decode["p90_error"], prefill["p90_error"]) <= 0.5
    assert 0.75 <= decode["covered"] <= 0.9
    assert 0.75 <= prefill["covered"] <= 0.9
    assert decode["choices"]["within_15_percent"] >= 0.84
    assert prefill["choices"]["within_15_percent"] >= 0.94


def test_devices_held_out(rows: list[Published]) -> None:
    found = summary(predict_rows(rows, rows, "device"))
    assert all(found[phase]["median_error"] <= 0.3 for phase in TERMS)
    assert all(found[phase]["covered"] >= 0.65 for phase in TERMS)


@pytest.mark.slow
def test_a_new_device_calibrated_with_one_model(rows: list[Published]) -> None:
    found = summary(predict_rows(rows, rows, "device-but-one-model"))
    assert all(found[phase]["median_error"] <= 0.17 for phase in TERMS)
    assert all(found[phase]["covered"] is None for phase in TERMS)  # no interval is made of so few rows


def test_what_is_known_to_be_wrong_is_left_out(rows: list[Published]) -> None:
    published = list(csv.DictReader(SHIPPED_ROWS.open()))
    names = {row["device"] for row in published}
    devices = {r.device for r in rows}
    assert {"Samsung Galaxy S25", "Dragonwing Q-8750"} <= names
    assert "samsung-galaxy-s25" in devices
    assert not {"dragonwing-q-8750", "dragonwing-iq-x7181", "sa8650p-adp"} & devices  # other names of what is there
    assert all(rate > 0 for r in rows for rate in r.tokens_per_second.values())
    assert all("decode" not in r.tokens_per_second for r in rows if r.model.endswith("_ssd"))
    padded = next(r for r in rows if r.runtime == "genie")
    raw = [row for row in published if row["model"] == padded.model and row["runtime"] == "genie"]
    firsts = [128 / (float(row["ttft_min_ms"]) / 1e3) for row in raw if float(row["ttft_min_ms"] or 0)]
    assert any(math.isclose(padded.tokens_per_second["prefill"], first) for first in firsts)


def test_a_known_law_is_found_again() -> None:
    """Rates made by a law of three terms on two devices: an unseen shape is predicted, and a device's own factor is found."""
    shape = [DecoderShape(n, n, 0, 8, 8, 64, 1e6 * n * w, 1e6) for n in (4, 8, 16, 32) for w in (1, 4, 16)]
    made = []
    for device, factor in (("fast", 1.0), ("slow", 1.4)):
        for s in shape:
            work = decode_work(s, s.body / 2, 100, 2, "int4", "int8")
            seconds = factor * (work.terms["weights"] / 20e9 + work.terms["layers"] * 30e-6 + 1e-3)
            row = Published(
                "m", "m", device, "phone", "x", "cpu", "q4_0", 100, {"decode": 1 / seconds}, {"decode": work}
            )
            made.append(row)
    costs = fit("decode", "cpu", made, {})
    unseen = DecoderShape(24, 24, 0, 8, 8, 64, 24e6 * 8, 1e6)
    work = decode_work(unseen, unseen.body / 2, 100, 2, "int4", "int8")
    for device, factor in (("fast", 1.0), ("slow", 1.4)):
        true = factor * (work.terms["weights"] / 20e9 + 24 * 30e-6 + 1e-3)
        assert sum(costs.seconds(work, device, "phone", None).values()) == pytest.approx(true, rel=0.06)
    assert costs.knows("slow")
    assert not costs.knows("other")


@settings(max_examples=30, deadline=None)
@given(
    layers=st.integers(1, 64),
    window=st.integers(0, 600),
    depth=st.integers(1, 8192),
    chunk=st.integers(1, 512),
)
def test_terms_grow_with_what_they_count(layers: int, window: int, depth: int, chunk: int) -> None:
    shape = DecoderShape(layers, layers, 0, 8, 2, 64, 1e7, 1e6, window=window, window_layers=layers // 2)
    deeper = decode_work(shape, 5e6, depth + 1, 2, "int4", "int8").terms
    terms = decode_work(shape, 5e6, depth, 2, "int4", "int8").terms
    assert set(terms) == set(TERMS["decode"])
    assert all(deeper[name] >= terms[name] >= 0 for name in terms)
    if window:
        assert shape.seen(depth) <= layers * depth
    prompt = prefill_work(shape, 5e6, depth, chunk, "int4", "int8").terms
    assert set(prompt) == set(TERMS["prefill"])
    assert prompt["weights"] * chunk == pytest.approx(5e6)


def test_the_shipped_file_is_what_the_rows_give(rows: list[Published]) -> None:
    shipped = json.loads(SHIPPED.read_text())["entries"]
    fitted = fit_efficiencies(rows)
    assert {(e["runtime"], e["unit"], e["phase"]) for e in shipped} == set(fitted.costs)
    for entry in shipped:
        costs = fitted.costs[(entry["runtime"], entry["unit"], entry["phase"])]
        assert entry["n"] == costs.n
        for term, log in costs.log_costs.items():
            assert entry["costs"][term] == pytest.approx(math.exp(log), rel=0.02), (entry["runtime"], term)
        assert entry["known"]["low"] <= 1 <= entry["known"]["high"]
        assert entry["unseen"]["low"] <= entry["known"]["low"]


def test_a_prediction_has_parts_and_an_interval(rows: list[Published]) -> None:
    shipped = load_efficiencies()
    row = next(r for r in rows if r.runtime == "geniex_llamacpp" and r.unit == "cpu")
    seen = shipped.predict(row.work["decode"], row.runtime, row.unit, row.device, row.kind)
    other = shipped.predict(row.work["decode"], row.runtime, row.unit, "never-seen", row.kind, bandwidth=60e9)
    assert seen.seconds == pytest.approx(sum(seen.parts.values()))
    assert seen.seen
    assert not other.seen
    assert other.interval.high / other.interval.low >= seen.interval.high / seen.interval.low
    with pytest.raises(UserError, match="no rows of mlx on gpu are known; known: genie on npu"):
        shipped.predict(row.work["decode"], "mlx", "gpu", row.device, row.kind)


def test_experts_without_kernels_cost_what_the_cpu_takes() -> None:
    shipped = load_efficiencies()
    terms = dict.fromkeys(TERMS["decode"], 1.0) | {"weights": 1e9}
    work = Work("decode", terms, "q4_0", "int8")
    on = {u: shipped.predict(work, "geniex_llamacpp", u, "samsung-galaxy-s25", "phone").seconds for u in ("cpu", "npu")}
    assert on["npu"] >= on["cpu"]


HEAD = "model,precision,device,runtime,ctx,unit,decode_tps,prefill_tps,ttft_min_ms,ttft_max_ms\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model,device\nx,y\n", "no column precision; the columns are model"),
        (HEAD + "qwen3_4b,q4_0,d,r,512,cpu,fast,1,,\n", "line 2: decode_tps is 'fast'; give a number of 0 or more"),
        (HEAD + "qwen3_4b,q4_0,d,r,512,cpu,-1,1,,\n", "line 2: decode_tps is '-1'"),
        (HEAD + "qwen3_4b,q4_0,d,r,0,cpu,1,1,,\n", "line 2: ctx is '0'"),
        (HEAD + "qwen3_5b,q4_0,d,r,512,cpu,1,1,,\n", "sizes of qwen3_5b are not known (did you mean qwen3_"),
        (HEAD + "qwen3_4b,q9,d,r,512,cpu,1,1,,\n", "precision 'q9' is not known"),
        (HEAD, "none of its rows can be used"),
    ],
)
def test_a_faulty_table_is_one_line(text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(text)
    result = CliRunner().invoke(main, ["devices", "evaluate", "--data", str(tmp_path / "rows.csv")])
    assert result.exit_code == 2
    assert line in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_the_command_predicts_rows_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "rows.csv"
    own.write_text(HEAD + "qwen3_4b,q4_0,Samsung Galaxy S25,geniex_llamacpp,512,cpu,20,100,,\n")
    result = CliRunner().invoke(main, ["devices", "evaluate", "--data", str(own), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {r["phase"] for r in found["rows"]} == {"decode", "prefill"}
    assert all(r["interval"][0] < r["predicted_tokens_per_s"] < r["interval"][1] for r in found["rows"])
    assert found["summary"]["decode"]["rows"] == 1


def test_calibrating_moves_a_new_device_to_its_rows(tmp_path: Path, rows: list[Published]) -> None:
    """Rows of a device nobody has, four times as slow as the mean: its predictions follow, and the file is read back."""
    own = tmp_path / "rows.csv"
    picked = [r for r in rows if r.device == "samsung-galaxy-s25" and r.unit == "cpu" and r.group == "qwen3_4b"]
    own.write_text(
        HEAD
        + "".join(
            f"{r.model},{r.precision},My Board,{r.runtime},{r.context},cpu,"
            f"{r.tokens_per_second['decode'] / 4},{r.tokens_per_second['prefill'] / 4},,\n"
            for r in picked
            if len(r.tokens_per_second) == 2
        )
    )
    work = picked[0].work["decode"]
    before = load_efficiencies().predict(work, "geniex_llamacpp", "cpu", "My Board", "unknown")
    result = CliRunner().invoke(main, ["devices", "calibrate", "--data", str(own)])
    assert result.exit_code == 0, result.output
    assert str(user_file()) in result.output
    after = load_efficiencies().predict(work, "geniex_llamacpp", "cpu", "My Board", "unknown")
    true = 4 / picked[0].tokens_per_second["decode"]
    assert abs(math.log(after.seconds / true)) < abs(math.log(before.seconds / true)) / 2
    assert after.seen


def test_a_faulty_file_of_costs_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text(SHIPPED.read_text().replace('"weights": ', '"weights": -', 1))
    with pytest.raises(UserError, match=r"no costs that `devices calibrate` wrote \(entries\.0\.costs\.weights"):
        load_efficiencies(path)


def test_the_command_offers_what_can_be_held_out() -> None:
    assert set(HOLD_OUTS) == set(get_args(HoldOut))


def test_the_fit_has_a_reference_for_every_term() -> None:
    assert {phase: tuple(costs) for phase, costs in REFERENCE.items()} == TERMS


def test_the_file_is_the_same_twice(rows: list[Published]) -> None:
    some = [r for r in rows if r.runtime == "genie"]
    assert to_json(calibrate(some)) == to_json(calibrate(some))
    assert np.isfinite([c for e in calibrate(some) for c in e.costs.values()]).all()


def test_models_are_read_with_their_sizes() -> None:
    models = read_models()
    assert "indus_1b" not in models
    assert models["qwen3_4b"].shape.kv_heads == 8
    assert models["gpt_oss_20b"].shape.expert_layers == 24
    assert models["gpt_oss_20b"].prompt_bytes > models["gpt_oss_20b"].step_bytes
