"""What `rewrite` prints."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import Any

from ..rewrites.adapt import Adapted
from ..rewrites.eugen.rewrite import EUGenReport
from ..rewrites.smooth import SmoothReport
from .tables import size, table, text


def eugen_text(report: EUGenReport) -> str:
    """A row for each block: the error of its EUGen, and what the block costs before and after."""
    rows = table("block", "m, k", "error on held-out rows", "parameters", "FLOPs a token", "bytes")
    for layer in report.layers:
        costs = [f"{b:,} -> {a:,} ({a / b:.2f}x)" for b, a in (layer.parameters, layer.flops, layer.bytes)]
        rows.add_row(layer.path, f"{layer.size.m}, {layer.size.k}", f"{layer.fit.error:.4f}", *costs)
    before, after = report.bytes
    fitted = f"fitted on {report.tokens:,} tokens of {report.sequences:,} sequences"
    return text(rows, fitted, f"model.safetensors: {size(before)} -> {size(after)}", f"checkpoint: {report.path}")


def smooth_text(report: SmoothReport) -> str:
    """A row for each set of channels: what divides them, what reads them, the error there; then what was kept, and why."""
    at = f"{report.bits} bits, " + (f"group {report.group_size}" if report.group_size else "a scale a row")
    rows = table("channels of", "go to", "exponent", f"error of rounding, {at}", left=("go to",))
    for fold in report.folds:
        readers = ", ".join(path.rpartition(".")[2] for path in fold.readers)
        rows.add_row(fold.source, readers, f"{fold.alpha:.1f}", f"{fold.ratio:.3f}x")
    reasons: dict[str, list[str]] = defaultdict(list)
    for source, why in report.left.items():
        reasons[why].append(source)
    lines = [f"left as it was: {', '.join(sources)}: {why}" for why, sources in reasons.items()]
    if report.widened:
        lines.append(
            f"{len(report.widened)} tensors are float32 now, as their dtype would round them: {report.widened[0]} …"
        )
    before, after = report.bytes
    measured = f"measured on {report.tokens:,} tokens; every logit is as before"
    return text(rows, measured, *lines, f"weights: {size(before)} -> {size(after)}", f"checkpoint: {report.path}")


def adapted_json(adapted: Adapted) -> dict[str, Any]:
    return asdict(adapted) | {"path": str(adapted.path)}


def adapted_text(adapted: Adapted) -> str:
    """Where the tensors come from, and what must be trained first."""
    lines = [f"{adapted.model_type}: {adapted.copied} tensors of the source, {len(adapted.drawn)} drawn at random, "]
    lines[0] += f"{len(adapted.zeros)} zeros: {size(adapted.bytes)}"
    if adapted.train_first is not None:
        lines.append(
            f"train '{adapted.train_first}' alone first, with all else frozen: {', '.join(adapted.drawn[:3])} …"
        )
    return text(*lines, f"checkpoint: {adapted.path}")
