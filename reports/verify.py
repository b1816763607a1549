"""What `export` and `verify` print."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from rich.table import Table

from ..compiler import Exported
from ..verification.report import Agreement, Report, TargetReport, TextScore
from ..verification.similarity import Similarity
from .plan import plan_json, plan_text
from .tables import size, table, text


def export_text(exported: Exported) -> str:
    """Plan, sizes, result of the check, and where the bundle is."""
    sizes = table("target", "weights in codes", "weights as stored", "files", "lowering", "peak anonymous memory")
    for entry in exported.manifest.targets:
        total = sum((exported.path / f).stat().st_size for f in entry.files)
        cost = exported.costs[entry.format]
        taken = [f"{cost.seconds:.1f} s", f"{cost.peak_anonymous / 2**20:.0f} MiB"]
        sizes.add_row(entry.format, size(entry.ideal_bytes), size(entry.stored_bytes), size(total), *taken)
    parts: list[Table | str] = [plan_text(exported.planned), sizes]
    if exported.report is None:
        parts.append("not verified (--no-verify): run 'edgewright verify' before shipping")
    else:
        parts += [_lowering_table(exported.report), _target_table(exported.report), *_fell_back(exported.report)]
    if exported.independent is not None:
        parts.append(exported.independent.text)
    if exported.quality is not None:
        parts.append(exported.quality.text)
    parts.append(f"peak anonymous memory: {exported.peak_anonymous / 2**20:.0f} MiB")
    parts.append(f"bundle: {exported.path}")
    return text(*parts)


def export_json(exported: Exported) -> dict[str, Any]:
    return {
        "bundle": str(exported.path),
        "plan": plan_json(exported.planned),
        "targets": [t.model_dump(mode="json") for t in exported.manifest.targets],
        "verification": exported.report.to_json() if exported.report is not None else None,
        "independent": None if exported.independent is None else asdict(exported.independent),
        "quality": None if exported.quality is None else asdict(exported.quality),
        "costs": {name: asdict(cost) for name, cost in exported.costs.items()},
        "peak_anonymous_bytes": exported.peak_anonymous,
    }


def _agreement(a: Agreement) -> list[str]:
    if a.similarity is not None:
        s = a.similarity
        found = f"cosine {s.cosine:.6f}, least {s.worst:.6f}"
        return [f"{a.max_relative_error:.2e}", found, f"{s.nearest:.2%}", f"{a.prompts_identical}/{a.prompts}"]
    if a.rms is not None:
        return [f"{a.max_relative_error:.2e}", f"rms {a.rms:.2e}", "", f"{a.prompts_identical}/{a.prompts}"]
    return [f"{a.max_relative_error:.2e}", f"{a.mean_kl:.2e}", f"{a.top1:.2%}", f"{a.prompts_identical}/{a.prompts}"]


def _lowering_table(report: Report) -> Table:
    embeds = any(t.lowering.similarity is not None for t in report.targets)
    heads = ("cosine", "same nearest", "texts identical") if embeds else ("mean KL", "top-1", "prompts identical")
    rows = table("comparison", "max rel. error", *heads, "result")
    for t in report.targets:
        result = f"ok ({t.allowed})" if t.passed else f"FAILED ({t.allowed})"
        rows.add_row(f"{t.format}: lowering error ({t.activations} activations)", *_agreement(t.lowering), result)
        if t.arithmetic is not None:
            rows.add_row("the reference with such int8 activations (emulated)", *_agreement(t.arithmetic), "reported")
        if t.shipped is not t.lowering:  # one run where the runtime has no float32 activations
            rows.add_row(f"{t.format}: as shipped", *_agreement(t.shipped), "judged" if t.on_device else "reported")
    if report.quantization is not None:
        rows.add_row("quantization loss (dequantized against original)", *_agreement(report.quantization), "reported")
    return rows


_SHOWN = 6  # kinds of nodes in a line; all that fell back are shown


def _target_table(report: Report) -> Table:
    """For each target what computed it on this machine, its weights, where its nodes run, and its bytes."""
    placed = ("accelerated", "CPU by choice", "fell back")
    rows = table("target", "computed here by", "weights bit for bit", *placed, "bytes", left=("computed here by",))
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
    """A line for each target with nodes off its accelerator, and for each whose placement is unknown."""
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
    parts += [_task_line(t, report) for t in report.targets if t.task_accuracy is not None]
    parts += [_words_line(t, report) for t in report.targets if t.word_error_rate is not None]
    notes = [*report.notes, *([report.independent.text] if report.independent is not None else [])]
    return text(*parts, *_text_table(report), _placement_table(report), *notes)


def _placement_table(report: Report) -> Table:
    """The unit that each graph runs on, and its most frequent ops there."""
    rows = table(
        *("target", "graph", "on the accelerator", "nodes", "most frequent ops"),
        left=("graph", "on the accelerator", "most frequent ops"),
    )
    for t in report.targets:
        unit = t.placement.accelerator.removesuffix("ExecutionProvider")
        for graph, ops in t.placement.accelerated.items():
            frequent = ", ".join(f"{op} {n}" for op, n in Counter(ops).most_common(_SHOWN))
            rows.add_row(t.format, graph, unit, str(_nodes(ops)), frequent)
    return rows


def _task_line(t: TargetReport, report: Report) -> str:
    assert t.task_accuracy is not None
    what = "task accuracy" if t.lowering.similarity is None else "recall at 1"
    line = f"{t.format}: {what} {t.task_accuracy:.1%} of {report.task_size} prompts"
    original = report.original_task_accuracy
    if original is None:
        return line
    return f"{line}; original {original:.1%}, difference {100 * (t.task_accuracy - original):+.1f} points"


def _words_line(t: TargetReport, report: Report) -> str:
    assert t.word_error_rate is not None
    line = f"{t.format}: word error rate {t.word_error_rate:.1%} of {report.task_size} sounds"
    original = report.original_word_error_rate
    if original is None:
        return line
    return f"{line}; original {original:.1%}, difference {100 * (t.word_error_rate - original):+.1f} points"


def _text_table(report: Report) -> list[Table | str]:
    """The perplexity of each, and how far its predictions are from those it is compared with."""
    if report.text_against is None:
        return []
    if any(isinstance(t.text, Similarity) for t in report.targets):
        return _similarity_table(report)
    windows = f"{report.text_windows} window{'s' if report.text_windows > 1 else ''}"
    what = f"text: {windows}, {report.text_positions:,} tokens scored; KL and top-1 against the {report.text_against} weights"
    rows = table("on the text", "perplexity", "mean KL (nats)", "top-1")
    scores: list[tuple[str, object]] = [("original weights, float32", report.original_text)]
    scores.append(("dequantized, float32", report.dequantized_text))
    scores += [(f"{t.format}, as shipped", t.text) for t in report.targets]
    for name, score in scores:
        if isinstance(score, TextScore):
            rows.add_row(name, f"{score.perplexity:.4g}", f"{score.mean_kl:.2e}", f"{score.top1:.2%}")
    return [what, rows]


def _similarity_table(report: Report) -> list[Table | str]:
    """Of a model of embeddings: how near the vectors of the text's paragraphs are to those that they are compared with."""
    what = (
        f"text: {report.text_windows} texts, {report.text_positions:,} tokens; vectors beside those of the "
        f"{report.text_against} weights"
    )
    rows = table("on the text", "cosine", "least", "Spearman of pairs", "same nearest text")
    scores = [
        ("dequantized, float32", report.dequantized_text),
        *((f"{t.format}, as shipped", t.text) for t in report.targets),
    ]
    for name, s in scores:
        if isinstance(s, Similarity):
            rows.add_row(name, f"{s.cosine:.6f}", f"{s.worst:.6f}", f"{s.spearman:.4f}", f"{s.nearest:.2%}")
    return [what, rows]
