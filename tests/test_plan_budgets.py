"""200 random models and budgets: the best plan by exhaustive dynamic programming beside what the allocator gives."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest

from edgewright.errors import UserError
from edgewright.ops.packing import period
from edgewright.quant.allocate import Override, Problem, allocate, expected_error, expected_loss
from edgewright.quant.plan import Unit, WeightSpec, weight_bytes
from edgewright.quant.rtn import effective_group
from edgewright.quant.targets import legal_choices, legal_group, signed_scales

WIDTHS = ((2, 3, 4, 5, 6, 8), (2, 4, 8), (3, 4, 6, 8), (4, 8), (4, 5, 6, 8, 16), (2, 3, 4))
GROUPS = ((32, 64, 128), (16, 32), (64,), (0,), (32, 128, 0))
TARGETS = ((), (), ("onnx",), ("executorch",), ("coreml",), ("tensorrt",), ("onnx", "qnn"), ("onnx", "executorch"))


@dataclass
class Random:
    """A random model of 4 to 60 units: fused ones, an embedding that stands for a tied head too, some overridden."""

    problem: Problem
    rows: list[list[tuple[int, float]]]  # of each unit (bytes, loss) of all it could take

    @property
    def ends(self) -> tuple[int, int]:
        """Bytes of the smallest plan, and of the one of least loss with fewest bytes."""
        best = [min(row, key=lambda option: (option[1], option[0])) for row in self.rows]
        return sum(min(b for b, _ in row) for row in self.rows), sum(b for b, _ in best)


def random_case(seed: int) -> Random:
    chance = random.Random(seed)
    wide = [32, 48, 64, 96, 128, 160, 256]
    units = [Unit("embed", [WeightSpec("embed.weight", (chance.randrange(40, 200), chance.choice(wide)), None, "x")])]
    for layer in range(chance.choice([1, 1, 2, 3, 5, 8, 14])):
        columns = chance.choice(wide)
        fused = [WeightSpec(f"l.{layer}.{p}", (chance.randrange(1, 40), columns), layer, "x") for p in "qkv"]
        units.append(Unit(f"l.{layer}.qkv", fused))
        for part in ("o", "up", "down"):
            shape = (chance.randrange(1, 80), chance.choice(wide))
            units.append(Unit(f"l.{layer}.{part}", [WeightSpec(f"l.{layer}.{part}", shape, layer, "x")]))
    overrides = []
    if chance.random() < 0.4:
        overrides.append(Override("^embed", chance.choice([8, 16])))
    if chance.random() < 0.3:
        overrides.append(Override(r"l\.0\..*", chance.choice([4, 8])))
    scores = {unit.name: chance.choice([1.0, 4.0, chance.uniform(0.5, 16)]) for unit in units}
    widths, groups, targets = chance.choice(WIDTHS), chance.choice(GROUPS), chance.choice(TARGETS)
    widths = (*widths, 8) if 8 not in widths else widths  # so that every shape has a choice
    problem = Problem(units, scores, chance.randrange(5000), widths, groups, overrides, targets)
    return Random(problem, [possible(problem, unit) for unit in units])


def possible(problem: Problem, unit: Unit) -> list[tuple[int, float]]:
    """By the tables of widths and targets alone: (bytes, loss) of every choice of the unit."""
    override = next((o for o in problem.overrides if any(re.search(o.regex, w.name) for w in unit.weights)), None)
    widths = problem.widths if override is None else (override.bits,)
    found = []
    for bits, wanted in legal_choices(problem.targets, widths, problem.groups):
        sized = [(w, w.shape[1] if bits == 16 else effective_group(w.shape[1], wanted)) for w in unit.weights]
        if bits != 16 and any(
            w.shape[1] % period(bits)
            or not (group == w.shape[1] or all(legal_group(target, bits, group) for target in problem.targets))
            for w, group in sized
        ):
            continue
        loss = sum(w.numel * expected_error(bits, group, signed_scales(problem.targets)) for w, group in sized)
        found.append((sum(weight_bytes(w, bits, group) for w, group in sized), problem.scores[unit.name] * loss))
    assert found
    return found


def least_losses(rows: list[list[tuple[int, float]]], room: int) -> np.ndarray:
    """The least loss of a plan of exactly so many bytes, for 0 … room bytes; infinite where there is none."""
    least = np.full(room + 1, np.inf)
    least[0] = 0.0
    for row in rows:
        after = np.full(room + 1, np.inf)
        for cost, loss in row:
            if cost <= room:
                np.minimum(after[cost:], least[: room + 1 - cost] + loss, out=after[cost:])
        least = after
    return least


def within(made: Random, kind: str, room: int) -> dict[str, float | int]:
    """The budget, spelt in bits (rounded down to 6 digits) or as a size, that leaves `room` bytes at most."""
    if kind == "size":
        return {"size": room + made.problem.other_bytes}
    return {"bits": math.floor(Fraction(room * 8 * 10**6, made.problem.numel)) / 10**6}


def solve(made: Random, budget: dict[str, float | int]):  # type: ignore[no-untyped-def]
    p = made.problem
    return allocate(
        p.units,
        p.scores,
        **budget,  # type: ignore[arg-type]
        other_bytes=p.other_bytes,
        widths=p.widths,
        groups=p.groups,
        overrides=p.overrides,
        targets=p.targets,
    )


@pytest.mark.parametrize("part", range(8))
def test_random_models_and_budgets(part: int) -> None:
    for seed in range(25 * part, 25 * part + 25):
        made, chance = random_case(seed), random.Random(-seed)
        kind = chance.choice(["bits", "size"])
        floor, ceiling = made.ends
        room = int(floor + chance.random() * (ceiling - floor))
        if kind == "bits":
            asked = within(made, kind, room)["bits"]
            spelt = math.floor(Fraction(str(asked)) * made.problem.numel / 8)
            kind, room = ("bits", spelt) if spelt >= floor else ("size", room)  # rounded down below the floor
        budget = {"bits": asked} if kind == "bits" else within(made, kind, room)
        plan = solve(made, budget)
        assert plan.total_bytes <= room
        assert plan.validate(made.problem.units) == plan
        if kind == "bits":
            assert plan.average_bits <= budget["bits"]
        least = least_losses(made.rows, room)
        loss = expected_loss(plan, made.problem.units)
        assert loss == pytest.approx(float(least.min()), rel=1e-8), seed
        near = float(least[math.ceil(0.99 * room) :].min())
        if math.isfinite(near) and plan.total_bytes < 0.99 * room:
            assert near > loss, seed  # there are plans within 1 %, and each is worse


def test_a_model_of_many_units_lands_within_one_percent() -> None:
    for seed in range(2000, 2040):
        made = random_case(seed)
        if len(made.rows) < 30:
            continue
        floor, ceiling = made.ends
        for where in (0.1, 0.5, 0.9):
            room = int(floor + where * (ceiling - floor))
            near = least_losses(made.rows, room)[math.ceil(0.99 * room) :]
            if math.isfinite(float(near.min())):
                assert solve(made, within(made, "size", room)).total_bytes >= 0.99 * room, (seed, where)


@pytest.mark.parametrize("kind", ["bits", "size"])
def test_impossible_budgets_are_refused_with_both_ends(kind: str) -> None:
    for seed in range(40):
        made = random_case(seed)
        floor, ceiling = made.ends
        with pytest.raises(UserError, match=rf"below the floor: .*\({floor + made.problem.other_bytes} bytes") as low:
            solve(made, within(made, kind, floor - 1))
        assert f"{ceiling + made.problem.other_bytes} bytes" in str(low.value)
        with pytest.raises(UserError, match="above the ceiling"):
            solve(made, within(made, kind, ceiling + max(1000, made.problem.numel // 1000)))
