"""Latency, memory and load time of a bundle on this machine. What may enter: `bundle`, `runtimes.measure` (as a process)."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bundle import Bundle, Generation
from ..errors import UserError
from ..system.subprocesses import ChildFailed, run_child
from ..targets.registry import TARGETS

FORMATS = ("md", "json", "csv", "html")


SIMULATED = "vendor_simulated"
"""What the key of a fact begins with that a vendor's simulator says: {"simulator", "note", "programs": {name: {what: n}}}."""


def profile(
    path: str | Path,
    formats: Sequence[str],
    prompts: Sequence[int] | None,
    new: int | None,
    depths: Sequence[int],
    repeats: int,
    threads: int = 0,
) -> dict[str, Any]:
    """Measure on the host, each target in a fresh process. Lengths in tokens; None is llama-bench's 512 or 128, less where
    the context ends.

    formats: the targets; without, all in the bundle. {"targets": format -> measured, "simulated": format -> what the
    vendor's simulator said at export, "not_measured": format -> why}. Raises UserError for lengths beyond the bundle's
    context, or a target asked for that cannot run here.
    """
    bundle = Bundle.open(path)
    held = [entry.format for entry in bundle.manifest.targets]
    asked_for = [bundle.target(name).format for name in dict.fromkeys(formats)]
    prompts, new = _lengths(bundle.manifest.generation, prompts, new, depths, repeats)
    measured: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name in asked_for or held:
        if not (asked_for or (name in TARGETS and TARGETS[name].installed)):
            missing[name] = f"its runtime is not installed: {TARGETS[name].install if name in TARGETS else name}"
            continue
        request = {"path": str(path), "format": name, "prompts": list(prompts), "new": new, "depths": list(depths)}
        found = _in_a_process(path, request | {"repeats": repeats, "threads": threads})
        if "not_measured" in found:
            missing[name] = found["not_measured"]
        else:
            measured[name] = found
    simulated = {
        entry.format: {key: value for key, value in entry.facts.items() if key.startswith(SIMULATED)}
        for entry in bundle.manifest.targets
        if entry.format in (asked_for or held)
    }
    return {
        "model": bundle.manifest.source,
        "bits": bundle.manifest.average_bits,
        "targets": measured,
        "simulated": {name: facts for name, facts in simulated.items() if facts},
        "not_measured": missing,
    }


def _lengths(
    spec: Generation, prompts: Sequence[int] | None, new: int | None, depths: Sequence[int], repeats: int
) -> tuple[list[int], int]:
    """The prompt lengths and new tokens to measure. Raises UserError for what does not fit."""
    if spec.task == "module":
        return [], 0
    context, causal = spec.max_context, spec.task != "seq2seq"
    prompts = [min(512, context - 1)] if prompts is None else prompts
    if new is None:
        new = max(1, min(128, context - 2 - (max(depths, default=0) if causal else 0)))
    prompts = [length for length in prompts if length]  # as in llama-bench, 0 asks for no such row
    if new < 0 or not (prompts or new):
        raise UserError(f"-p {','.join(map(str, prompts)) or 0} -n {new} measures nothing; give lengths above 0")
    read = [] if spec.task == "memory" else prompts  # a long context is read in parts
    asked = [*read, *((d + new + 1 if causal else max(d, new + 1)) for d in depths)]
    for length in asked:
        if length > context - 1:
            raise UserError(
                f"{length} tokens were asked for and the bundle's context is {context}; give shorter -p, -n or -d"
            )
    if repeats < 1:
        raise UserError(f"-r {repeats} is too few; give 1 or more")
    return prompts, new


def _in_a_process(path: str | Path, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return run_child("edgewright.runtimes.benchmark", request)
    except ChildFailed as error:
        raise UserError(f"measuring {path} ({request['format']}) failed: {error}") from None


def render(result: dict[str, Any], form: str) -> str:
    """The result as md, json, csv (the measured rows alone) or html."""
    if form == "json":
        return json.dumps(result, indent=1)
    measured = result["targets"]
    rows = [
        [name, result["model"], f"{result['bits']:.2f}", str(m["host"]["threads"]), r]
        for name, m in measured.items()
        for r in m["rows"]
    ]
    if form == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["target", "model", "bits", "threads", "test", "tokens_per_s", "std", "median", "repeats"])
        for *shared, r in rows:
            writer.writerow([*shared, r["test"], r["tokens_per_s"], r["std"], r["median"], r["repeats"]])
        return out.getvalue().rstrip("\n")
    tables: list[tuple[list[str], list[list[str]]]] = []
    if measured:
        shown = [[*shared, r["test"], f"{r['tokens_per_s']:.2f} ± {r['std']:.2f}"] for *shared, r in rows]
        tables = [(["target", "model", "bits", "threads", "test", "t/s"], shown), _memory_table(measured)]
        tables += [
            (["target", "graph", "op", "unit", "calls", "ms", "share"], ops) for ops in [_op_rows(measured)] if ops
        ]
    tables += [
        _simulated_table(name, key, fact) for name, facts in result["simulated"].items() for key, fact in facts.items()
    ]
    if result["not_measured"]:
        tables.append((["not measured", "why"], [[name, why] for name, why in result["not_measured"].items()]))
    return "\n\n".join((_html if form == "html" else _markdown)(h, r) for h, r in tables)


def _memory_table(measured: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    cpu = next(iter(measured.values()))["host"]["cpu"]
    rows = []
    for name, m in measured.items():
        memory = m["memory"]
        mib = [memory[k] / 2**20 for k in ("peak_resident", "anonymous_after_load", "anonymous_after_run")]
        loads = [f"{m['load_first_s'] * 1e3:.0f}", f"{m['load_warm_s'] * 1e3:.0f}"]
        rows.append([name, *loads, *(f"{value:.0f}" for value in mib)])
    head = ["first load, ms", "warm load, ms", "peak resident, MiB", "anonymous loaded, MiB", "anonymous after, MiB"]
    return [f"measured on {cpu}", *head], rows


def _op_rows(measured: dict[str, Any]) -> list[list[str]]:
    return [
        [name, graph, o["op"], o["unit"], str(o["calls"]), f"{o['ms']:.2f}", f"{o['share']:.0%}"]
        for name, m in measured.items()
        for graph, entries in m["ops"].items()
        for o in entries
    ]


def _simulated_table(name: str, key: str, fact: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row for each program; the columns are what the simulator tells."""
    programs: dict[str, dict[str, Any]] = fact.get("programs", {})
    columns = list(dict.fromkeys(column for values in programs.values() for column in values))
    head = [f"{name}: vendor-simulated by {fact.get('simulator', key)} ({fact.get('note', '')})", *columns]
    return head, [[program, *(str(values.get(c, "")) for c in columns)] for program, values in programs.items()]


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"

    return "\n".join([line(head), "| " + " | ".join("-" * w for w in widths) + " |", *map(line, rows)])


def _html(head: list[str], rows: list[list[str]]) -> str:
    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return "\n".join(["<table>", row(head, "th"), *(row(r, "td") for r in rows), "</table>"])
