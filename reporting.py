"""What the commands print: plans, exports and verifications as text and JSON. Reads results, computes nothing new."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .compiler import Exported, Planned
from .quant.frontier import Frontier, Point
from .quant.plan import BitPlan, Entry
from .rewrites.adapt import Adapted
from .rewrites.eugen import EUGenReport
from .rewrites.smooth import SmoothReport
from .verdict import Agreement, Report, TargetReport


def text(*parts: Table | str) -> str:
    """Tables and lines as plain text, wide enough not to fold."""
    out = io.StringIO()
    console = Console(file=out, width=200, no_color=True, highlight=False, markup=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")


def table(*columns: str, title: str | None = None) -> Table:
    made = Table(box=SIMPLE, title=title, title_justify="left", pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return made


def size(count: float) -> str:
    """Bytes in MB or GB (powers of ten)."""
    return (
        f"{count / 1e9:.2f} GB"
        if count >= 1e9
        else f"{count / 1e6:.2f} MB"
        if count >= 1e5
        else f"{count / 1e3:.1f} kB"
    )


def kinds(planned: Planned) -> dict[tuple[str, str], list[tuple[int, int, int]]]:
    """(stack and layer, part) -> its (bits, group, weights)."""
    rows: dict[tuple[str, str], list[tuple[int, int, int]]] = defaultdict(list)
    for unit in planned.units:
        for w in unit.weights:
            entry = planned.plan.entries[w.name]
            place = f"{w.stack} {w.layer}" if w.layer is not None else w.name.removesuffix(".weight")
            part = ".".join(w.name.split(".")[-3:-1]) if w.layer is not None else ""
            group = 0 if entry.group_size == w.shape[1] else entry.group_size
            rows[place, part].append((entry.bits, group, w.numel))
    return rows


def plan_text(planned: Planned) -> str:
    """The plan: a row a layer with the bits of its parts, then the totals for every target."""
    places: dict[str, dict[str, str]] = defaultdict(dict)
    counts: Counter[str] = Counter()
    for (place, part), entries in kinds(planned).items():
        bits, group, _ = entries[0]
        label = "16" if bits == 16 else f"{bits}" + (f"g{group}" if group else "c")
        places[place][part] = label
        counts[place] += sum(n for _, _, n in entries)
    rows = table("layer", "weights", "score", "bits (g: a scale per group of inputs, c: per channel)")
    rows.columns[-1].justify = "left"
    scores = {f"{stack} {i}": value for (stack, i), value in planned.scores.items()}
    for place, parts in places.items():
        by_label: dict[str, list[str]] = defaultdict(list)
        for part, label in parts.items():
            by_label[label].append(part)
        usual = max(by_label, key=lambda label: len(by_label[label]))
        others = [f"{label}: {', '.join(p)}" for label, p in by_label.items() if label != usual]
        score = f"{scores[place]:.4f}" if place in scores else ""
        rows.add_row(place, f"{counts[place]:,}", score, usual + (f"; {'; '.join(others)}" if others else ""))
    return text(rows, *_loss_table(planned), *_totals(planned))


def losses_by_place(planned: Planned) -> dict[str, dict[str, float]]:
    """Place -> part (blank outside the layers) -> its predicted loss; empty where none were measured."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for w in (w for unit in planned.units for w in unit.weights):
        loss = planned.plan.entries[w.name].loss
        if loss is not None:
            place = f"{w.stack} {w.layer}" if w.layer is not None else w.name.removesuffix(".weight")
            found[place][".".join(w.name.split(".")[-3:-1]) if w.layer is not None else ""] = loss
    return found


def _loss_table(planned: Planned) -> list[Table | str]:
    """A row a layer and a column a linear; those that share a choice share their loss out by their size."""
    losses = losses_by_place(planned)
    if not losses:
        return []
    parts = list(dict.fromkeys(part for row in losses.values() for part in row if part))
    rows = table("layer", "all", *(part.replace(".", "\n") for part in parts), title="predicted loss, nats a token")
    for place, row in losses.items():
        rows.add_row(place, f"{sum(row.values()):.1e}", *(f"{row[p]:.1e}" if p in row else "" for p in parts))
    total = sum(sum(row.values()) for row in losses.values())
    return [rows, f"predicted loss of the plan: {total:.4g} nats a token"]


def _totals(planned: Planned) -> list[Table | str]:
    plan = planned.plan
    ideal = plan.total_bytes
    line = (
        f"{planned.weights:,} quantizable weights at {plan.average_bits:.4f} bits a weight, scales counted: {size(ideal)}"
        f" (bf16: {size(2 * planned.weights)}; importance: {plan.method})"
    )
    joint = ("alone it could choose from", "expected loss alone") if planned.alone else ()
    quantizers = Counter(e.quantizer for e in plan.entries.values() if e.bits < 16)
    if quantizers["gptq"]:
        line += "; " + ", ".join(f"{name}: {count} weights" for name, count in sorted(quantizers.items()))
    measured = planned.baseline
    if measured is not None:
        line += (
            f"\nmean KL rounded to nearest, measured on calibration data: {measured.planned:.4f} nats as planned, "
            f"{measured.uniform:.4f} uniform at {measured.bits:.4f} bits; the better one is taken"
        )
    rows = table("in", "true bytes", "bits a weight there", *joint)
    for target in planned.formats:
        true = planned.true_bytes(target)
        cells = [size(true), f"{true * 8 / sum(w.numel for w in planned.held_by(target)):.4f}"]
        if joint:
            alone = planned.alone[target]
            cells += [f"{', '.join(map(str, alone.widths))} bits", _saved(alone.loss_ratio)]
        rows.add_row(target, *cells)
    problem = planned.problem
    step = None if problem is None else problem.step
    if step is None:
        return [line, rows]
    time = f"{step.milliseconds(plan, planned.units):.3f} ms, of which {step.rest / 1e9:.3f} ms are not its weights"
    return [line, f"predicted decode step on {step.rates.device}: {time}", rows]


def _saved(ratio: float) -> str:
    """How much less a target alone would lose; what the solver leaves open is nothing."""
    return "the same" if ratio < 1.0005 else f"{1 - 1 / ratio:.1%} less (predicted)"


def plan_json(planned: Planned) -> dict[str, Any]:
    return {
        "model_type": planned.config["model_type"],
        "weights": planned.weights,
        "average_bits": planned.plan.average_bits,
        "total_bytes": planned.plan.total_bytes,
        "stored_bytes": {t: planned.true_bytes(t) for t in planned.formats},
        "alone": {t: asdict(a) for t, a in planned.alone.items()},
        "scores": {f"{stack}.{i}": s for (stack, i), s in planned.scores.items()},
        "baseline": None if planned.baseline is None else asdict(planned.baseline),
        "entries": {n: _entry_json(e) for n, e in planned.plan.entries.items()},
    }


def _entry_json(entry: Entry) -> dict[str, Any]:
    shown: dict[str, Any] = {"bits": entry.bits, "group_size": entry.group_size}
    if entry.quantizer != "rtn":
        shown["quantizer"] = entry.quantizer
    return shown if entry.loss is None else shown | {"loss": entry.loss}


def frontier_text(found: Frontier) -> str:
    """A row a budget: the best plan and the best uniform one within it."""
    rows = table(
        "codes and scales", "bits a weight", "predicted loss", "uniform", "its bytes", "its loss", "ours of its"
    )
    for point in found.points:
        ours = [size(point.plan.total_bytes), f"{point.plan.average_bits:.4f}", f"{point.loss:.4g}"]
        even: list[str] = ["none is that small", "", "", ""]
        if point.uniform is not None and point.uniform_loss is not None:
            share = f"{point.loss / point.uniform_loss:.1%}" if point.uniform_loss > 0 else ""
            even = [_common(point.uniform), size(point.uniform.total_bytes), f"{point.uniform_loss:.4g}", share]
        rows.add_row(*ours, *even)
    return text(rows, _measure(found))


def _measure(found: Frontier) -> str:
    if found.measured:
        return "predicted loss: nats a token, from calibration data"
    return "predicted loss: importance x weights x expected relative squared error, without data"


def _common(plan: BitPlan) -> str:
    """What most weights of a uniform plan have."""
    bits, group = Counter((e.bits, e.group_size) for e in plan.entries.values()).most_common(1)[0][0]
    return "16 bits" if bits == 16 else f"{bits} bits, group {group}"


def frontier_json(found: Frontier) -> dict[str, Any]:
    def shown(plan: BitPlan, loss: float) -> dict[str, Any]:
        return {"total_bytes": plan.total_bytes, "average_bits": plan.average_bits, "predicted_loss": loss}

    def row(point: Point) -> dict[str, Any]:
        even = None
        if point.uniform is not None and point.uniform_loss is not None:
            even = shown(point.uniform, point.uniform_loss) | {"choice": _common(point.uniform)}
        return shown(point.plan, point.loss) | {"uniform": even}

    return {"measure": _measure(found), "points": [row(point) for point in found.points]}


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


def eugen_text(report: EUGenReport) -> str:
    """A row a block: how near its EUGen comes, and what it costs before and after."""
    rows = table("block", "m, k", "error on held-out rows", "parameters", "FLOPs a token", "bytes")
    for layer in report.layers:
        before_after = [layer.parameters, layer.flops, layer.bytes]
        shown = [f"{b:,} -> {a:,} ({a / b:.2f}x)" for b, a in before_after]
        rows.add_row(layer.path, f"{layer.size.m}, {layer.size.k}", f"{layer.fit.error:.4f}", *shown)
    before, after = report.bytes
    fitted = f"fitted on {report.tokens:,} tokens of {report.sequences:,} sequences"
    return text(rows, fitted, f"model.safetensors: {size(before)} -> {size(after)}", f"checkpoint: {report.path}")


def smooth_text(report: SmoothReport) -> str:
    """A row a set of channels: what divides them, what they go to, and the error there; then what is as it was, and why."""
    at = f"{report.bits} bits, " + (f"group {report.group_size}" if report.group_size else "a scale a row")
    rows = table("channels of", "go to", "exponent", f"error of rounding, {at}")
    rows.columns[1].justify = "left"
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


def adapted_json(made: Adapted) -> dict[str, Any]:
    return asdict(made) | {"path": str(made.path)}


def adapted_text(made: Adapted) -> str:
    """What became of the tensors, and what must be trained first."""
    lines = [f"{made.model_type}: {made.copied} tensors of the source, {len(made.drawn)} drawn at random, "]
    lines[0] += f"{len(made.zeros)} zeros: {size(made.bytes)}"
    if made.train_first is not None:
        lines.append(f"train '{made.train_first}' alone first, with all else frozen: {', '.join(made.drawn[:3])} …")
    return text(*lines, f"checkpoint: {made.path}")
