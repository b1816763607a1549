"""Quality against bytes: the best plan of each of many budgets, and the best uniform one beside it.

A uniform plan gives every weight the same bits and group size, except for overrides. A plan must beat it, so it is always computed
from the same choices, targets and losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError
from .allocator import Offer, Problem, capacity, ends, expected_loss, offers, plan_of
from .knapsack import Option, solve, undominated
from .plan import BitPlan, Budget, Choice, Unit

POINTS = 12


@dataclass(frozen=True)
class Point:
    """One budget: the best plan within it, and the best uniform one, None where no single choice is that small.

    loss, uniform_loss: predicted, in the allocator's measure.
    """

    plan: BitPlan
    loss: float
    uniform: BitPlan | None
    uniform_loss: float | None


@dataclass(frozen=True)
class Frontier:
    """The points by rising bytes. measured: whether losses come from calibration (nats a token), not from expected errors."""

    points: tuple[Point, ...]
    measured: bool


def frontier(problem: Problem, points: int = POINTS, asked: Sequence[Budget] = ()) -> Frontier:
    """Plans at `points` budgets, equal steps of bytes from the floor to the ceiling, and at the budgets `asked` for.

    Raises UserError as `allocate` does, and for fewer than 2 points.
    """
    if points < 2:
        raise UserError(f"a frontier of {points} points has no ends; give at least 2")
    offered = offers(problem)
    tables = [undominated(offer.options) for offer in offered]
    floor, ceiling = ends(tables)
    steps = sorted({floor + (ceiling - floor) * i // (points - 1) for i in range(points)})
    budgets = [Budget("size", float(room + problem.other_bytes)) for room in steps]
    by_cost: dict[tuple[int, float], Point] = {}
    for budget in [*budgets, *asked]:
        if budget.kind == "latency":
            raise UserError("the frontier is of bytes; leave out --latency")
        room = capacity(problem, budget, tables)
        plan = plan_of(problem, offered, solve(tables, room), budget)
        even = _uniform(problem, offered, room, budget)
        loss = expected_loss(plan, problem.units)
        even_loss = None if even is None else expected_loss(even, problem.units)
        by_cost.setdefault((plan.total_bytes, loss), Point(plan, loss, even, even_loss))
    return Frontier(tuple(by_cost[key] for key in sorted(by_cost)), problem.losses is not None)


def uniform(problem: Problem, budget: Budget) -> BitPlan | None:
    """The plan of least predicted loss within `budget` that gives all weights one choice; None where none is that small.

    Weights that an override decides keep its choice. A weight that the choice does not fit takes the next larger that it can
    have. Raises UserError as `allocate` does.
    """
    offered = offers(problem, budget.kind == "latency")
    tables = [undominated(offer.options) for offer in offered]
    return _uniform(problem, offered, capacity(problem, budget, tables), budget)


def better(
    plan: BitPlan, even: BitPlan | None, units: Sequence[Unit], measured: tuple[float, float] | None = None
) -> BitPlan:
    """The one of the two plans that loses less; `plan` where they are equal.

    measured: the losses of the two on data, such as mean KL. Without them the predicted losses count. Raises UserError when a
    measured one is not finite.
    """
    if even is None:
        return plan
    if measured is not None and not all(math.isfinite(loss) for loss in measured):
        raise UserError(f"measured losses {measured[0]} and {measured[1]}: not finite, so neither plan is the better")
    ours, theirs = measured or (expected_loss(plan, units), expected_loss(even, units))
    return even if theirs < ours else plan


def _uniform(problem: Problem, offered: Sequence[Offer], room: int, budget: Budget) -> BitPlan | None:
    best: tuple[float, int, list[Option]] | None = None
    for choice in _choices(offered):
        nearest = [_nearest(offer, choice) for offer in offered]
        cost, loss = sum(option.cost for option in nearest), math.fsum(option.loss for option in nearest)
        if cost <= room and (best is None or (loss, cost) < best[:2]):
            best = loss, cost, nearest
    return None if best is None else plan_of(problem, offered, best[2], budget)


def _choices(offered: Sequence[Offer]) -> list[Choice]:
    """What some unit that no override decides could take; of all units where overrides decide every one."""
    free = [offer for offer in offered if not offer.forced] or list(offered)
    return list(dict.fromkeys(option.choice for offer in free for option in offer.options))


def _nearest(offer: Offer, choice: Choice) -> Option:
    """The unit's option that is nearest to the choice: the same, then one of the same group and quantizer, then the next larger."""

    def distance(option: Option) -> tuple[bool, int, bool, bool, int]:
        other = option.choice
        narrower = other.bits < choice.bits
        return (
            narrower,
            abs(other.bits - choice.bits),
            other.group_size != choice.group_size,
            other.quantizer != choice.quantizer,
            option.cost,
        )

    return min(offer.options, key=distance)
