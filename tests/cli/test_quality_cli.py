"""The options of quality and memory as a user types them, on the trained examples: to a verified bundle, or one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.cli_runner import edgewright
from helpers.requests import asking

from edgewright.pipeline import allocate

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SEQ2SEQ, HYBRID, MEMORY = EXAMPLES / "t5gemma-g2p", EXAMPLES / "deltanet-g2p", EXAMPLES / "dolphin-packages"


SLOW = [pytest.param(path, marks=pytest.mark.slow) for path in (HYBRID, MEMORY)]


@pytest.mark.slow
@pytest.mark.parametrize("model", [SEQ2SEQ, *SLOW], ids=lambda p: p.name)
def test_auto_with_data_is_fisher_and_is_compared_with_uniform(model: Path) -> None:
    asked = ("--bits", "3.6", "--widths", "2,3,4,8", "--group-size", "64", "--num-layers", 2, "--json")
    done = edgewright("plan", "-m", model, "--task", model / "task.tsv", *asked)
    assert done.exit_code == 0, done.stderr
    assert "importance: fisher, as there are calibration data" in done.stderr
    assert "rounded to nearest: " in done.stderr
    found = json.loads(done.stdout)
    assert found["average_bits"] <= 3.6
    assert len({e["bits"] for e in found["entries"].values()} - {16}) > 1
    assert any(e.get("quantizer") == "gptq" for e in found["entries"].values())
    measured = found["baseline"]
    taken = min(measured["planned"], measured["uniform"])
    assert 0.0 < taken < 10.0


def gates(*options: Any) -> tuple[set[int], str]:
    """The bits of the hybrid's gates and decays in a plan, and what the command says."""
    done = edgewright("plan", "-m", HYBRID, "--bits", "4", "--group-size", "64", "--json", *options)
    assert done.exit_code == 0, done.stderr
    entries = json.loads(done.stdout)["entries"]
    return {e["bits"] for n, e in entries.items() if "in_proj_a" in n or "in_proj_b" in n}, done.stderr


@pytest.mark.slow
def test_gates_keep_16_bits_unless_8_are_measured_to_cost_nothing() -> None:
    assert gates("--importance", "zd")[0] == {16}
    found, said = gates("--task", HYBRID / "task.tsv", "--importance", "fisher")
    assert found == {8}
    assert "8 of 8 gates and decays get 8 bits: that costs each 1e-06 nats at most" in said


@pytest.mark.slow
def test_gates_follow_overrides_widths_and_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = ("--task", HYBRID / "task.tsv", "--importance", "fisher")
    assert gates(*measured, "--override", "in_proj_[ab]=4:64")[0] == {4}
    assert gates(*measured, "--widths", "2,4")[0] == {16}
    assert gates(*measured, "--widths", "4,8", "--bits", "8.09")[0] == {16}  # above what 8 bits for all can take
    monkeypatch.setattr(allocate, "GATE_LOSS", 1e-9)  # above what some of this model's cost
    assert gates(*measured)[0] == {8, 16}


@pytest.mark.slow
def test_measured_divergence_is_the_same_for_any_number_of_workers() -> None:
    plans = []
    for workers in (1, 2):
        asked = ("--importance", "kl", "--bits", 4, "--num-layers", 1, "--workers", workers, "--json")
        done = edgewright("plan", "-m", SEQ2SEQ, "--task", SEQ2SEQ / "task.tsv", *asked)
        assert done.exit_code == 0, done.stderr
        plans.append(json.loads(done.stdout)["entries"])
    assert plans[0] == plans[1]


@pytest.mark.slow
def test_the_frontier_is_below_uniform(tmp_path: Path) -> None:
    plot = tmp_path / "frontier.svg"
    done = edgewright(
        "plan",
        "-m",
        SEQ2SEQ,
        "--num-layers",
        2,
        "--task",
        SEQ2SEQ / "task.tsv",
        "--frontier",
        "--group-size",
        "64",
        "--plot",
        plot,
        "--json",
    )
    assert done.exit_code == 0, done.stderr
    points = json.loads(done.stdout)["points"]
    assert len(points) > 5
    for point in points:
        even = point["uniform"]
        assert even is None or point["predicted_loss"] <= even["predicted_loss"] * (1 + 1e-9)
    assert plot.read_text().lstrip().startswith("<?xml")


@pytest.mark.slow
@pytest.mark.parametrize("model", [SEQ2SEQ, SLOW[-1]], ids=lambda p: p.name)
def test_int8_caches_through_export_verify_and_run(model: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    done = edgewright("export", "-m", model, "--kv-cache", "int8", "--max-context", "64", "-o", bundle)
    assert done.exit_code == 0, done.stderr
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["kv_cache"] == "int8"
    decoder = next(g for g in manifest["graphs"] if g["name"] == "decoder")
    kinds = {s["dtype"] for s in decoder["states"] if "cache" in s["name"] and not s["name"].endswith("_scale")}
    assert kinds == {"int8"}
    done = edgewright("verify", bundle, "-m", model)
    assert done.exit_code == 0, done.stdout
    prompt = (model / "task.tsv").read_text().splitlines()[0].split("\t")[-2]
    assert edgewright("run", bundle, "--prompt", prompt).exit_code == 0


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--kv-cache", "int8", "--format", "coreml"), "--kv-cache int8: coreml keeps float caches"),
        (("--quantizer", "gptq"), "gptq needs data: give --calibration FILE"),
        (("--importance", "fisher"), "--importance fisher needs --calibration TEXT or --task FILE"),
        (("--memory-limit", "100m"), "--memory-limit 0.09 GiB is too little"),
        (("--memory-limit", "lots"), "is not a size"),
        (("--cluster", "ray://host:10001"), "--cluster needs --workers N as well"),
        pytest.param(
            ("--cluster", "nowhere", "--workers", 2, "--task", SEQ2SEQ / "task.tsv"),
            "--cluster nowhere cannot be reached",
            marks=pytest.mark.slow,  # ray takes its time to say so
        ),
    ],
)
def test_what_cannot_be_had_is_one_line(options: tuple[Any, ...], line: str, tmp_path: Path) -> None:
    done = edgewright("export", "-m", SEQ2SEQ, "--no-verify", *options, "-o", tmp_path / "bundle")
    assert done.exit_code == 2
    assert line in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_plan_with_negative_scales_is_refused_where_they_are_not_held(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert edgewright("plan", "-m", HYBRID, "--bits", "4", "--importance", "zd", "-o", file).exit_code == 0
    assert '"signed": true' in file.read_text()
    done = edgewright("export", "-m", HYBRID, "--plan", file, "--format", "executorch", "-o", tmp_path / "bundle")
    assert done.exit_code == 2
    line = 'may be negative ("signed"), which executorch does not hold; plan for the same --format'
    assert line in done.stderr.splitlines()[-1]
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_a_checkpoint_with_negative_scales_is_not_lowered_where_they_are_not_held(tmp_path: Path) -> None:
    from edgewright.compiler import export
    from edgewright.errors import UserError
    from edgewright.exporters.artefact import Options
    from edgewright.pipeline.lower import lower

    export(asking(str(HYBRID), bits=4.0, importance="zd", max_context=64, verify=False), tmp_path / "bundle")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"--format executorch: .* has negative scales, which it does not hold"):
        lower("executorch", tmp_path / "bundle" / "checkpoint", tmp_path / "out", Options(64), lambda _: None)
    assert list((tmp_path / "out").iterdir()) == []
