"""What `plan --plot` draws: a plan by layer, and the frontier. matplotlib is imported inside the functions."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..importance.divergence import measure_of
from ..pipeline.planned import Planned
from ..quant.frontier import Frontier
from ..system.writing import write_file
from .plan import kinds, losses_by_place, scores_by_place


def plot_plan(planned: Planned, path: Path) -> None:
    """Draw scores, average bits and, where measured, losses by layer to a PNG, SVG or PDF file.

    Raises UserError if matplotlib is missing or the file cannot be written.
    """
    weights: Counter[str] = Counter()
    bits: Counter[str] = Counter()
    for (place, _), entries in kinds(planned).items():
        weights[place] += sum(n for _, _, n in entries)
        bits[place] += sum(b * n for b, _, n in entries)
    places = list(weights)
    losses = losses_by_place(planned)
    figure = _figure(path, (max(6, 0.35 * len(places)), 7.5 if losses else 5))
    above, below, *lowest = figure.subplots(3 if losses else 2, 1, sharex=True)
    scores = scores_by_place(planned)
    scored = [i for i, p in enumerate(places) if p in scores]
    above.bar(scored, [scores[places[i]] for i in scored], color="tab:blue")
    above.set_ylabel(f"{planned.plan.method} score")
    below.bar(range(len(places)), [bits[p] / weights[p] for p in places], color="tab:orange")
    below.set_ylabel("code bits a weight")
    for number, part in enumerate(dict.fromkeys(part for row in losses.values() for part in row)):
        at = [i for i, place in enumerate(places) if part in losses.get(place, {})]
        values = [losses[places[i]][part] for i in at]
        lowest[0].plot(at, values, "osD^"[number // 10 % 4], markersize=4, label=part or "whole")
    if losses:
        lowest[0].set_yscale("log")
        lowest[0].set_ylabel(f"predicted loss, {measure_of(planned.generation.task).unit}")
        lowest[0].legend(fontsize=6, ncols=4)
    (lowest or [below])[0].set_xticks(range(len(places)), places, rotation=90, fontsize=7)
    figure.suptitle(f"{planned.config['model_type']}: {planned.plan.average_bits:.3f} bits a weight, scales counted")
    _save(figure, path)


def plot_frontier(frontier: Frontier, name: str, path: Path) -> None:
    """Draw predicted loss against bytes, uniform plans beside it, to a PNG, SVG or PDF file. Errors as of `plot_plan`."""
    figure = _figure(path, (7, 5))
    axes = figure.subplots()
    points = [(p.plan.total_bytes, p.loss) for p in frontier.points]
    uniform = sorted(
        {(p.uniform.total_bytes, p.uniform_loss) for p in frontier.points if p.uniform is not None and p.uniform_loss}
    )
    axes.plot([b / 1e6 for b, _ in points], [loss for _, loss in points], "o-", label="allocated")
    axes.plot([b / 1e6 for b, _ in uniform], [loss for _, loss in uniform], "s", color="tab:gray", label="uniform")
    if all(loss > 0 for _, loss in points):
        axes.set_yscale("log")
    axes.set_xlabel("codes and scales, MB")
    axes.set_ylabel("predicted loss" + (", nats a token" if frontier.measured else " (relative)"))
    axes.set_title(name)
    axes.legend()
    _save(figure, path)


def _figure(path: Path, inches: tuple[float, float]) -> Any:
    """An empty matplotlib figure for `path`. Raises UserError if matplotlib is missing or cannot write such a file."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'edgewright[plot]'") from None
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {path}: the name must end in .png, .svg or .pdf")
    return Figure(figsize=inches, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.lower()[1:])
    write_file(path, drawn.getvalue(), "--plot")
