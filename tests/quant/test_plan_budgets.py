"""200 random models and budgets: the best plan by exhaustive dynamic programming beside what the allocator gives."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from helpers.random_plans import Random, random_case

from edgewright.errors import UserError
from edgewright.quant.allocator import allocate, expected_loss
from edgewright.quant.plan import Budget


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
    return allocate(made.problem, Budget.of(**budget))  # type: ignore[arg-type]


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
