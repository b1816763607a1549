"""The multiple-choice knapsack: an option for each unit, the least total loss within a budget, solved exactly by HiGHS.

Costs are integers (bytes, or picoseconds), so whether a plan fits is never a question of rounding.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..errors import UserError
from .plan import Choice

_SOLVER_SECONDS = 60.0
_CORE_OPTIONS = 48
_LOSS_RANGE = 1e4
_COST_RANGE = 100.0


@dataclass(frozen=True)
class Option:
    """One choice a unit may take. cost: in the budget's unit, bytes or picoseconds. loss: predicted."""

    choice: Choice
    bytes: int
    cost: int
    loss: float


def undominated(options: Sequence[Option]) -> list[Option]:
    """The options that no cheaper one equals or betters, cheapest first: costs rise and losses fall, both strictly."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.loss, o.bytes, -o.choice.group_size)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def solve(options: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    """The option of each unit that minimises the total loss within `budget` (the floor is within it).

    options: of each unit its `undominated` ones. Raises UserError when no plan was proved best in time.
    """
    # Units with the same options are interchangeable: they have one integer count per option. With a binary for each unit
    # and option, branch and bound would try their permutations.
    classes: dict[tuple[tuple[int, float], ...], list[int]] = defaultdict(list)
    for index, rows in enumerate(options):
        classes[tuple((o.cost, o.loss) for o in rows)].append(index)
    members = list(classes.values())
    tables = [options[indices[0]] for indices in members]
    counts = [len(indices) for indices in members]
    picks = _solve_core(tables, counts, budget)
    chosen: dict[int, Option] = {}
    for indices, table, pick in zip(members, tables, picks, strict=True):
        # within a class the earlier units, in the model's order, get more bits
        best_first = [option for option, n in zip(reversed(table), reversed(pick), strict=True) for _ in range(n)]
        chosen.update(zip(indices, best_first, strict=True))
    return [chosen[index] for index in range(len(options))]


def _solve_core(tables: Sequence[Sequence[Option]], counts: Sequence[int], budget: int) -> list[list[int]]:
    """`_solve_counts` over the options that can be part of an optimum, which are few.

    With the linear relaxation's price of cost, an option's reduced cost says by how much any plan that uses it must exceed the
    relaxation's loss. The options of least reduced cost are solved first. Only options below the remaining gap can still improve
    the result: where some of these were not among the first, it is solved again with them.
    """
    price = _price(tables, counts, budget)
    lagrangian = [[option.loss + price * option.cost for option in table] for table in tables]
    least = [min(row) for row in lagrangian]
    reduced = [[value - low for value in row] for row, low in zip(lagrangian, least, strict=True)]
    bound = math.fsum(n * low for n, low in zip(counts, least, strict=True)) - price * budget
    ranked = sorted(cost for row in reduced for cost in row)
    limit = ranked[min(len(ranked), len(tables) + _CORE_OPTIONS) - 1]
    slack = 1e-12 * abs(bound)  # rounding in the sums above; too many options do no harm
    while True:
        core = [[j for j, cost in enumerate(row) if cost <= limit + slack] for row in reduced]
        solved = _solve_counts(
            [[t[j] for j in keep] for t, keep in zip(tables, core, strict=True)], counts, budget, price
        )
        picks = [[0] * len(table) for table in tables]
        for pick, keep, values in zip(picks, core, solved, strict=True):
            for j, n in zip(keep, values, strict=True):
                pick[j] = n
        loss = math.fsum(
            n * o.loss for t, pick in zip(tables, picks, strict=True) for o, n in zip(t, pick, strict=True)
        )
        if loss - bound <= limit + slack or limit >= ranked[-1]:
            return picks
        limit = loss - bound


def _price(tables: Sequence[Sequence[Option]], counts: Sequence[int], budget: int) -> float:
    """The linear relaxation's price of cost: the rate of the convex step at which the greedy upgrade ends."""
    steps: list[tuple[float, int]] = []
    spent = 0
    for table, n in zip(tables, counts, strict=True):
        spent += n * table[0].cost
        hull: list[Option] = []
        for option in table:
            while len(hull) > 1 and _rate(hull[-2], hull[-1]) <= _rate(hull[-1], option):
                hull.pop()
            hull.append(option)
        steps += [(_rate(low, high), n * (high.cost - low.cost)) for low, high in pairwise(hull)]
    for rate, cost in sorted(steps, reverse=True):
        spent += cost
        if spent > budget:
            return rate
    return 0.0


def _rate(low: Option, high: Option) -> float:
    return (low.loss - high.loss) / (high.cost - low.cost)


def _solve_counts(
    tables: Sequence[Sequence[Option]], counts: Sequence[int], budget: int, price: float
) -> list[list[int]]:
    """How many units of each class take each option: an integer program with a row a class and one for the cost.

    The solver's tolerances and its smallest gap are absolute, about 1e-6. So costs and losses are counted from the relaxation's
    choice of each class and scaled: against the differences that are compared, the tolerances are then nothing.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    base = [min(table, key=lambda o: (o.loss + price * o.cost, o.cost)) for table in tables]
    owner = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    extra = np.array([o.cost - b.cost for table, b in zip(tables, base, strict=True) for o in table], dtype=np.int64)
    loss = np.array([o.loss - b.loss for table, b in zip(tables, base, strict=True) for o in table])
    capacity = budget - sum(n * b.cost for n, b in zip(counts, base, strict=True))
    cost_scale = _COST_RANGE / max(int(np.abs(extra).max()), 1)
    variables = np.arange(len(owner))
    assignment = csr_array((np.ones(len(owner)), (owner, variables)), shape=(len(tables), len(owner)))
    allowed = capacity
    while True:
        with _silent_standard_output():
            result = milp(
                loss * (_LOSS_RANGE / max(float(np.abs(loss).max()), 1e-300)),
                integrality=np.ones(len(owner), dtype=np.uint8),
                bounds=Bounds(0, np.asarray(counts, dtype=np.float64)[owner]),
                constraints=[
                    LinearConstraint(assignment, counts, counts),
                    LinearConstraint(csr_array(extra[np.newaxis] * cost_scale), -np.inf, allowed * cost_scale),
                ],
                options={"mip_rel_gap": 0.0, "time_limit": _SOLVER_SECONDS},
            )
        if result.x is not None and result.status != 0:
            raise UserError(
                f"the allocator proved no plan best within {_SOLVER_SECONDS:g} s; give fewer --widths or a --group-size"
            )
        if result.x is None:
            raise UserError(f"the allocator found no plan for this budget ({result.message}); change the budget a bit")
        taken = np.rint(result.x).astype(np.int64)
        excess = int(taken @ extra) - capacity
        if excess <= 0:
            break
        allowed -= excess  # within the solver's tolerance but over the budget: allow that much less
    ends = np.cumsum([len(table) for table in tables])[:-1]
    return [part.tolist() for part in np.split(taken, ends)]


@contextmanager
def _silent_standard_output() -> Iterator[None]:
    """Keep file descriptor 1 clean: HiGHS prints debugging lines there whatever its options say."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        with suppress(
            OSError, TypeError, AttributeError
        ):  # where this fails, what the C library buffered may still be printed
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
