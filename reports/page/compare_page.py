"""The page of several bundles side by side: `compare BUNDLE… -o report.html`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ..compare import quality
from ..tables import size
from .axes import Axis, linear, logarithmic
from .charts import Bar, Plot, Series, Sheet, bars, on
from .render import render

NAV = (
    ("sides", "Side by side"),
    ("frontier", "Frontier"),
    ("bytes", "Bytes"),
    ("speed", "Speed"),
    ("placement", "Placement"),
)


@dataclass(frozen=True)
class Choice:
    """One artefact of one bundle. None: no report says it. loss: KL to its own original, nats a position. speed: units a second."""

    name: str
    bytes: int
    loss: float | None
    speed: float | None


def compare_html(rows: Sequence[dict[str, Any]]) -> str:
    """The page of the rows of `commands.compare`."""
    test = common_test(rows)
    choices = [_choice(row, name, test) for row, name in zip(rows, _names(rows), strict=True)]
    best = frontier(choices)
    hosts = sorted({row["speed_on"] for row in rows if row["speed_on"]})
    values = {
        "title": f"{len({row['bundle'] for row in rows})} bundles side by side",
        "what": "comparison",
        "lead": ", ".join(dict.fromkeys(str(row["bundle"]) for row in rows)),
        "nav": NAV,
        "assumptions": [],
        "side": _side(rows, choices, best, test),
        "frontiers": frontiers(choices, test),
        "missing": _missing(rows, choices, test),
        "sizes": _sizes(rows, choices),
        "speeds": list(_speeds(rows, choices)),
        "hosts": hosts,
        "placed": _placed(rows, choices),
        "models": sorted({str(row["model"]) for row in rows}),
    }
    return render("compare.html.j2", values)


def common_test(rows: Sequence[dict[str, Any]]) -> str | None:
    """The decode test that most rows have, else the test that most have; None where nothing was measured."""
    counts: Counter[str] = Counter(test for row in rows for test in row["speed"])
    if not counts:
        return None
    first = list(counts)
    return max(first, key=lambda test: (test.startswith("tg"), counts[test], -first.index(test)))


def frontier(choices: Sequence[Choice]) -> list[bool]:
    """Whether no other choice is at least as good in bytes, loss and speed and better in one. What is not known is left out."""
    return [not any(_better(other, one) for other in choices if other is not one) for one in choices]


def _better(other: Choice, one: Choice) -> bool:
    pairs = [(float(other.bytes), float(one.bytes))]
    for mine, theirs, sign in ((one.loss, other.loss, 1.0), (one.speed, other.speed, -1.0)):
        if mine is not None:
            if theirs is None:
                return False
            pairs.append((sign * theirs, sign * mine))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def frontiers(choices: Sequence[Choice], test: str | None) -> list[tuple[str, Plot]]:
    """The choices in pairs of bytes, loss and speed; a line joins those that no other beats in that pair."""
    rate = f"{test}, tokens a second" if test else "tokens a second"
    what: list[tuple[str, str, Callable[[Choice], float | None], float]] = [
        ("files, bytes", "bytes", lambda c: float(c.bytes), 1.0),
        ("KL to the original, nats", "loss", lambda c: c.loss, 1.0),
        (rate, "speed", lambda c: c.speed, -1.0),
    ]
    plots = []
    for one, other in ((0, 1), (0, 2), (2, 1)):
        (x_label, x_name, x_of, x_sign), (y_label, y_name, y_of, y_sign) = what[one], what[other]
        known = [(c, a, b) for c in choices if (a := x_of(c)) is not None and (b := y_of(c)) is not None]
        if len(known) < 2:
            continue
        x, y = _axis(x_label, [v for _, v, _ in known]), _axis(y_label, [v for *_, v in known])
        best = [
            (a, b)
            for _, a, b in known
            if not any(x_sign * p <= x_sign * a and y_sign * q <= y_sign * b and (p, q) != (a, b) for _, p, q in known)
        ]
        line = [on(x, y, pair, None, "") for pair in sorted(set(best))]
        series = [Series("frontier", "roof", "", "line", line)]
        for i, (c, a, b) in enumerate(known):
            tip = f"{c.name}: {size(c.bytes)}" + (f", KL {c.loss:.2e}" if c.loss is not None else "")
            tip += f", {c.speed:.4g} a second" if c.speed is not None else ""
            series.append(Series(c.name, f"t{i % 6}", "measured", "points", [on(x, y, (a, b), None, tip)]))
        plots.append((f"{y_name.capitalize()} against {x_name}", Plot(x, y, series, f"{y_label} against {x_label}")))
    return plots


def _axis(label: str, values: list[float]) -> Axis:
    spread = min(values) > 0 and max(values) / min(values) > 20
    return logarithmic(label, values) if spread else linear(label, values)


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Folder and target, with the whole path where two folders have one name."""
    short = [PurePath(row["bundle"]).name for row in rows]
    paths: dict[str, set[str]] = {}
    for name, row in zip(short, rows, strict=True):
        paths.setdefault(name, set()).add(row["bundle"])
    return [
        f"{name if len(paths[name]) == 1 else row['bundle']}, {row['target']}"
        for name, row in zip(short, rows, strict=True)
    ]


def _choice(row: dict[str, Any], name: str, test: str | None) -> Choice:
    scored = row["text"] or row["quantization"]
    loss = None if scored is None else scored["mean_kl"]
    return Choice(name, row["file_bytes"], loss, row["speed"].get(test) if test else None)


def _side(
    rows: Sequence[dict[str, Any]], choices: Sequence[Choice], best: Sequence[bool], test: str | None
) -> list[Sheet]:
    """What was counted, and what was measured."""
    counted = [
        [c.name, str(row["model"]), f"{row['bits']:.2f}", size(row["weight_bytes"]), size(row["file_bytes"])]
        for row, c in zip(rows, choices, strict=True)
    ]
    measured = []
    for row, c, on_it in zip(rows, choices, best, strict=True):
        verdict = {None: "not verified", True: "passed", False: "FAILED"}[row["verified"]]
        speed = "" if c.speed is None else f"{c.speed:.4g}"
        measured.append([c.name, verdict, *quality(row), speed, "on it" if on_it else ""])
    head = ["bundle, target", "verdict", "KL", "same best token", "perplexity", "task", test or "speed", "frontier"]
    return [
        Sheet(["bundle, target", "model", "bits", "weights", "files"], counted, frozenset({2, 3, 4}), "counted"),
        Sheet(head, measured, frozenset({2, 3, 4, 5, 6}), "measured"),
    ]


def _sizes(rows: Sequence[dict[str, Any]], choices: Sequence[Choice]) -> list[Bar]:
    whole = []
    for row, c in zip(rows, choices, strict=True):
        rest = max(0, row["file_bytes"] - row["weight_bytes"])
        parts = [("w8", float(row["weight_bytes"]), f"{c.name}: {size(row['weight_bytes'])} of weights")]
        parts.append(("w3", float(rest), f"{c.name}: {size(rest)} besides: program, tables, what is not planned"))
        whole.append((c.name, parts, size(row["file_bytes"])))
    return bars(whole)


def _speeds(rows: Sequence[dict[str, Any]], choices: Sequence[Choice]) -> list[tuple[str, str, list[Bar]]]:
    """(test, figure, a bar for each) of each test."""
    found = []
    for test in dict.fromkeys(t for row in rows for t in row["speed"]):
        timed = [(row, c) for row, c in zip(rows, choices, strict=True) if test in row["speed"]]
        kinds = {str(row["speed_kind"]).replace("_", "-") for row, _ in timed}
        drawn = bars(
            [
                (c.name, [("time", row["speed"][test], f"{c.name}, {row['speed_on']}")], f"{row['speed'][test]:.4g}")
                for row, c in timed
            ]
        )
        found.append((test, min(kinds), drawn))
    return found


def _placed(rows: Sequence[dict[str, Any]], choices: Sequence[Choice]) -> list[Bar]:
    words = {"accelerated": "on the target's unit", "host": "on the CPU by choice", "fallback": "fell back to the CPU"}
    found = []
    for row, c in zip(rows, choices, strict=True):
        whole = sum(row["placement"].values()) if row["placement"] else 0
        if whole:
            nodes = row["placement"]
            parts = [(f"place-{k}", 100 * nodes[k] / whole, f"{nodes[k]} nodes {w}") for k, w in words.items()]
            told = ", ".join(f"{nodes[k]} {w}" for k, w in words.items() if nodes[k])
            found.append((c.name, parts, told))
    return bars(found)


def _missing(rows: Sequence[dict[str, Any]], choices: Sequence[Choice], test: str | None) -> list[str]:
    """A line for each that a plot leaves out."""
    lines = []
    for row, c in zip(rows, choices, strict=True):
        lacks = [f"its loss: 'edgewright verify {row['bundle']} -m MODEL' finds it"] if c.loss is None else []
        lacks += [f"{test or 'its speed'}: 'edgewright profile {row['bundle']}' measures it"] if c.speed is None else []
        lines += [f"{c.name}: no report says {lack}" for lack in lacks]
    return lines
