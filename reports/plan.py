"""What `plan` prints."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict
from typing import Any

from rich.table import Table

from ..importance.divergence import measure_of
from ..pipeline.planned import Planned
from ..quant.frontier import Frontier, Point
from ..quant.latency import PredictedRates
from ..quant.plan import BitPlan, Entry, WeightSpec
from .tables import size, table, text


def kinds(planned: Planned) -> dict[tuple[str, str], list[tuple[int, int, int]]]:
    """(stack and layer, part) -> bits, group size (0: one scale a row) and number of its weights."""
    rows: dict[tuple[str, str], list[tuple[int, int, int]]] = defaultdict(list)
    for unit in planned.units:
        for w in unit.weights:
            entry = planned.plan.entries[w.name]
            group = 0 if entry.group_size == w.shape[1] else entry.group_size
            rows[_place(w)].append((entry.bits, group, w.numel))
    return rows


def scores_by_place(planned: Planned) -> dict[str, float]:
    """Stack and layer -> its importance."""
    return {f"{stack} {i}": score for (stack, i), score in planned.scores.items()}


def losses_by_place(planned: Planned) -> dict[str, dict[str, float]]:
    """Stack and layer -> part -> its predicted loss, nats a token; empty where none were measured."""
    losses: dict[str, dict[str, float]] = defaultdict(dict)
    for w in (w for unit in planned.units for w in unit.weights):
        loss = planned.plan.entries[w.name].loss
        if loss is not None:
            place, part = _place(w)
            losses[place][part] = loss
    return losses


def _place(weight: WeightSpec) -> tuple[str, str]:
    """(stack and layer, part) of a weight; outside the layers its name, and no part."""
    if weight.layer is None:
        return weight.name.removesuffix(".weight"), ""
    return f"{weight.stack} {weight.layer}", ".".join(weight.name.split(".")[-3:-1])


def plan_text(planned: Planned) -> str:
    """The plan: a row for each layer with the bits of its parts, then the totals for every target."""
    places: dict[str, dict[str, str]] = defaultdict(dict)
    counts: Counter[str] = Counter()
    for (place, part), entries in kinds(planned).items():
        bits, group, _ = entries[0]
        label = "16" if bits == 16 else f"{bits}" + (f"g{group}" if group else "c")
        places[place][part] = label
        counts[place] += sum(n for _, _, n in entries)
    bits_column = "bits (g: a scale per group of inputs, c: per channel)"
    rows = table("layer", "weights", "score", bits_column, left=(bits_column,))
    scores = scores_by_place(planned)
    for place, parts in places.items():
        by_label: dict[str, list[str]] = defaultdict(list)
        for part, label in parts.items():
            by_label[label].append(part)
        usual = max(by_label, key=lambda label: len(by_label[label]))
        others = [f"{label}: {', '.join(p)}" for label, p in by_label.items() if label != usual]
        score = f"{scores[place]:.4f}" if place in scores else ""
        rows.add_row(place, f"{counts[place]:,}", score, usual + (f"; {'; '.join(others)}" if others else ""))
    return text(rows, *_loss_table(planned), *_totals(planned))


def _loss_table(planned: Planned) -> list[Table | str]:
    """A row for each layer and a column for each linear; weights that share a choice have a share of its loss each."""
    losses = losses_by_place(planned)
    if not losses:
        return []
    parts = list(dict.fromkeys(part for row in losses.values() for part in row if part))
    unit = measure_of(planned.generation.task).unit
    rows = table("layer", "all", *(part.replace(".", "\n") for part in parts), title=f"predicted loss, {unit}")
    for place, row in losses.items():
        rows.add_row(place, f"{sum(row.values()):.1e}", *(f"{row[p]:.1e}" if p in row else "" for p in parts))
    total = sum(sum(row.values()) for row in losses.values())
    return [rows, f"predicted loss of the plan: {total:.4g} {unit}"]


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
    measured, measure = planned.baseline, measure_of(planned.generation.task)
    if measured is not None:
        line += (
            f"\nmean {measure.name} rounded to nearest, measured on calibration data: {measured.planned:.4g} {measure.unit} as "
            f"planned, {measured.uniform:.4g} uniform at {measured.bits:.4f} bits; the better one is taken"
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
    lines = [line, f"predicted decode step on {step.rates.device}: {time}"]
    if isinstance(step.rates, PredictedRates):
        lines.append(step.rates.note)
    return [*lines, rows]


def _saved(ratio: float) -> str:
    """How much less a target alone would lose; a difference within the solver's tolerance is none."""
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
    values: dict[str, Any] = {"bits": entry.bits, "group_size": entry.group_size}
    if entry.quantizer != "rtn":
        values["quantizer"] = entry.quantizer
    return values if entry.loss is None else values | {"loss": entry.loss}


def frontier_text(frontier: Frontier) -> str:
    """A row for each budget: the best plan and the best uniform plan within it."""
    rows = table(
        "codes and scales", "bits a weight", "predicted loss", "uniform", "its bytes", "its loss", "ours of its"
    )
    for point in frontier.points:
        ours = [size(point.plan.total_bytes), f"{point.plan.average_bits:.4f}", f"{point.loss:.4g}"]
        uniform: list[str] = ["none is that small", "", "", ""]
        if point.uniform is not None and point.uniform_loss is not None:
            share = f"{point.loss / point.uniform_loss:.1%}" if point.uniform_loss > 0 else ""
            uniform = [_common(point.uniform), size(point.uniform.total_bytes), f"{point.uniform_loss:.4g}", share]
        rows.add_row(*ours, *uniform)
    return text(rows, _measure(frontier))


def _measure(frontier: Frontier) -> str:
    if frontier.measured:
        return "predicted loss: nats a token (of a model of embeddings 1 - cosine a text), from calibration data"
    return "predicted loss: importance x weights x expected relative squared error, without data"


def _common(plan: BitPlan) -> str:
    """The bits and group size that most weights of a uniform plan have."""
    bits, group = Counter((e.bits, e.group_size) for e in plan.entries.values()).most_common(1)[0][0]
    return "16 bits" if bits == 16 else f"{bits} bits, group {group}"


def frontier_json(frontier: Frontier) -> dict[str, Any]:
    def summary(plan: BitPlan, loss: float) -> dict[str, Any]:
        return {"total_bytes": plan.total_bytes, "average_bits": plan.average_bits, "predicted_loss": loss}

    def row(point: Point) -> dict[str, Any]:
        uniform = None
        if point.uniform is not None and point.uniform_loss is not None:
            uniform = summary(point.uniform, point.uniform_loss) | {"choice": _common(point.uniform)}
        return summary(point.plan, point.loss) | {"uniform": uniform}

    return {"measure": _measure(frontier), "points": [row(point) for point in frontier.points]}
