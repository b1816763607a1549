"""What `compare` prints: a row for each target of each bundle."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from .sheets import Sheet
from .tables import size, table, text

_SMALL = ("bundle", "target", "bits", "weight_bytes", "file_bytes", "verified", "task_accuracy")


def compare_report(rows: Sequence[dict[str, Any]], output_format: str) -> str:
    """The rows in the format "text", "md", "csv" or "json"."""
    forms = {"text": compare_text, "md": compare_markdown, "csv": compare_csv}
    return json.dumps(rows, indent=1) if output_format == "json" else forms[output_format](rows)


def compare_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One table of sizes, quality and speed."""
    tests = list(dict.fromkeys(test for row in rows for test in row["speed"]))
    head = ["bundle", "target", "bits", "weights", "files", "verified", "KL", "top-1", "perplexity", "task"]
    cells = []
    for row in rows:
        sizes = [f"{row['bits']:.2f}", size(row["weight_bytes"]), size(row["file_bytes"])]
        speeds = [f"{row['speed'][t]:.1f}" if t in row["speed"] else "" for t in tests]
        cells.append([row["bundle"], row["target"], *sizes, _verdict(row["verified"]), *quality(row), *speeds])
    return Sheet([*head, *(f"{t} tokens/s" for t in tests)], cells).markdown()


def compare_text(rows: Sequence[dict[str, Any]]) -> str:
    """Tables of sizes and quality, of speed, and of placement; what no report says is left empty, with a line that says how."""
    tests = list(dict.fromkeys(test for row in rows for test in row["speed"]))
    sizes_table = table(
        "bundle",
        "target",
        "bits",
        "weights",
        "files",
        "verified",
        "KL",
        "top-1",
        "perplexity",
        "task",
        left=("target",),
    )
    speed = table("bundle", "target", *(f"{t} tokens/s" for t in tests), left=("target",))
    placed = table(
        "bundle",
        "target",
        "accelerated",
        "CPU by choice",
        "fell back",
        "computed here by",
        left=("target", "computed here by"),
    )
    for row in rows:
        named = [row["bundle"], row["target"]]
        sizes = [f"{row['bits']:.2f}", size(row["weight_bytes"]), size(row["file_bytes"])]
        sizes_table.add_row(*named, *sizes, _verdict(row["verified"]), *quality(row))
        if row["speed"]:
            speed.add_row(*named, *(f"{row['speed'][t]:.1f}" if t in row["speed"] else "" for t in tests))
        if row["verified"] is not None:
            nodes = row["placement"] or dict.fromkeys(("accelerated", "host", "fallback"), "unknown here")
            placed.add_row(*named, *map(str, nodes.values()), row["computed_by"])
    parts: list[Any] = [sizes_table]
    parts += [speed] if tests else []
    parts += [placed] if any(row["verified"] is not None for row in rows) else []
    if any(row["verified"] is None for row in rows):
        parts.append("not verified: 'edgewright verify BUNDLE -m MODEL' fills in quality and placement")
    if any(not row["speed"] for row in rows):
        parts.append("no speed: 'edgewright profile BUNDLE' measures it on this machine")
    return text(*parts)


def compare_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows with sizes, quality and speed as CSV."""
    tests = list(dict.fromkeys(test for row in rows for test in row["speed"]))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_SMALL, "kl", "top1", "perplexity", *tests])
    for row in rows:
        kl, top1, perplexity, _ = quality(row)
        speeds = [row["speed"].get(t, "") for t in tests]
        writer.writerow([*(row[k] for k in _SMALL), kl, top1, perplexity, *speeds])
    return out.getvalue().rstrip("\n")


def _verdict(verified: bool | None) -> str:
    return "" if verified is None else "ok" if verified else "FAILED"


def quality(row: dict[str, Any]) -> list[str]:
    """KL, top-1, perplexity and accuracy against the original: on a text where one was scored, else on the prompts of `verify`."""
    scored, prompts = row["text"], row["quantization"]
    kl = scored or prompts
    accuracy, before = row["task_accuracy"], row["original_task_accuracy"]
    return [
        f"{kl['mean_kl']:.2e}" if kl else "",
        f"{kl['top1']:.1%}" if kl else "",
        f"{scored['perplexity']:.2f}" if scored else "",
        "" if accuracy is None else f"{accuracy:.1%}" + ("" if before is None else f" of {before:.1%}"),
    ]
