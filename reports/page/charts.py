"""What a chart shows, as data: the template `charts.html.j2` draws it. Places are in per cent, so that a chart fits any width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .axes import Axis

KINDS = {
    "measured": "timed or compared on the machine that is named",
    "vendor-simulated": "told by the vendor's simulator, not run on the device",
    "emulated": "run in an emulator of the device; no times are told",
    "predicted": "computed from the graphs' shapes and published speeds of other models; the interval holds the true rate "
    "four times out of five",
    "counted": "counted in the bundle's own files and graphs, exact",
}
"""How a figure was obtained; every one says which."""


@dataclass(frozen=True)
class Tile:
    """A figure at the head of a page. kind: one of KINDS."""

    value: str
    what: str
    kind: str


@dataclass(frozen=True)
class Part:
    """One colour of a bar. tone: its class in the style sheet. share: of the longest bar, in per cent."""

    tone: str
    share: float
    tip: str


@dataclass(frozen=True)
class Bar:
    """A row with a bar of parts side by side, and its value as text."""

    label: str
    parts: list[Part]
    value: str


@dataclass(frozen=True)
class Point:
    """A mark at (x, y), with an interval along y where it has one. Places are of the axes."""

    x: float
    y: float
    low: float | None
    high: float | None
    tip: str


@dataclass(frozen=True)
class Series:
    """Points that belong together. style: points, line (through them), band (a line and the interval around it), or steps.

    tone: its class in the style sheet. kind: one of KINDS, which says whether marks are filled.
    """

    name: str
    tone: str
    kind: str
    style: str
    points: list[Point]

    @property
    def path(self) -> str:
        """The line, in a square of 100 whose y grows downwards."""
        return " ".join(f"{p.x:.2f},{100 - p.y:.2f}" for p in self.points)

    @property
    def area(self) -> str:
        """The band around it."""
        held = [p for p in self.points if p.low is not None and p.high is not None]
        above = [f"{p.x:.2f},{100 - (p.high or 0):.2f}" for p in held]
        return " ".join(above + [f"{p.x:.2f},{100 - (p.low or 0):.2f}" for p in reversed(held)])


@dataclass(frozen=True)
class Plot:
    """Series over two axes. says: in a sentence, for those who do not see it."""

    x: Axis
    y: Axis
    series: list[Series]
    says: str


@dataclass(frozen=True)
class Span:
    """A row with a mark on an axis and its interval, where it has one."""

    label: str
    note: str
    at: float
    low: float | None
    high: float | None
    kind: str
    value: str


@dataclass(frozen=True)
class Spans:
    """Rows over one axis."""

    axis: Axis
    rows: list[Span]


@dataclass(frozen=True)
class Sheet:
    """A table. numbers: columns that are set to the right. kind: of all its figures; "" where a column says it of each."""

    head: list[str]
    rows: list[list[str]]
    numbers: frozenset[int] = field(default_factory=frozenset)
    kind: str = ""


def bars(rows: Sequence[tuple[str, Sequence[tuple[str, float, str]], str]]) -> list[Bar]:
    """Bars of (label, parts as (tone, amount, tip), value), the longest of which has the whole width."""
    longest = max((sum(amount for _, amount, _ in parts) for _, parts, _ in rows), default=0.0) or 1.0
    return [
        Bar(label, [Part(tone, round(100 * amount / longest, 3), tip) for tone, amount, tip in parts if amount], value)
        for label, parts, value in rows
    ]


def on(x: Axis, y: Axis, values: tuple[float, float], ends: tuple[float, float] | None, tip: str) -> Point:
    """A point at `values`, with the interval `ends` along y."""
    low, high = (None, None) if ends is None else (y.at(ends[0]), y.at(ends[1]))
    return Point(x.at(values[0]), y.at(values[1]), low, high, tip)
