"""The sections of a bundle's page that its files and reports fill: what it is, quality, bytes, time by layer, placement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from ...measuring.kept_reports import LayerTime, Nodes
from ...targets.onnx.layers import INPUTS
from ..tables import size
from .charts import Bar, Sheet, bars
from .facts import BundlePage

TASKS = {
    "seq2seq": "an encoder-decoder: text in, text out",
    "causal": "a decoder: it continues a prompt",
    "memory": "a decoder-decoder: it reads a context once and answers from its memory",
    "embed": "a model of embeddings: a text becomes a vector",
    "module": "a module of your own",
}


def about(page: BundlePage) -> Sheet:
    """What the bundle is, and what made it."""
    m, spec = page.manifest, page.manifest.generation
    task = "an encoder-decoder: sound in, text out" if spec.speech is not None else TASKS[spec.task]
    rows = [
        ["model", f"{m.source} ({m.model_type})"],
        ["kind", task],
        ["weights", f"{m.weights:,} that can be quantized, {m.average_bits:.3f} bits each on average, scales counted"],
        ["context", f"{spec.max_context:,} tokens of {spec.vocab:,} in the vocabulary"],
        ["KV cache", m.kv_cache],
        ["graphs", ", ".join(g.name for g in m.graphs)],
        ["made with", ", ".join(f"{tool} {version}" for tool, version in sorted(m.tools.items()))],
        ["fingerprint of the source", m.source_fingerprint],
    ]
    return Sheet(["", ""], rows, kind="counted")


def targets(page: BundlePage) -> Sheet:
    """The artefacts and their bytes."""
    rows = [
        [t.format, size(t.ideal_bytes), size(t.stored_bytes), size(page.file_bytes[t.format]), str(len(t.files))]
        for t in page.manifest.targets
    ]
    head = ["target", "weights in codes", "weights as stored", "files", "number of files"]
    return Sheet(head, rows, frozenset({1, 2, 3, 4}), "counted")


def quality(page: BundlePage) -> list[tuple[str, Sheet]]:
    """What verification found: the loss by quantization, then each artefact beside its reference. Measured."""
    report = page.verified
    if report is None:
        return []
    sheets = []
    head = ["compared", "KL, nats a position", "same best token", "perplexity"]
    rows = []
    if (loss := report.loss) is not None:
        where = f"{loss.positions} positions of the prompts" if report.quality is None else report.quality.data
        rows.append([f"quantized, on {where}", f"{loss.mean_kl:.2e}", f"{loss.top1:.1%}", ""])
    if (text := report.original_text) is not None:
        rows.append(["original, on a text", "", "", f"{text.perplexity:.4g}"])
    if (text := report.dequantized_text) is not None:
        rows.append(
            ["quantized, on a text", f"{text.mean_kl:.2e}", f"{text.top1:.1%}", f"{text.perplexity:.4g}"],
        )
    if rows:
        sheets.append(("Loss by quantization", Sheet(head, rows, frozenset({1, 2, 3}), "measured")))
    rows = []
    for t in report.targets:
        task = "" if t.task_accuracy is None else f"{t.task_accuracy:.1%}"
        if task and report.original_task_accuracy is not None:
            task += f" (original {report.original_task_accuracy:.1%})"
        verdict = "passed" if t.passed else "FAILED"
        error = t.lowering.max_relative_error
        agrees = ["" if error is None else f"{error:.1e}", f"{t.shipped.mean_kl:.1e}", f"{t.shipped.top1:.1%}"]
        rows.append([t.format, verdict, *agrees, task, t.how])
    head = ["target", "verdict", "lowering error", "KL as shipped", "same best token", "task", "computed here by"]
    sheets.append(("Artefacts beside their reference", Sheet(head, rows, frozenset({2, 3, 4, 5}), "measured")))
    return sheets


def bytes_by_layer(page: BundlePage) -> tuple[list[Bar], list[int]]:
    """A bar for each layer with a part for each width, and the widths that there are."""
    widths = sorted({bits for layer in page.graphs.layers for bits in layer.bytes})
    rows = []
    for layer in page.graphs.layers:
        total = sum(layer.bytes.values())
        parts = [
            (f"w{bits}", float(layer.bytes[bits]), f"{layer.place}: {size(layer.bytes[bits])} at {bits} bits")
            for bits in widths
            if bits in layer.bytes
        ]
        average = 8 * total / layer.weights if layer.weights else 0.0
        rows.append((layer.place, parts, f"{size(total)}, {average:.2f} bits"))
    return bars(rows), widths


def time_by_layer(page: BundlePage) -> Iterator[tuple[str, str, list[Bar]]]:
    """(target, what ran, a bar for each layer) of each graph and phase that was profiled."""
    places = {layer.path: layer.place for layer in page.graphs.layers if layer.path}
    for target, measured in page.profiled.targets.items() if page.profiled is not None else ():
        order = [g.name for g in page.manifest.graphs]
        known = sorted(measured.layers, key=lambda graph: order.index(graph) if graph in order else len(order))
        for graph in known:
            for phase, layers in measured.layers[graph].items():
                yield target, f"{graph}, {phase}", _time_bars(layers, places)


def _time_bars(layers: list[LayerTime], places: Mapping[str, str]) -> list[Bar]:
    named = [(_place(row.layer, places), row) for row in layers]
    return bars(
        [
            (place, [("time", row.ms, f"{place}: {row.ms:.3f} ms, median of {row.calls}")], _took(row))
            for place, row in named
        ]
    )


def _took(row: LayerTime) -> str:
    return f"{row.ms:.3f} ms, {row.share:.0%}"


def _place(layer: str, places: Mapping[str, str]) -> str:
    if layer == INPUTS:
        return "positions, masks"
    return places.get(layer, layer.removeprefix("model."))


def time_by_op(page: BundlePage) -> Sheet | None:
    """The slowest ops of the profiled run; None where none was profiled."""
    rows = [
        [target, graph, op.op, op.unit, str(op.calls), f"{op.ms:.2f}", f"{op.share:.0%}"]
        for target, measured in (page.profiled.targets.items() if page.profiled is not None else ())
        for graph, those in measured.ops.items()
        for op in those
    ]
    head = ["target", "graph", "op", "unit", "calls", "ms", "of the graph"]
    return Sheet(head, rows, frozenset({4, 5, 6}), "measured") if rows else None


def without_layers(page: BundlePage) -> list[str]:
    """For each target without times by layer, why."""
    measured = page.profiled.targets if page.profiled is not None else {}
    lines = []
    for t in page.manifest.targets:
        if t.format not in measured:
            lines.append(f"{t.format}: not measured on this machine")
        elif not measured[t.format].layers:
            why = (
                "profiled before times by layer were kept, or a kind of model without them"
                if t.format == "onnx"
                else "its runtime tells none"
            )
            lines.append(f"{t.format}: no times by layer: {why}")
    return lines


def placement(page: BundlePage) -> tuple[list[Bar], list[str]]:
    """A bar for each target: nodes on its unit, on the CPU by choice, fallen back; and a line for each that is not known."""
    checked = {t.format: t.placement for t in page.verified.targets} if page.verified is not None else {}
    rows, lines = [], []
    for entry in page.manifest.targets:
        placed = checked.get(entry.format)
        if placed is None or not placed.known:
            why = "not verified: 'edgewright verify BUNDLE' says where nodes run" if placed is None else placed.source
            lines.append(f"{entry.format}: {why}")
            continue
        unit = placed.accelerator.removesuffix("ExecutionProvider") or "its unit"
        counts = [("accelerated", placed.accelerated), ("host", placed.host), ("fallback", placed.fallback)]
        words = {"accelerated": f"on {unit}", "host": "on the CPU by choice", "fallback": "fell back to the CPU"}
        parts = [(f"place-{k}", float(_nodes(g)), f"{_nodes(g)} nodes {words[k]}") for k, g in counts]
        whole = sum(amount for _, amount, _ in parts) or 1.0
        told = ", ".join(f"{n:.0f} {words[k]}" for (k, _), (_, n, _) in zip(counts, parts, strict=True) if n)
        rows.append((entry.format, [(tone, 100 * n / whole, tip) for tone, n, tip in parts], told))
    return bars(rows), lines


def _nodes(graphs: Nodes) -> int:
    return sum(sum(ops.values()) for ops in graphs.values())


def ops(page: BundlePage) -> list[Sheet]:
    """For each target its ops by graph, as its files have them."""
    sheets = []
    for entry in page.manifest.targets:
        graphs = list(entry.ops)
        total: Counter[str] = Counter()
        for counts in entry.ops.values():
            total.update(counts)
        rows = [[op, *(str(entry.ops[g].get(op, "")) for g in graphs)] for op, _ in total.most_common()]
        if rows:
            sheets.append(
                Sheet([f"op of {entry.format}", *graphs], rows, frozenset(range(1, 1 + len(graphs))), "counted")
            )
    return sheets


def simulated(page: BundlePage) -> list[tuple[str, Sheet]]:
    """What vendors' simulators told at export: a row for each program."""
    found = []
    for entry in page.manifest.targets:
        for key, fact in entry.facts.items():
            programs = fact.get("programs") if isinstance(fact, dict) and key.startswith("vendor_simulated") else None
            if not isinstance(programs, dict):
                continue
            known = {str(n): v for n, v in programs.items() if isinstance(v, dict)}
            columns = list(dict.fromkeys(str(column) for values in known.values() for column in values))
            rows = [[name, *(_figure(values.get(c)) for c in columns)] for name, values in known.items()]
            title = f"{entry.format}, by {fact.get('simulator', key)}: {fact.get('note', '')}"
            sheet = Sheet(["program", *columns], rows, frozenset(range(1, 1 + len(columns))), "vendor-simulated")
            found.append((title, sheet))
    return found


def _figure(value: object) -> str:
    return f"{value:,.6g}" if isinstance(value, int | float) else ""
