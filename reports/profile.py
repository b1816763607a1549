"""What `profile` prints: the measurements as Markdown, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json

from ..runtimes.benchmark import Measurement, ProfileResult, Row, SimulatedFact
from .sheets import Sheet

_MIB = 1 << 20


def profile_text(result: ProfileResult, output_format: str) -> str:
    """A profile in the format "md", "json" or "csv" (the measured rows alone)."""
    if output_format == "json":
        return json.dumps(result, indent=1)
    if output_format == "csv":
        return _csv(result)
    tables = _tables(result)
    return "\n\n".join(t.markdown() for t in tables)


def _rate_rows(result: ProfileResult) -> list[tuple[list[str], Row]]:
    """For each measured row: target, model, bits and threads as text, then the measurement."""
    return [
        ([name, result["model"], f"{result['bits']:.2f}", str(measured["host"]["threads"])], row)
        for name, measured in result["targets"].items()
        for row in measured["rows"]
    ]


def _csv(result: ProfileResult) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["target", "model", "bits", "threads", "test", "tokens_per_s", "std", "median", "repeats"])
    for labels, row in _rate_rows(result):
        writer.writerow([*labels, row["test"], row["tokens_per_s"], row["std"], row["median"], row["repeats"]])
    return out.getvalue().rstrip("\n")


def _tables(result: ProfileResult) -> list[Sheet]:
    measured = result["targets"]
    tables = []
    if measured:
        tables += [_rate_table(result), _memory_table(measured)]
        ops = _op_table(measured)
        tables += [ops] if ops.rows else []
    for name, facts in result["simulated"].items():
        tables += [_simulated_table(name, key, fact) for key, fact in facts.items()]
    if result["not_measured"]:
        tables.append(Sheet(["not measured", "why"], [[name, why] for name, why in result["not_measured"].items()]))
    return tables


def _rate_table(result: ProfileResult) -> Sheet:
    rows = [
        [*labels, row["test"], f"{row['tokens_per_s']:.2f} ± {row['std']:.2f}"] for labels, row in _rate_rows(result)
    ]
    return Sheet(["target", "model", "bits", "threads", "test", "t/s"], rows)


def _memory_table(measured: dict[str, Measurement]) -> Sheet:
    cpu = next(iter(measured.values()))["host"]["cpu"]
    rows = []
    for name, target in measured.items():
        loads = [f"{seconds * 1e3:.0f}" for seconds in (target["load_first_s"], target["load_warm_s"])]
        memory = target["memory"]
        sizes = (memory["peak_resident"], memory["anonymous_after_load"], memory["anonymous_after_run"])
        rows.append([name, *loads, *(f"{size / _MIB:.0f}" for size in sizes)])
    head = ["first load, ms", "warm load, ms", "peak resident, MiB", "anonymous loaded, MiB", "anonymous after, MiB"]
    return Sheet([f"measured on {cpu}", *head], rows)


def _op_table(measured: dict[str, Measurement]) -> Sheet:
    rows = [
        [name, graph, op["op"], op["unit"], str(op["calls"]), f"{op['ms']:.2f}", f"{op['share']:.0%}"]
        for name, target in measured.items()
        for graph, ops in target["ops"].items()
        for op in ops
    ]
    return Sheet(["target", "graph", "op", "unit", "calls", "ms", "share"], rows)


def _simulated_table(name: str, key: str, fact: SimulatedFact) -> Sheet:
    """A row for each program; the columns are what the simulator reports."""
    programs = fact.get("programs", {})
    columns = list(dict.fromkeys(column for values in programs.values() for column in values))
    head = [f"{name}: vendor-simulated by {fact.get('simulator', key)} ({fact.get('note', '')})", *columns]
    rows = [[program, *(str(values.get(column, "")) for column in columns)] for program, values in programs.items()]
    return Sheet(head, rows)
