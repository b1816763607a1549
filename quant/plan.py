"""The bit plan: for each weight its bits, group size and quantizer, and why.

A plan is JSON, written by `plan`, edited by hand, and accepted back. Reading is strict, and every mistake gives one line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ..errors import UserError
from ..ops.packing import WIDTHS, packed_bytes, period
from ..system.digest import of_text
from ..system.reading import MEBIBYTE, one_line, read_text
from ..targets.target import GROUP_SIZES

UNQUANTIZED = 16
"""The width that means: kept, as bfloat16."""

Quantizer = Literal["rtn", "gptq"]
"""How codes are chosen: each weight rounded to the nearest, or with its errors fed back into the weights after it."""

BudgetKind = Literal["bits", "size", "latency"]

_LARGEST_PLAN = 64 * MEBIBYTE
_STRICT = ConfigDict(extra="forbid", strict=True)

Positive = Annotated[int, Field(ge=1, le=2**40)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=4096)]


@dataclass(frozen=True, config=_STRICT)
class WeightSpec:
    """A weight that may be quantized: its checkpoint name, shape (N outputs, K inputs), layer index and stack.

    layer is None outside the layers (embedding, head); stack says which tower it is in ("encoder", "decoder", …).
    """

    name: Name
    shape: tuple[Positive, Positive]
    layer: int | None
    stack: str

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, config=_STRICT)
class Unit:
    """Weights that share one choice of bits and group: q/k/v, gate/up; a tied embedding and head is one weight."""

    name: Name
    weights: Annotated[list[WeightSpec], Field(min_length=1)]

    @property
    def numel(self) -> int:
        return sum(weight.numel for weight in self.weights)


@dataclass(frozen=True, config=_STRICT)
class Choice:
    """What a unit gets: bits (2, 3, 4, 5, 6, 8, or 16 = bf16), the group size wanted (0: one scale per channel), and how."""

    bits: int
    group_size: int
    quantizer: Quantizer = "rtn"


@dataclass(frozen=True, config=_STRICT)
class Entry:
    """One weight's line of the plan. group_size is the effective one: K means one scale per channel (or 16 bits).

    score: the importance weight that the allocator used. why: in words, where the choice comes from. quantizer: without
    meaning at 16 bits. loss: where losses were measured, the predicted one of the weight's unit at this choice, in nats a token,
    divided among the unit's weights by their size; it is stale after an edit by hand. signed: scales may be negative, which not
    every target holds.
    """

    bits: Annotated[int, Field(ge=-256, le=256)]
    group_size: Positive
    score: Finite
    why: Annotated[str, Field(max_length=4096)]
    quantizer: Quantizer = "rtn"
    loss: Finite | None = None
    signed: bool = False


@dataclass(frozen=True, config=_STRICT)
class Budget:
    """A limit: average bits a weight, scales counted; bytes of the whole quantized checkpoint; or predicted milliseconds of a
    decode step on `device`.
    """

    kind: BudgetKind
    value: Finite
    device: Name | None = None

    @staticmethod
    def of(
        bits: float | None = None,
        size: float | None = None,
        latency_ms: float | None = None,
        device: str | None = None,
    ) -> Budget:
        """The one of `bits`, `size` and `latency_ms` that is given. Raises UserError for none, for two, and for no number."""
        options: dict[BudgetKind, float | None] = {"bits": bits, "size": size, "latency": latency_ms}
        limits = [(kind, float(value)) for kind, value in options.items() if value is not None]
        if len(limits) != 1:
            raise UserError("give one budget: average bits, size or latency")
        kind, value = limits[0]
        if not math.isfinite(value):
            raise UserError(f"a budget of {value} is not a number; try --bits 4.25")
        return Budget(kind, value, device)


@dataclass(frozen=True, config=_STRICT)
class BitPlan:
    """Bits and group of every weight. average_bits and total_bytes count codes and scales of the planned weights only.

    The same plan and checkpoint give the same codes; where an entry says gptq, with the same calibration tokens, whose
    SHA-256 is `calibration`. After an edit the totals are stale: use what `validate` returns.
    """

    version: Literal[1]
    method: Annotated[str, Field(max_length=256)]
    budget: Budget
    entries: dict[Name, Entry]
    average_bits: Finite
    total_bytes: Annotated[int, Field(ge=0, le=2**60)]
    calibration: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    def to_json(self) -> str:
        """The plan as text, one weight a line in natural order; equal plans give equal bytes, whatever made them."""
        head = {
            "version": self.version,
            "method": self.method,
            "budget": _written(self.budget),
            "average_bits": self.average_bits,
            "total_bytes": self.total_bytes,
        }
        if self.calibration is not None:
            head["calibration"] = self.calibration
        lines = [f"  {_dumps(key)}: {_dumps(value)}," for key, value in head.items()]
        names = sorted(self.entries, key=lambda name: (natural_order(name), name))
        entries = [f"    {_dumps(name)}: {_dumps(_written(self.entries[name]))}" for name in names]
        return "\n".join(["{", *lines, '  "entries": {', ",\n".join(entries), "  }", "}", ""])

    @staticmethod
    def from_json(text: str) -> BitPlan:
        """Read `to_json`'s form. Raises UserError for anything else, naming the first field at fault."""
        if len(text) > _LARGEST_PLAN:
            raise UserError(f"plan of {len(text)} characters is longer than {_LARGEST_PLAN}; is it the right file?")
        try:
            return _READER.validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = one_line(" > ".join(str(part) for part in first["loc"]), 120) or "the text"
            raise UserError(f"plan: {where}: {one_line(first['msg'], 120)}; write one with `edgewright plan`") from None
        except (ValueError, RecursionError, UnicodeError) as error:
            raise UserError(f"plan: not readable as JSON ({one_line(error, 80)})") from None

    @staticmethod
    def read(path: Path) -> BitPlan:
        """The plan in a file. Raises UserError when it is missing, not text, or not a plan."""
        return BitPlan.from_json(read_text(path, _LARGEST_PLAN))

    def digest(self) -> str:
        """SHA-256 (hex) of the plan's text."""
        return of_text(self.to_json())

    def validate(self, units: Iterable[Unit]) -> BitPlan:
        """This plan with its totals computed anew, once it fits a model's units.

        Raises UserError naming the weight when one is missing or unknown, its bits or group are not possible for its
        shape, or the weights of a unit differ in their choice.
        """
        units = list(units)
        known = {weight.name: weight for unit in units for weight in unit.weights}
        for name in self.entries:
            if name not in known:
                raise UserError(f"plan: the model has no weight {one_line(name)}; is the plan of another model?")
        for unit in units:
            choices: dict[tuple[int, int], str] = {}
            for weight in unit.weights:
                entry = self.entries.get(weight.name)
                if entry is None:
                    raise UserError(f"plan: no entry for weight {weight.name}; add one, 16 bits leaves it as it is")
                check_choice(weight, entry.bits, entry.group_size)
                group = 0 if entry.bits == UNQUANTIZED or entry.group_size == weight.shape[1] else entry.group_size
                other = choices.setdefault((entry.bits, group), weight.name)
                if len(choices) > 1:
                    first = next(iter(choices.values()))
                    raise UserError(
                        f"plan: {other} and {first} run as one ({unit.name}) and need the same bits and group size"
                    )
        total = sum(weight_bytes(known[name], e.bits, e.group_size) for name, e in self.entries.items())
        count = sum(weight.numel for weight in known.values())
        return replace(self, total_bytes=total, average_bits=total * 8 / count if count else 0.0)


def check_choice(weight: WeightSpec, bits: int, group_size: int) -> None:
    """Raise UserError naming the weight unless it can have these bits with this effective group size."""
    columns = weight.shape[1]
    if bits == UNQUANTIZED:
        return
    if bits not in WIDTHS:
        legal = ", ".join(map(str, (*WIDTHS, UNQUANTIZED)))
        raise UserError(f"plan: {weight.name} has {bits} bits; choose from {legal}")
    if columns % period(bits):
        raise UserError(f"plan: {weight.name} has {columns} inputs, which {bits}-bit codes do not pack; use 8 or 16")
    if group_size == columns:
        return
    if bits == 8:
        raise UserError(f"plan: {weight.name} has 8 bits, which take one scale per channel: group_size {columns}")
    if group_size not in GROUP_SIZES or columns % group_size:
        legal = ", ".join(str(g) for g in GROUP_SIZES if columns % g == 0 and g != columns)
        raise UserError(
            f"plan: {weight.name} has group size {group_size}; choose from {legal}{', ' if legal else ''}{columns}"
        )


def weight_bytes(weight: WeightSpec, bits: int, group_size: int) -> int:
    """Bytes of the weight in a quantized checkpoint: codes at their true width and 2 bytes a scale; 16: bf16.

    `group_size` is the effective one. Raises ValueError when a row of codes does not fill whole bytes.
    """
    rows, columns = weight.shape
    if bits == UNQUANTIZED:
        return rows * columns * 2
    return rows * (packed_bytes(columns, bits) + 2 * (columns // group_size))


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]{1,18})", name) if part]


def _written(part: Budget | Entry) -> dict[str, Any]:
    """Its fields without those that have their default: such a plan has the same text as before the field existed."""
    defaults = {f.name for f in fields(part) if f.default is not MISSING and getattr(part, f.name) == f.default}
    return {key: value for key, value in asdict(part).items() if key not in defaults}


def _dumps(value: object) -> str:
    return json.dumps(value, allow_nan=False)


_READER = TypeAdapter(BitPlan)
