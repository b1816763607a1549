"""Bits for every weight under a budget, exactly. What may enter: plan, targets, rtn (for the effective group).

The allocator minimises the sum over units of importance * weights * expected relative error, subject to the bytes of
codes and scales. It is a multiple-choice knapsack, solved to optimality by HiGHS. A budget that cannot be met is
refused before any weight is read.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ..errors import UserError
from ..ops.packing import WIDTHS, period
from .plan import UNQUANTIZED, BitPlan, Budget, Choice, Entry, Unit, weight_bytes
from .rtn import effective_group
from .targets import GROUP_SIZES, PER_CHANNEL, legal_choices, legal_group

EXPECTED_ERROR: dict[tuple[int, int], float] = {
    (2, 16): 0.125, (2, 32): 0.137, (2, 64): 0.143, (2, 128): 0.146, (2, 256): 0.148, (2, 0): 0.149,
    (3, 16): 0.0259, (3, 32): 0.0320, (3, 64): 0.0359, (3, 128): 0.0382, (3, 256): 0.0394, (3, 0): 0.0404,
    (4, 16): 0.00560, (4, 32): 0.00740, (4, 64): 0.00898, (4, 128): 0.0102, (4, 256): 0.0110, (4, 0): 0.0117,
    (5, 16): 0.00125, (5, 32): 0.00172, (5, 64): 0.00217, (5, 128): 0.00259, (5, 256): 0.00294, (5, 0): 0.00336,
    (6, 16): 2.82e-4, (6, 32): 4.01e-4, (6, 64): 5.21e-4, (6, 128): 6.38e-4, (6, 256): 7.45e-4, (6, 0): 9.23e-4,
    (8, 0): 6.02e-5,
    (16, 0): 2.76e-6,
}  # fmt: skip
"""(bits, group) -> |w - w'|**2 / |w|**2, measured: `quantize_rtn` on a 4096 x 1024 standard normal matrix (group 0: one
scale for the 1024 inputs); 16 bits: rounding fp32 to bf16. tests/test_allocate.py measures it again."""

_SOLVER_SECONDS = 60.0
_CORE_OPTIONS = 48
_LOSS_RANGE = 1e4
_BYTES_RANGE = 100.0


@dataclass(frozen=True)
class Override:
    """A user's choice for the weights whose name matches `regex` (searched anywhere); group None: the allocator's."""

    regex: str
    bits: int
    group: int | None = None

    @staticmethod
    def parse(text: str) -> Override:
        """Read 'regex=bits' or 'regex=bits:group' (group 0: one scale per channel). Raises UserError."""
        found = re.fullmatch(r"(.+)=([0-9]{1,3})(?::([0-9]{1,6}))?", text, re.DOTALL)
        if found is None:
            raise UserError(f"override {text!r} is not 'regex=bits' or 'regex=bits:group', for example 'embed=8'")
        group = None if found[3] is None else int(found[3])
        override = Override(found[1], int(found[2]), group)
        override.check()
        return override

    def check(self) -> None:
        """Raise UserError unless the regex compiles and the bits and group exist."""
        try:
            re.compile(self.regex)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"override {self.regex!r} is not a regular expression: {error}") from None
        _check_widths((self.bits,), f"override {self.regex!r}")
        if self.group not in (None, PER_CHANNEL) and (self.group not in GROUP_SIZES or self.bits in (8, UNQUANTIZED)):
            raise UserError(
                f"override {self.regex!r}: group {self.group} at {self.bits} bits; 8 bits take one scale per channel "
                f"(group 0), fewer take {', '.join(map(str, GROUP_SIZES))} or 0"
            )


@dataclass(frozen=True)
class Option:
    """One choice a unit may take, with what it costs: bytes, and importance * weights * expected error."""

    choice: Choice
    bytes: int
    loss: float


def allocate(
    units: Sequence[Unit],
    scores: Mapping[str, float],
    *,
    bits: float | None = None,
    size: int | None = None,
    other_bytes: int = 0,
    widths: Sequence[int] = WIDTHS,
    groups: Sequence[int] = (32, 64, 128),
    overrides: Sequence[Override] = (),
    targets: Sequence[str] = (),
    method: str = "uniform",
) -> BitPlan:
    """The plan of least expected loss whose bytes meet the budget; the budget is never exceeded.

    units: what shares a choice. scores: unit name -> importance weight > 0. Exactly one of bits (average over all
    weights of the units, scales counted) and size (bytes of the quantized checkpoint's tensors, of which other_bytes
    are not quantized). widths: allowed bits (16 = bf16). groups: allowed sizes (0: per channel; 8 bits always are).
    overrides: the first that matches a weight decides its unit. targets: choices are limited to what all of them hold.

    Raises UserError for a budget below the floor or above the ceiling (naming both, in bits and bytes), an override
    that matches nothing or that a target cannot hold, a weight no width fits, or a score that is not positive.
    """
    if (bits is None) == (size is None):
        raise UserError("give one budget: average bits or size")
    _check_units(units, scores)
    options = _all_options(units, scores, widths, groups, overrides, targets)
    numel = sum(unit.numel for unit in units)
    budget = _budget_bytes(bits, size, other_bytes, numel, [rows for rows, _ in options])
    chosen = _solve([rows for rows, _ in options], budget)
    entries: dict[str, Entry] = {}
    total = 0
    for unit, option, (_, why) in zip(units, chosen, options, strict=True):
        total += option.bytes
        for weight in unit.weights:
            group = _effective(option.choice, weight.shape[1])
            entries[weight.name] = Entry(option.choice.bits, group, float(scores[unit.name]), why)
    asked = Budget("bits", float(bits)) if bits is not None else Budget("size", float(size or 0))
    return BitPlan(1, method, asked, entries, total * 8 / numel, total)


def reach(
    units: Sequence[Unit],
    *,
    widths: Sequence[int],
    groups: Sequence[int],
    overrides: Sequence[Override],
    targets: Sequence[str],
) -> tuple[float, float]:
    """The least and the largest average bits that `allocate` can give, scales counted. Raises UserError as it does."""
    scores = {unit.name: 1.0 for unit in units}
    options = [rows for rows, _ in _all_options(units, scores, widths, groups, overrides, targets)]
    numel = sum(unit.numel for unit in units)
    low, high = (math.ceil(sum(rows[i].bytes for rows in options) * 80000 / numel) / 10000 for i in (0, -1))
    return low, high


def expected_error(bits: int, group_size: int, columns: int) -> float:
    """Expected relative squared error of a weight with `columns` inputs at this effective group size."""
    return EXPECTED_ERROR.get((bits, group_size), EXPECTED_ERROR[bits, PER_CHANNEL])


def expected_loss(plan: BitPlan, units: Sequence[Unit]) -> float:
    """What the allocator minimised, of a plan it made: importance * weights * expected relative error, summed."""
    total = 0.0
    for weight in (w for unit in units for w in unit.weights):
        entry = plan.entries[weight.name]
        total += entry.score * weight.numel * expected_error(entry.bits, entry.group_size, weight.shape[1])
    return total


def _check_units(units: Sequence[Unit], scores: Mapping[str, float]) -> None:
    if not units:
        raise UserError("the model has no weights to quantize")
    names = [weight.name for unit in units for weight in unit.weights]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"weight {twice} is in two units; a shared weight belongs to one")
    for unit in units:
        score = scores.get(unit.name)
        if score is None or not (math.isfinite(score) and score > 0):
            raise UserError(f"unit {unit.name} has importance {score}; a positive number is needed")


def _check_widths(widths: Sequence[int], who: str) -> None:
    for width in widths:
        if width not in (*WIDTHS, UNQUANTIZED):
            raise UserError(f"{who}: {width} bits; choose from {', '.join(map(str, (*WIDTHS, UNQUANTIZED)))}")


def _all_options(
    units: Sequence[Unit],
    scores: Mapping[str, float],
    widths: Sequence[int],
    groups: Sequence[int],
    overrides: Sequence[Override],
    targets: Sequence[str],
) -> list[tuple[list[Option], str]]:
    """For each unit the options worth considering, cheapest first, and why it has them."""
    if not widths:
        raise UserError("no bit widths are allowed; give some of 2, 3, 4, 5, 6, 8, 16")
    _check_widths(widths, "widths")
    for group in groups:
        if group not in (PER_CHANNEL, *GROUP_SIZES):
            raise UserError(f"group size {group}; choose from {', '.join(map(str, GROUP_SIZES))} or 0 (per channel)")
    general = [Choice(*pair) for pair in legal_choices(targets, widths, groups)]
    forced = [_forced_choices(override, groups, targets) for override in overrides]
    used: set[int] = set()
    result = []
    for unit in units:
        names = [weight.name for weight in unit.weights]
        index = next((i for i, o in enumerate(overrides) if any(re.search(o.regex, name) for name in names)), None)
        if index is None:
            choices, why = general, f"importance {scores[unit.name]:.4g}"
        else:
            used.add(index)
            choices, why = forced[index], f"override {overrides[index].regex}"
        options = _options(unit, scores[unit.name], choices, targets)
        if not options:
            shapes = ", ".join(f"{w.name} {list(w.shape)}" for w in unit.weights)
            tried = ", ".join(dict.fromkeys(str(choice.bits) for choice in choices))
            raise UserError(f"{shapes}: none of {tried} bits fits the number of inputs; allow 8 or 16 bits for it")
        result.append((options, why))
    for i, override in enumerate(overrides):
        matches = (re.search(override.regex, weight.name) for unit in units for weight in unit.weights)
        if i not in used and not any(matches):
            example = units[0].weights[0].name
            raise UserError(f"override {override.regex!r} matches no weight; names look like {example}")
    return result


def _forced_choices(override: Override, groups: Sequence[int], targets: Sequence[str]) -> list[Choice]:
    override.check()
    if override.group is None or override.bits == UNQUANTIZED:
        return [Choice(*pair) for pair in legal_choices(targets, (override.bits,), groups)]
    for target in targets:
        if not legal_group(target, override.bits, override.group):
            raise UserError(
                f"override {override.regex!r}: {target} has no {override.bits}-bit groups of {override.group}; take 0"
            )
    return [Choice(override.bits, override.group)]


def _options(unit: Unit, score: float, choices: Sequence[Choice], targets: Sequence[str]) -> list[Option]:
    """The choices that fit the unit's shapes, cheapest first, without those no better than a cheaper one."""
    found = []
    for choice in choices:
        if choice.bits != UNQUANTIZED and any(w.shape[1] % period(choice.bits) for w in unit.weights):
            continue
        groups = [_effective(choice, w.shape[1]) for w in unit.weights]
        legal = all(
            choice.bits == UNQUANTIZED or group == w.shape[1] or legal_group(target, choice.bits, group)
            for target in targets
            for w, group in zip(unit.weights, groups, strict=True)
        )
        if not legal:
            continue
        sized = list(zip(unit.weights, groups, strict=True))
        cost = sum(weight_bytes(w, choice.bits, group) for w, group in sized)
        loss = sum(w.numel * expected_error(choice.bits, group, w.shape[1]) for w, group in sized)
        found.append(Option(choice, cost, score * loss))
    found.sort(key=lambda option: (option.bytes, option.loss, -option.choice.group_size))
    kept: list[Option] = []
    for option in found:
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def _effective(choice: Choice, columns: int) -> int:
    return columns if choice.bits == UNQUANTIZED else effective_group(columns, choice.group_size)


def _budget_bytes(
    bits: float | None, size: int | None, other_bytes: int, numel: int, options: Sequence[Sequence[Option]]
) -> int:
    """Bytes the units may take. Raises UserError, with floor and ceiling, when no plan is that small or that large."""
    floor = sum(rows[0].bytes for rows in options)
    ceiling = sum(rows[-1].bytes for rows in options)
    if bits is not None:
        if not math.isfinite(bits):
            raise UserError(f"a budget of {bits} bits is not a number; try --bits 4.25")
        asked = f"{bits:g} bits a weight"
        budget = math.floor(Fraction(str(bits)) * numel / 8)
    else:
        asked = f"a size of {size} bytes"
        budget = (size or 0) - other_bytes
    # both ends rounded up, so that either can be typed as it is shown
    low, high = (math.ceil(end * 80000 / numel) / 10000 for end in (floor, ceiling))
    if floor <= budget and (budget <= ceiling or (bits is not None and bits <= high)):
        return budget
    reach = (
        f"from {low:g} bits a weight ({floor + other_bytes} bytes with everything unquantized) "
        f"to {high:g} ({ceiling + other_bytes} bytes), scales counted"
    )
    if budget < floor:
        raise UserError(f"{asked} is below the floor: the allowed widths and overrides reach {reach}; ask for more")
    raise UserError(f"{asked} is above the ceiling: the allowed widths and overrides reach {reach}; ask for less")


def _solve(options: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    """The option of each unit that minimises the total loss within `budget` bytes (the floor is within it)."""
    # Units with the same options are interchangeable: one integer count per option instead of many equal binaries,
    # without which branch and bound walks through their permutations.
    classes: dict[tuple[tuple[int, float], ...], list[int]] = defaultdict(list)
    for index, rows in enumerate(options):
        classes[tuple((o.bytes, o.loss) for o in rows)].append(index)
    members = list(classes.values())
    tables = [options[indices[0]] for indices in members]
    counts = [len(indices) for indices in members]
    picks = _solve_core(tables, counts, budget)
    chosen: dict[int, Option] = {}
    for indices, table, pick in zip(members, tables, picks, strict=True):
        # within a class the earlier units, in the model's order, get the more bits
        best_first = [option for option, n in zip(reversed(table), reversed(pick), strict=True) for _ in range(n)]
        chosen.update(zip(indices, best_first, strict=True))
    return [chosen[index] for index in range(len(options))]


def _solve_core(tables: Sequence[Sequence[Option]], counts: Sequence[int], budget: int) -> list[list[int]]:
    """`_solve_counts` over the options that can be part of an optimum, which are few.

    With the price per byte of the linear relaxation, an option's reduced cost says by how much any plan that uses it
    must exceed the relaxation's loss. Solve over the options of least reduced cost first; only those below the gap that
    is left can still better the result. Only when some of these were left out, solve again with them.
    """
    price = _price(tables, counts, budget)
    lagrangian = [[option.loss + price * option.bytes for option in table] for table in tables]
    least = [min(row) for row in lagrangian]
    reduced = [[value - low for value in row] for row, low in zip(lagrangian, least, strict=True)]
    bound = math.fsum(n * low for n, low in zip(counts, least, strict=True)) - price * budget
    ranked = sorted(cost for row in reduced for cost in row)
    limit = ranked[min(len(ranked), len(tables) + _CORE_OPTIONS) - 1]
    slack = 1e-12 * abs(bound)  # rounding in the sums above; too many options do no harm
    while True:
        core = [[j for j, cost in enumerate(row) if cost <= limit + slack] for row in reduced]
        found = _solve_counts(
            [[t[j] for j in keep] for t, keep in zip(tables, core, strict=True)], counts, budget, price
        )
        picks = [[0] * len(table) for table in tables]
        for pick, keep, values in zip(picks, core, found, strict=True):
            for j, n in zip(keep, values, strict=True):
                pick[j] = n
        loss = math.fsum(
            n * o.loss for t, pick in zip(tables, picks, strict=True) for o, n in zip(t, pick, strict=True)
        )
        if loss - bound <= limit + slack or limit >= ranked[-1]:
            return picks
        limit = loss - bound


def _price(tables: Sequence[Sequence[Option]], counts: Sequence[int], budget: int) -> float:
    """The linear relaxation's price of a byte: the rate of the convex step at which the greedy upgrade ends."""
    steps: list[tuple[float, int]] = []
    spent = 0
    for table, n in zip(tables, counts, strict=True):
        spent += n * table[0].bytes
        hull: list[Option] = []
        for option in table:
            while len(hull) > 1 and _rate(hull[-2], hull[-1]) <= _rate(hull[-1], option):
                hull.pop()
            hull.append(option)
        steps += [(_rate(low, high), n * (high.bytes - low.bytes)) for low, high in pairwise(hull)]
    for rate, cost in sorted(steps, reverse=True):
        spent += cost
        if spent > budget:
            return rate
    return 0.0


def _rate(low: Option, high: Option) -> float:
    return (low.loss - high.loss) / (high.bytes - low.bytes)


def _solve_counts(
    tables: Sequence[Sequence[Option]], counts: Sequence[int], budget: int, price: float
) -> list[list[int]]:
    """How many units of each class take each option: an integer program with a row a class and one for bytes.

    The solver's tolerances and its smallest gap are absolute, about 1e-6. So bytes and losses are measured from the
    relaxation's choice of each class and scaled, until these are nothing and only the differences it weighs are left.
    """
    base = [min(table, key=lambda o: (o.loss + price * o.bytes, o.bytes)) for table in tables]
    owner = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    extra = np.array([o.bytes - b.bytes for table, b in zip(tables, base, strict=True) for o in table], dtype=np.int64)
    loss = np.array([o.loss - b.loss for table, b in zip(tables, base, strict=True) for o in table])
    capacity = budget - sum(n * b.bytes for n, b in zip(counts, base, strict=True))
    byte_scale = _BYTES_RANGE / max(int(np.abs(extra).max()), 1)
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
                    LinearConstraint(csr_array(extra[np.newaxis] * byte_scale), -np.inf, allowed * byte_scale),
                ],
                options={"mip_rel_gap": 0.0, "time_limit": _SOLVER_SECONDS},
            )
        if result.x is not None and result.status != 0:
            raise UserError(
                f"the allocator proved no plan best within {_SOLVER_SECONDS:g} s; give fewer --widths or a --group-size"
            )
        if result.x is None:
            raise UserError(
                f"the allocator found no plan for {budget} bytes ({result.message}); change the budget a bit"
            )
        taken = np.rint(result.x).astype(np.int64)
        excess = int(taken @ extra) - capacity
        if excess <= 0:
            break
        allowed -= excess  # within the solver's tolerance, yet over the budget: ask for that much less
    ends = np.cumsum([len(table) for table in tables])[:-1]
    return [part.tolist() for part in np.split(taken, ends)]


@contextmanager
def _silent_standard_output() -> Iterator[None]:
    """Keep file descriptor 1 clean: HiGHS prints debugging lines there whatever it is told."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # no standard output at all
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        with suppress(OSError, TypeError, AttributeError):  # no such C library: what it buffered may still come out
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
