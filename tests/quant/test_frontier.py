"""The frontier and its baseline: uniform plans by hand, which plan wins, and what the commands print and draw."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import tiny
from helpers.random_plans import random_case
from helpers.requests import asking

from edgewright.cli import main
from edgewright.errors import UserError
from edgewright.pipeline.plan import plan
from edgewright.pipeline.planned import Planned
from edgewright.quant.allocator import Problem, allocate, expected_loss
from edgewright.quant.frontier import better, frontier, uniform
from edgewright.quant.overrides import Override
from edgewright.quant.plan import Budget, Choice, Unit, WeightSpec
from edgewright.reports import plan as plan_report
from edgewright.reports import plots

UNITS = [Unit(f"u{i}", [WeightSpec(f"u{i}.weight", (64, 256), i, "decoder")]) for i in range(6)]
PROBLEM = Problem(UNITS, {unit.name: 1.0 + 3 * i for i, unit in enumerate(UNITS)}, groups=(32, 64, 128))
needs_problem = pytest.mark.skipif(
    "problem" not in {f.name for f in fields(Planned)}, reason="a Planned without its problem has no frontier"
)


def choices(plan: object) -> set[tuple[int, int]]:
    return {(entry.bits, entry.group_size) for entry in plan.entries.values()}  # type: ignore[attr-defined]


def test_uniform_is_the_best_single_choice_within_the_budget() -> None:
    cases = {2.125: (2, 128), 3.1: (2, 32), 4.49: (4, 64), 4.5: (4, 32), 5.0: (4, 32), 8.0625: (8, 256)}
    for bits, choice in cases.items():
        plan = uniform(PROBLEM, Budget("bits", bits))
        assert plan is not None
        assert plan.average_bits <= bits
        if bits != 3.1:
            assert choices(plan) == {choice}, bits
        else:
            assert choices(plan) == {(2, 32)} or plan.entries["u0.weight"].bits == 2  # 3 bits cost 3.125 and more
        assert plan.validate(UNITS) == plan


def test_overrides_and_odd_shapes_stay_what_they_must_be() -> None:
    odd = Unit("odd", [WeightSpec("odd.weight", (10, 13), None, "decoder")])  # only whole bytes fit 13 inputs
    kept = Unit("gate", [WeightSpec("gate.weight", (16, 64), 0, "decoder")])
    units = [*UNITS, odd, kept]
    problem = Problem(units, {unit.name: 1.0 for unit in units}, overrides=[Override("^gate", 16)])
    plan = uniform(problem, Budget("bits", 5.0))
    assert plan is not None
    assert (plan.entries["odd.weight"].bits, plan.entries["gate.weight"].bits) == (8, 16)
    assert len({plan.entries[f"u{i}.weight"].bits for i in range(6)}) == 1
    assert plan.entries["gate.weight"].why == "override ^gate"


def test_no_uniform_plan_where_none_is_that_small() -> None:
    wide = Unit("wide", [WeightSpec("wide.weight", (64, 256), None, "decoder")])
    narrow = Unit("narrow", [WeightSpec("narrow.weight", (64, 256), None, "decoder")])
    losses = {
        "wide": {Choice(2, 64): 1.0, Choice(4, 64): 0.1},
        "narrow": {Choice(3, 64): 1.0, Choice(8, 0): 0.1},
    }
    problem = Problem([wide, narrow], {"wide": 1.0, "narrow": 1.0}, losses=losses)
    floor = Budget("bits", (2.25 + 3.25) / 2)
    assert allocate(problem, floor).average_bits == floor.value
    found = uniform(problem, floor)
    assert found is not None  # 2 bits, and the next larger where there is no 2
    assert choices(found) == {(2, 64), (3, 64)}
    assert better(found, None, [wide, narrow]) is found


@pytest.mark.parametrize("seed", range(20))
def test_the_frontier_of_random_models(seed: int) -> None:
    problem = random_case(seed).problem
    found = frontier(problem, points=5)
    sizes = [point.plan.total_bytes for point in found.points]
    losses = [point.loss for point in found.points]
    assert sizes == sorted(set(sizes))
    assert losses == sorted(losses, reverse=True)
    for point in found.points:
        assert point.plan.validate(problem.units) == point.plan
        assert point.plan.total_bytes + problem.other_bytes <= point.plan.budget.value
        if point.uniform is not None:
            assert point.uniform.total_bytes + problem.other_bytes <= point.plan.budget.value
            assert point.uniform_loss == expected_loss(point.uniform, problem.units)
            assert point.loss <= point.uniform_loss * (1 + 1e-9)
            assert better(point.plan, point.uniform, problem.units) is point.plan or point.loss > point.uniform_loss


def test_the_points_asked_for_are_among_them() -> None:
    found = frontier(PROBLEM, points=3, asked=[Budget("bits", 4.3)])
    assert len(found.points) == 4
    assert any(4.2 < point.plan.average_bits <= 4.3 for point in found.points)
    ends = found.points[0].plan.average_bits, found.points[-1].plan.average_bits
    assert ends == (2.125, 8.0625)
    with pytest.raises(UserError, match="below the floor"):
        frontier(PROBLEM, points=2, asked=[Budget("bits", 1.0)])
    with pytest.raises(UserError, match="at least 2"):
        frontier(PROBLEM, points=1)
    with pytest.raises(UserError, match="leave out --latency"):
        frontier(PROBLEM, points=2, asked=[Budget("latency", 1.0)])


def test_measured_losses_win_over_predicted_ones() -> None:
    budget = Budget("bits", 4.25)
    plan, even = allocate(PROBLEM, budget), uniform(PROBLEM, budget)
    assert even is not None
    assert expected_loss(plan, UNITS) < expected_loss(even, UNITS)
    assert better(plan, even, UNITS) is plan
    assert better(even, plan, UNITS) is plan
    assert better(plan, even, UNITS, (0.031, 0.030)) is even
    assert better(plan, even, UNITS, (0.030, 0.030)) is plan
    with pytest.raises(UserError, match="not finite"):
        better(plan, even, UNITS, (float("nan"), 0.030))


def test_table_json_and_plot(tmp_path: Path) -> None:
    found = frontier(PROBLEM, points=4)
    table = plan_report.frontier_text(found)
    assert "uniform" in table
    assert "without data" in table
    assert len([line for line in table.splitlines() if "kB" in line]) == 4
    value = json.loads(json.dumps(plan_report.frontier_json(found)))
    assert [p["total_bytes"] for p in value["points"]] == [p.plan.total_bytes for p in found.points]
    assert value["points"][0]["uniform"]["choice"] == "2 bits, group 128"
    pytest.importorskip("matplotlib")
    for ending in ("svg", "png"):
        plots.plot_frontier(found, "tiny", tmp_path / f"frontier.{ending}")
        assert (tmp_path / f"frontier.{ending}").stat().st_size > 1000
    assert "<path" in (tmp_path / "frontier.svg").read_text()
    with pytest.raises(UserError, match=r"must end in \.png"):
        plots.plot_frontier(found, "tiny", tmp_path / "frontier.txt")


def test_losses_a_linear_are_shown_where_they_were_measured(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model", tiny.LLAMA)
    planned = plan(asking(str(folder), bits=5.0, importance="uniform"))
    assert "nats" not in plan_report.plan_text(planned)
    entries = {name: replace(e, loss=0.001 * (1 + i)) for i, (name, e) in enumerate(planned.plan.entries.items())}
    planned = replace(planned, plan=replace(planned.plan, entries=entries))
    shown = plan_report.plan_text(planned)
    total = sum(entry.loss or 0.0 for entry in entries.values())
    assert f"predicted loss of the plan: {total:.4g} nats a token" in shown
    headed = shown[shown.index("predicted loss, nats a token") :].splitlines()[1:5]
    assert any("down_proj" in line for line in headed), headed
    written = plan_report.plan_json(planned)["entries"]
    assert {entry["loss"] for entry in written.values()} == {entry.loss for entry in entries.values()}
    pytest.importorskip("matplotlib")
    plots.plot_plan(planned, tmp_path / "plan.svg")
    assert (tmp_path / "plan.svg").stat().st_size > 1000


@needs_problem
def test_the_command_prints_and_draws_the_frontier(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tiny.write(tmp_path / "model", tiny.LLAMA)
    asked = ["plan", "-m", str(folder), "--bits", "5", "--frontier", "--json", "--plot", str(tmp_path / "f.svg")]
    ran = CliRunner().invoke(main, asked)
    assert ran.exit_code == 0, ran.output
    points = json.loads(ran.stdout)["points"]
    assert len(points) >= 10
    assert any(4.9 < p["average_bits"] <= 5 for p in points)
    assert (tmp_path / "f.svg").exists()


@needs_problem
def test_the_command_takes_a_latency(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model", tiny.LLAMA)
    device = ["--device", "samsung-galaxy-s25"]
    refused = CliRunner().invoke(main, ["plan", "-m", str(folder), "--latency", "5s", *device])
    assert refused.exit_code == 2
    assert "a decode step of 5000 ms is above the ceiling" in refused.output
    ceiling = refused.output.split(" ms to ")[1].split(" ms")[0]
    ran = CliRunner().invoke(main, ["plan", "-m", str(folder), "--latency", f"{float(ceiling) * 0.9:.6f}ms", *device])
    assert ran.exit_code == 0, ran.output
    assert "predicted decode step on samsung-galaxy-s25" in ran.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frontier", "-o", "p.json"], "--frontier is many plans and -o writes one"),
        (["--frontier", "--plan", "p.json"], "--frontier makes its own plans"),
        (["--latency", "40ms"], "--device says which"),
        (["--device", "host"], "--device says which"),
        (["--latency", "40ms", "--device", "host", "--bits", "4"], "--bits and --latency are budgets"),
        (["--latency", "40 minutes", "--device", "host"], "is not a time; write 40ms or 1.5s"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], message: str) -> None:
    ran = CliRunner().invoke(main, ["plan", "-m", "nowhere", *options])
    assert ran.exit_code == 2
    assert message in ran.output
    assert ran.output.count("\n") == 1
