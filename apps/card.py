"""The model card of a project: what the bundle says of quality, size and speed, and how each figure was obtained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..bundle import REPORTS, Bundle
from ..errors import UserError
from ..system.reading import one_line, read_json_object
from .contract import App

_KINDS = {
    "seq2seq": "an encoder-decoder: text in, text out",
    "causal": "a decoder: it continues a prompt",
    "memory": "a decoder-decoder: it reads a context once and answers questions from its memory",
    "embed": "an encoder: a text in, a vector out",
}
_REPORT_BYTES = 64 << 20


@dataclass(frozen=True)
class Card:
    """what: one sentence. kind: of the model. ship: the size of its files. rows: (what, figure and how it was obtained).
    notes: what a reader must know."""

    what: str
    kind: str
    ship: str
    rows: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def make_card(bundle: Bundle, app: App) -> Card:
    """The card of an app made of a bundle. Reports that are not there, or not as they were written, have no row."""
    manifest = bundle.manifest
    stored = sum(fact.bytes for fact in app.files.values())
    rows = [
        ("model", f"{one_line(manifest.source, 120)} ({app.model_type}), {_KINDS[app.task]}"),
        ("weights", f"{app.weights:,} at {app.bits:g} bits on average, scales counted"),
        ("files", f"{_size(stored)} to ship"),
        (
            "memory",
            f"about {_size(app.memory.total)} beside the runtime: weights {_size(app.memory.weights)}, "
            f"states at {app.max_context} tokens {_size(app.memory.states)} (computed, not measured)",
        ),
        *_reach(app),
        ("runtime", f"ONNX Runtime {app.oldest_runtime} or later"),
        ("tokenizer", "none: token ids in and out" if app.tokenizer is None else app.tokenizer.kind),
        *_quality(bundle),
        *_speed(bundle),
    ]
    notes = (
        []
        if manifest.verification is not None or _report(bundle, "verify")
        else ["The bundle was not verified: `edgewright verify BUNDLE` compares it with its reference."]
    )
    kind = _KINDS[app.task]
    return Card(
        what=f"Made of an Edgewright bundle: {kind}.",
        kind=kind[0].upper() + kind[1:],
        ship=_size(stored),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _reach(app: App) -> Iterator[tuple[str, str]]:
    """How much it reads, and what it makes of it."""
    if app.embedding is None:
        yield "context", f"{app.max_context} tokens, {app.max_new_tokens} new ones where none are asked for"
        return
    made = app.embedding
    yield "context", f"{app.max_context} tokens; a longer text is cut"
    length = ", of length 1" if made.normalised else ""
    yield "vectors", f"{made.size} numbers{length}, pooled by {', '.join(made.pooling)}, compared by {made.similarity}"


def _quality(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """From the last `verify`, else from the check at export."""
    report = _report(bundle, "verify") or _report(bundle, "export") or {}
    entries = [t for t in report.get("targets") or () if isinstance(t, dict) and t.get("format") == "onnx"]
    for entry in entries[:1]:
        shipped = entry.get("shipped") or entry.get("lowering")
        if isinstance(shipped, dict) and isinstance(shipped.get("top1"), float):
            yield (
                "against its reference",
                f"the same best token at {100 * shipped['top1']:.1f} % of {shipped.get('positions')} positions (measured)",
            )
        if isinstance(entry.get("task_accuracy"), float):
            yield "task", f"{100 * entry['task_accuracy']:.1f} % of {report.get('task_size')} answers exact (measured)"
    loss = report.get("quantization")
    if isinstance(loss, dict) and isinstance(loss.get("mean_kl"), float):
        yield "loss by quantization", f"KL {loss['mean_kl']:.4f} nats a token against the original (measured)"


def _speed(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """From the last `profile`: of the machine that it ran on, not of the platform."""
    report = _report(bundle, "profile") or {}
    targets = report.get("targets")
    measured = targets.get("onnx") if isinstance(targets, dict) else None
    if not isinstance(measured, dict):
        return
    host = measured.get("host")
    cpu = one_line(host.get("cpu"), 60) if isinstance(host, dict) else "this machine"
    for row in measured.get("rows") or ():
        if isinstance(row, dict) and isinstance(row.get("tokens_per_s"), float):
            yield one_line(row.get("test"), 20), f"{row['tokens_per_s']:.1f} tokens/s on {cpu}, in Python (measured)"


def _report(bundle: Bundle, name: str) -> dict[str, Any] | None:
    path = bundle.path / REPORTS / f"{name}.json"
    try:
        return read_json_object(path, _REPORT_BYTES) if path.is_file() else None
    except UserError:
        return None


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
