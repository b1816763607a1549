"""The page of a bundle and of several: what its charts show is what the bundle, its reports and predictions say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from helpers.cli_runner import edgewright, passed, refused
from helpers.pages import Page
from helpers.requests import asking

from edgewright import compiler
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.device_profiles.profile import list_profiles, load
from edgewright.models.registry import build
from edgewright.quant.plan import BitPlan
from edgewright.quant.units import quantizable_units
from edgewright.quant.workload import graph_work, planned_names
from edgewright.reports.page import device_rows, plots, sections
from edgewright.reports.page.bundle_page import NAV, page_html
from edgewright.reports.page.charts import KINDS
from edgewright.reports.page.facts import BundlePage, bundle_page, layer_bytes, roofs_of

pytestmark = pytest.mark.exports

DEVICES = ("samsung-galaxy-s25", "jetson-orin-nano")


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder's bundle, verified by its export and measured here. Must not be written to."""
    folder = tmp_path_factory.mktemp("page")
    model = tiny.write_tiny_llama(folder / "model", num_hidden_layers=2)
    compiler.export(asking(str(model), bits=5.0), folder / "known")
    done = edgewright("profile", folder / "known", "-p", 4, "-n", 2, "-d", "0,3", "-r", 2, "-t", 1, "-o", "json")
    assert done.exit_code == 0, done.output
    return folder / "known"


@pytest.fixture(scope="module")
def page(known: Path) -> BundlePage:
    """What is known of it, with predictions."""
    options = [part for name in DEVICES for part in ("--device", name)]
    predicted = json.loads(passed(edgewright("profile", known, *options, "-p", 4, "-n", 2, "-o", "json")))
    return bundle_page(known, names=DEVICES, prediction=predicted)


@pytest.fixture
def copy(known: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(known, tmp_path / "copy"))


def test_bytes_by_layer_are_those_of_the_plan(known: Path, page: BundlePage) -> None:
    plan = BitPlan.read(known / "checkpoint" / "plan.json")
    assert sum(sum(layer.bytes.values()) for layer in page.graphs.layers) == plan.total_bytes
    assert {"decoder 0", "decoder 1"} <= {layer.place for layer in page.graphs.layers}
    assert {bits for layer in page.graphs.layers for bits in layer.bytes} == {e.bits for e in plan.entries.values()}
    bars, widths = sections.bytes_by_layer(page)
    assert widths == sorted(widths)
    assert max(sum(part.share for part in bar.parts) for bar in bars) == pytest.approx(100)
    model = build(open_checkpoint(str(known / "checkpoint")).config)
    units = quantizable_units(model)
    fewer = BitPlan(**{**vars(plan), "entries": dict(list(plan.entries.items())[:1])})
    assert len(layer_bytes(model, units, fewer)) == 1


def test_calls_are_what_the_graphs_ask(known: Path, page: BundlePage) -> None:
    model = build(open_checkpoint(str(known / "checkpoint")).config)
    (graph,) = model.graphs()
    half = page.manifest.generation.max_context // 2
    work = graph_work(model, graph, 1, half, half, planned_names(quantizable_units(model)))
    (step,) = [c for c in page.graphs.calls if c.phase == "decode step"]
    assert step.operations == work.products + 2 * work.attention
    (prompt,) = [c for c in page.graphs.calls if c.phase == "prompt"]
    assert prompt.intensity > step.intensity > 0  # each weight that is read serves all tokens of a prompt


def test_rooflines_have_roofs_bounds_and_rates(page: BundlePage) -> None:
    found = {device: plot for device, plot, _ in plots.rooflines(page)}
    assert set(DEVICES) <= set(found)
    for device in DEVICES:
        styles = {(s.style, s.kind) for s in found[device].series}
        assert {("line", ""), ("points", "counted"), ("points", "predicted")} <= styles
        for series in found[device].series:
            assert all(0 <= p.x <= 100 and 0 <= p.y <= 100 for p in series.points)
        rates = [p for s in found[device].series if s.kind == "predicted" for p in s.points]
        assert all(p.low is not None and p.high is not None and p.low <= p.y <= p.high for p in rates)
    lines = plots.without_roofs(page)
    assert any("devices measure" in line for line in lines) == (
        not any(name.startswith("this machine") for name in found)
    )


def test_reached_rates_are_operations_of_a_token_times_the_rate(page: BundlePage) -> None:
    assert page.profiled is not None
    rows = {r.test: r for r in page.profiled.targets["onnx"].rows}
    reached = {r.test: r for r in page.graphs.reached if r.figure == "measured"}
    assert set(reached) == set(rows) == {"pp4", "tg2", "tg2 @ d3"}
    of_token = {test: r.rate / rows[test].median for test, r in reached.items()}
    assert of_token["tg2 @ d3"] > of_token["tg2"]  # attention over what is before
    assert {r.device for r in page.graphs.reached if r.figure == "predicted"} == set(DEVICES)


def test_every_profile_of_the_library_has_its_roofs() -> None:
    for device in list_profiles():
        for roof in roofs_of(device):
            assert roof.bandwidth is None or roof.bandwidth[0] > 1e8
            assert all(
                peak > 1e8 and kind in ("vendor", "public", "derived", "measured") for peak, kind in roof.peaks.values()
            )
    (gpu,) = [r for r in roofs_of(load("jetson-orin-nano")) if r.kind == "gpu"]
    assert gpu.peaks["int8"][0] > gpu.peaks["fp32"][0]


def test_times_by_layer_are_of_every_layer(page: BundlePage) -> None:
    found = {what: bars for _, what, bars in sections.time_by_layer(page)}
    assert set(found) == {"decoder, a call of the prompt", "decoder, a decode step"}
    for bars in found.values():
        labels = [bar.label for bar in bars]
        assert [label for label in labels if label.startswith("decoder ")] == ["decoder 0", "decoder 1"]
        assert sum(int(bar.value.rpartition(", ")[2][:-1]) for bar in bars) == pytest.approx(100, abs=len(bars))
    assert sections.without_layers(page) == []
    assert page.profiled is not None
    assert page.profiled.targets["onnx"].profiled == {"prompt": 4, "steps": 8}


def test_the_cost_against_the_context(page: BundlePage) -> None:
    plot = plots.context_cost(page)
    assert plot is not None
    bands = [s for s in plot.series if s.style == "band"]
    assert [s.kind for s in bands] == ["predicted"] * len(DEVICES)
    for curve in page.graphs.curves:
        lengths, times = [n for n, *_ in curve.points], [ms for _, ms, _, _ in curve.points]
        assert lengths == sorted(lengths)
        assert times == sorted(times)
        assert all(low < ms < high for _, ms, low, high in curve.points)
    (points,) = [s for s in plot.series if s.kind == "measured"]
    assert len(points.points) == 2


def test_every_rate_says_how_it_was_obtained(page: BundlePage) -> None:
    rates = device_rows.rates(page)
    assert {r.kind for r in rates} == {"measured", "predicted"}
    assert [r.kind for r in rates] == sorted(r.kind for r in rates)
    sheet = device_rows.table(rates)
    assert {row[sheet.head.index("figure")] for row in sheet.rows} <= set(KINDS)
    assert all(r.low is not None and r.rate is not None and r.low <= r.rate for r in rates)
    assert [test for test, _ in device_rows.spans(rates)] == ["pp4", "tg2", "tg2 @ d3"]


def test_the_page_is_whole_and_needs_nothing_else(page: BundlePage) -> None:
    text = page_html(page)
    made = Page(text)
    assert made.sections == [*(name for name, _ in NAV), "kinds"]
    for tag, attributes in made.tags:
        assert tag not in ("img", "iframe", "object", "base", "form")
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert "http" not in text.replace("http-equiv", "")
    assert "@import" not in text
    for kind in KINDS:
        assert made.with_class(f"k-{kind}")


def test_what_is_missing_says_so(copy: Path) -> None:
    shutil.rmtree(copy / "reports")
    text = Page(page_html(bundle_page(copy))).text
    for line in (
        "Not verified",
        "No device was chosen",
        "not measured on this machine",
        "No speed is known",
        "None: no target",
    ):
        assert line in text


HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[31m\u202e'


def test_a_hostile_bundle_injects_nothing(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest |= {"source": HOSTILE, "model_type": HOSTILE, "tools": {HOSTILE: HOSTILE}, "source_fingerprint": HOSTILE}
    entry = manifest["targets"][0]
    entry["ops"]["decoder"][HOSTILE] = 1
    entry["facts"]["vendor_simulated_x"] = {"simulator": HOSTILE, "note": HOSTILE, "programs": {HOSTILE: {HOSTILE: 3}}}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    report = json.loads((copy / "reports" / "profile.json").read_text())
    measured = report["targets"]["onnx"]
    measured["host"]["cpu"] = HOSTILE
    measured["rows"][0]["test"] = HOSTILE
    measured["layers"][HOSTILE] = {HOSTILE: [{"layer": HOSTILE, "ms": 1.0, "calls": 1, "share": 1.0}]}
    measured["ops"][HOSTILE] = [{"op": HOSTILE, "unit": HOSTILE, "ms": 1.0, "calls": 1, "share": 1.0}]
    report["not_measured"] = {HOSTILE: HOSTILE}
    (copy / "reports" / "profile.json").write_text(json.dumps(report))
    for text in (page_html(bundle_page(copy)), passed(edgewright("compare", copy, "-o", "html"))):
        made = Page(text)
        assert [tag for tag, _ in made.tags].count("script") == 1
        assert "img" not in {tag for tag, _ in made.tags}
        assert not any(name.startswith("on") for _, attributes in made.tags for name in attributes)
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "alert(1)" in made.text  # it is shown, as text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("profile", {"targets": {"onnx": {"rows": [], "layers": 3}}}),
        ("verify", {"targets": 3}),
        ("devices", {"devices": [1]}),
    ],
)
def test_a_damaged_report_is_refused(copy: Path, name: str, content: Any) -> None:
    (copy / "reports" / f"{name}.json").write_text(json.dumps(content))
    given = ("--device", DEVICES[0], "-p", 4, "-n", 2, "-o", "html")
    assert "again" in refused(edgewright("profile", copy, *given))


def test_a_file_by_its_ending(known: Path, tmp_path: Path) -> None:
    given = ("--device", DEVICES[0], "-p", 4, "-n", 2, "-o")
    for ending in ("html", "csv", "json", "md"):
        done = edgewright("profile", known, *given, tmp_path / f"report.{ending}")
        assert passed(done) == ""
        assert "wrote" in done.stderr
    assert Page((tmp_path / "report.html").read_text()).sections[0] == "about"
    assert json.loads((tmp_path / "report.json").read_text())["kind"] == "predicted"
    assert "no file whose name ends" in refused(edgewright("profile", known, *given, tmp_path / "report.docx"))


def test_a_model_that_was_not_compiled_has_a_page_of_predictions(known: Path) -> None:
    asked = ("profile", "-m", known / "checkpoint", "--device", DEVICES[0], "-p", 4, "-n", 2, "-o")
    made = Page(passed(edgewright(*asked, "html")))
    assert made.sections == ["devices", "memory", "kinds"]
    rows = json.loads(passed(edgewright(*asked, "json")))["rows"]
    assert rows
    for row in rows:
        assert {row["device"], row["target"], row["unit"], row["test"]} <= set(made.cells)


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    compiler.export(asking("helpers.user_modules:speech", bits=6.0), tmp_path / "bundle")
    passed(edgewright("profile", tmp_path / "bundle", "-r", 1, "-o", tmp_path / "page.html"))
    made = Page((tmp_path / "page.html").read_text())
    assert made.sections == [*(name for name, _ in NAV), "kinds"]
    assert "the layers of a module of your own are not known" in made.text
    assert "calls a second" in made.text
