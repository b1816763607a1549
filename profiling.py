"""Latency, memory and load time of a bundle on this machine. What may enter: `bundle`, `runtimes.measure` (as a process)."""

from __future__ import annotations

import csv
import html
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .bundle import Bundle
from .errors import UserError

FORMATS = ("md", "json", "csv", "html")


def profile(
    path: str | Path,
    prompts: Sequence[int] | None,
    new: int | None,
    depths: Sequence[int],
    repeats: int,
    threads: int = 0,
) -> dict[str, Any]:
    """Measure on the host, in a fresh process. Lengths in tokens; None is llama-bench's 512 or 128, less where the context ends.

    Raises UserError for lengths beyond the bundle's context.
    """
    bundle = Bundle.open(path)
    bundle.target("onnx")
    context = bundle.manifest.generation.max_context
    causal = bundle.manifest.generation.task == "causal"
    prompts = [min(512, context - 1)] if prompts is None else prompts
    if new is None:
        new = max(1, min(128, context - 2 - (max(depths, default=0) if causal else 0)))
    prompts = [length for length in prompts if length]  # as in llama-bench, 0 asks for no such row
    if new < 0 or not (prompts or new):
        raise UserError(f"-p {','.join(map(str, prompts)) or 0} -n {new} measures nothing; give lengths above 0")
    asked = [*prompts, *((d + new + 1 if causal else max(d, new + 1)) for d in depths)]
    for length in asked:
        if length > context - 1:
            raise UserError(
                f"{length} tokens were asked for and the bundle's context is {context}; give shorter -p, -n or -d"
            )
    if repeats < 1:
        raise UserError(f"-r {repeats} is too few; give 1 or more")
    request = {
        "path": str(path),
        "prompts": list(prompts),
        "new": new,
        "depths": list(depths),
        "repeats": repeats,
        "threads": threads,
    }
    child = subprocess.run(
        [sys.executable, "-m", "edgewright.runtimes.measure"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        last = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        raise UserError(f"measuring {path} failed: {last[0]}")
    result: dict[str, Any] = json.loads(child.stdout)
    return {"model": bundle.manifest.source, "bits": bundle.manifest.average_bits, **result}


def render(result: dict[str, Any], form: str) -> str:
    """The result as md, json, csv or html."""
    if form == "json":
        return json.dumps(result, indent=1)
    head = ["model", "bits", "threads", "test", "t/s"]
    shared = [result["model"], f"{result['bits']:.2f}", str(result["host"]["threads"])]
    rows = [[*shared, r["test"], f"{r['tokens_per_s']:.2f} ± {r['std']:.2f}"] for r in result["rows"]]
    if form == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["model", "bits", "threads", "test", "tokens_per_s", "std", "median", "repeats"])
        for r in result["rows"]:
            writer.writerow([*shared, r["test"], r["tokens_per_s"], r["std"], r["median"], r["repeats"]])
        return out.getvalue().rstrip("\n")
    memory = result["memory"]
    block = [
        ["first load", f"{result['load_first_s'] * 1e3:.0f} ms"],
        ["warm load", f"{result['load_warm_s'] * 1e3:.0f} ms"],
        ["peak memory (resident)", f"{memory['peak_resident'] / 2**20:.0f} MiB"],
        [
            "anonymous memory (loaded, after the runs)",
            f"{memory['anonymous_after_load'] / 2**20:.0f}, {memory['anonymous_after_run'] / 2**20:.0f} MiB",
        ],
    ]
    ops = [
        [graph, o["op"], o["unit"], str(o["calls"]), f"{o['ms']:.2f}", f"{o['share']:.0%}"]
        for graph, entries in result["ops"].items()
        for o in entries
    ]
    tables = [
        (head, rows),
        (["measured on", result["host"]["cpu"]], block),
        (["graph", "op", "unit", "calls", "ms", "share"], ops),
    ]
    return "\n\n".join((_html if form == "html" else _markdown)(h, r) for h, r in tables)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"

    return "\n".join([line(head), "| " + " | ".join("-" * w for w in widths) + " |", *map(line, rows)])


def _html(head: list[str], rows: list[list[str]]) -> str:
    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return "\n".join(["<table>", row(head, "th"), *(row(r, "td") for r in rows), "</table>"])
