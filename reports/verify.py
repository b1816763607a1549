"""What `export` and `verify` print."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from rich.table import Table

from ..compiler import Exported
from ..verification.report import Agreement, Report, TargetReport
from .plan import plan_json, plan_text
from .tables import size, table, text


def export_text(made: Exported) -> str:
    """Plan, sizes, what the check found, and where the bundle is."""
    sizes = table("target", "weights in codes", "weights as stored", "files", "lowering", "peak anonymous memory")
    for entry in made.manifest.targets:
        total = sum((made.path / f).stat().st_size for f in entry.files)
        cost = made.costs[entry.format]
        taken = [f"{cost.seconds:.1f} s", f"{cost.peak_anonymous / 2**20:.0f} MiB"]
        sizes.add_row(entry.format, size(entry.ideal_bytes), size(entry.stored_bytes), size(total), *taken)
    parts: list[Table | str] = [plan_text(made.planned), sizes]
    if made.report is None:
        parts.append("not verified (--no-verify): run 'edgewright verify' before shipping")
    else:
        parts += [_lowering_table(made.report), _target_table(made.report), *_fell_back(made.report)]
    parts.append(f"peak anonymous memory: {made.peak_anonymous / 2**20:.0f} MiB")
    parts.append(f"bundle: {made.path}")
    return text(*parts)


def export_json(made: Exported) -> dict[str, Any]:
    return {
        "bundle": str(made.path),
        "plan": plan_json(made.planned),
        "targets": [t.model_dump(mode="json") for t in made.manifest.targets],
        "verification": made.report.to_json() if made.report is not None else None,
        "costs": {name: asdict(cost) for name, cost in made.costs.items()},
        "peak_anonymous_bytes": made.peak_anonymous,
    }


def _agreement(a: Agreement) -> list[str]:
    if a.rms is not None:
        return [f"{a.max_relative_error:.2e}", f"rms {a.rms:.2e}", "", f"{a.prompts_identical}/{a.prompts}"]
    return [f"{a.max_relative_error:.2e}", f"{a.mean_kl:.2e}", f"{a.top1:.2%}", f"{a.prompts_identical}/{a.prompts}"]


def _lowering_table(report: Report) -> Table:
    rows = table("comparison", "max rel. error", "mean KL", "top-1", "prompts identical", "result")
    for t in report.targets:
        verdict = f"ok ({t.allowed})" if t.passed else f"FAILED ({t.allowed})"
        rows.add_row(f"{t.format}: lowering error ({t.activations} activations)", *_agreement(t.lowering), verdict)
        if t.arithmetic is not None:
            rows.add_row("the reference with such int8 activations (emulated)", *_agreement(t.arithmetic), "reported")
        if t.shipped is not t.lowering:  # one run where the runtime has no float32 activations
            rows.add_row(f"{t.format}: as shipped", *_agreement(t.shipped), "judged" if t.on_device else "reported")
    if report.quantization is not None:
        rows.add_row("quantization loss (dequantized against original)", *_agreement(report.quantization), "reported")
    return rows


_SHOWN = 6  # kinds of nodes on the CPU by choice; what fell back is shown whole


def _target_table(report: Report) -> Table:
    """What computed each target here, its weights, where its nodes run, and its bytes."""
    rows = table(
        "target", "computed here by", "weights bit for bit", "accelerated", "CPU by choice", "fell back", "bytes"
    )
    rows.columns[1].justify = "left"
    for t in report.targets:
        p = t.placement
        nodes = [str(sum(map(_nodes, part.values()))) for part in (p.accelerated, p.host, p.fallback)]
        if not p.known:
            nodes = ["unknown here"] * 3
        rows.add_row(t.format, t.how, str(t.weights), *nodes, size(t.file_bytes))
    return rows


def _nodes(ops: dict[str, int]) -> int:
    return sum(ops.values())


def _fell_back(report: Report) -> list[str]:
    """A line for each target with nodes off its accelerator, by name, and for each whose placement is unknown."""
    lines = []
    for t in report.targets:
        if not t.placement.known:
            lines.append(f"{t.format}: {t.placement.source}")
        for kind, part in (("on the CPU by choice", t.placement.host), ("fell back to the CPU", t.placement.fallback)):
            named: Counter[str] = Counter()
            for ops in part.values():
                named.update(ops)
            if named:
                shown = named.most_common(None if part is t.placement.fallback else _SHOWN)
                more = f", and {len(named) - _SHOWN} kinds more" if len(shown) < len(named) else ""
                lines.append(f"{t.format}: {kind}: {', '.join(f'{op} x{n}' for op, n in shown)}{more}")
    return lines


def verify_text(report: Report) -> str:
    parts: list[Table | str] = [_lowering_table(report), _target_table(report), *_fell_back(report)]
    placement = table("target", "graph", "on the accelerator", "nodes", "most frequent ops")
    for column in (1, 2, 4):
        placement.columns[column].justify = "left"
    for t in report.targets:
        parts += _quality(t, report)
        for graph, ops in t.placement.accelerated.items():
            often = ", ".join(f"{op} {n}" for op, n in sorted(ops.items(), key=_by_count)[:6])
            unit = t.placement.accelerator.removesuffix("ExecutionProvider")
            placement.add_row(t.format, graph, unit, str(_nodes(ops)), often)
    return text(*parts, *_text_table(report), placement, *report.notes)


def _by_count(item: tuple[str, int]) -> int:
    return -item[1]


def _quality(t: TargetReport, report: Report) -> list[str]:
    lines = []
    if t.task_accuracy is not None:
        before = report.original_task_accuracy
        was = (
            f"; original {before:.1%}, difference {100 * (t.task_accuracy - before):+.1f} points"
            if before is not None
            else ""
        )
        lines.append(f"{t.format}: task accuracy {t.task_accuracy:.1%} of {report.task_size} prompts{was}")
    return lines


def _text_table(report: Report) -> list[Table | str]:
    """Perplexity of each, and how far from the one it is measured against."""
    if report.text_against is None:
        return []
    windows = f"{report.text_windows} window{'s' if report.text_windows > 1 else ''}"
    what = f"text: {windows}, {report.text_positions:,} tokens scored; KL and top-1 against the {report.text_against} weights"
    rows = table("on the text", "perplexity", "mean KL (nats)", "top-1")
    scores = [("original weights, float32", report.original_text), ("dequantized, float32", report.dequantized_text)]
    scores += [(f"{t.format}, as shipped", t.text) for t in report.targets]
    for name, score in scores:
        if score is not None:
            rows.add_row(name, f"{score.perplexity:.4g}", f"{score.mean_kl:.2e}", f"{score.top1:.2%}")
    return [what, rows]
