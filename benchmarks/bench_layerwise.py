"""The experiment of "Layer-wise quantization" (arXiv 2406.17415): how many layers can go to fewer bits, and in which order.

    python benchmarks/bench_layerwise.py --model DIRECTORY --text HELD.txt --calibration CALIBRATION.txt \
        [--high 8 --low 4 --group 64] [--windows 8] [--random 10] [--step 6] [--output layerwise.json] [--plot layerwise.svg]

All layers begin at the high width and go to the low one after another: the least important first by LIM, by ZD and by the loss
that Fisher predicts, the most important first (the reverses), and in random orders. Codes are rounded to nearest, scales
searched; embedding, head and norms stay as they are, so that what is seen is the layers' alone. Every `--step` layers,
perplexity and KL from the original are measured on text that calibration has not seen. The share of layers an order can lower
before perplexity is 5 % above that of all layers at the high width is then found by bisection between those points:
perplexity rises nearly, not strictly, with the number of lowered layers, so the share is that of the first crossing the grid shows.

What was measured is kept in the JSON file; the same command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from quality_text import CACHE, WINDOW, Reference

from edgewright.bundle import Generation
from edgewright.calibration.prompts import Prompts, text_windows
from edgewright.calibration.samples import Sample
from edgewright.calibration.source import Source
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.importance.candidates import Candidates
from edgewright.importance.layer_scores import score_layers
from edgewright.importance.lim_zd import order_by_importance
from edgewright.importance.score import ScoreOptions, score
from edgewright.models.loading import load_original
from edgewright.models.registry import build
from edgewright.quant.plan import Choice
from edgewright.quant.rtn import effective_group, quantize_rtn
from edgewright.quant.units import quantizable_units
from edgewright.runtimes.eager import EagerSession

CALIBRATION_WINDOWS = 16
ALLOWED_RISE = 1.05


class TwoWidths:
    """A decoder-only model of which each layer is at the high or the low width, exchanged in place."""

    def __init__(self, model: Any, high: int, low: int, group: int) -> None:
        parameters = dict(model.named_parameters())
        self.session = EagerSession(model.graphs())
        self.layers: dict[int, list[tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]]] = {}
        for unit in quantizable_units(model):
            for spec in unit.weights:
                if spec.layer is None:
                    continue
                weight, size = parameters[spec.name], effective_group(spec.shape[1], group)
                widths = [quantize_rtn(weight.data, bits, size).dequantize() for bits in (high, low)]
                self.layers.setdefault(spec.layer, []).append((weight, *widths))
            progress(f"both widths of {unit.name}")

    def lower(self, lowered: frozenset[int]) -> None:
        """Put these layers at the low width and all others at the high one."""
        for layer, weights in self.layers.items():
            for parameter, high, low in weights:
                parameter.data = low if layer in lowered else high


class Measurements:
    """Scores by the set of lowered layers, kept in a JSON file."""

    def __init__(self, file: Path, model: TwoWidths, reference: Reference, about: dict[str, Any]) -> None:
        self._file, self._model, self._reference = file, model, reference
        self.held: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"about": about, "points": {}}
        if self.held["about"] != about:
            raise SystemExit(f"{file} holds another experiment ({self.held['about']}): give another --output")

    def at(self, lowered: frozenset[int]) -> dict[str, float]:
        """{"perplexity", "kl", "top1"} with these layers lowered."""
        key, points = ",".join(map(str, sorted(lowered))), self.held["points"]
        if key not in points:
            self._model.lower(lowered)
            points[key] = asdict(self._reference.score(self._model.session))
            self.save()
            progress(f"{len(lowered)} lowered: perplexity {points[key]['perplexity']:.3f}")
        found: dict[str, float] = points[key]
        return found

    def save(self) -> None:
        self._file.write_text(json.dumps(self.held, indent=1) + "\n")


def orders(scores: dict[str, dict[int, float]], layers: int, randoms: int) -> dict[str, list[int]]:
    """Name -> the layers in the order in which they are lowered. scores: method -> layer -> score."""
    found: dict[str, list[int]] = {}
    for method, by_layer in scores.items():
        best_first = (
            sorted(by_layer, key=lambda layer: -by_layer[layer])
            if method == "fisher"
            else order_by_importance(by_layer, method)
        )
        found[method] = best_first[::-1]
        found[f"{method} reversed"] = best_first
    for seed in range(randoms):
        found[f"random {seed}"] = random.Random(seed).sample(range(layers), layers)
    return found


def crossing(measured: Measurements, order: list[int], step: int) -> int:
    """How many layers of `order` can be lowered before perplexity is 5 % above that of none."""

    def fits(count: int) -> bool:
        return measured.at(frozenset(order[:count]))["perplexity"] <= limit

    limit = ALLOWED_RISE * measured.at(frozenset())["perplexity"]
    last = len(order)
    good, bad = 0, last + 1
    for count in [*range(step, last, step), last]:
        if fits(count):
            good = count
        else:
            bad = count
            break
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def curves(measured: Measurements, ways: dict[str, list[int]], step: int) -> dict[str, dict[int, dict[str, float]]]:
    """Order -> number of lowered layers -> scores, at 0, step, 2 step … and all."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for name, order in ways.items():
        counts = [*range(0, len(order), step), len(order)]
        found[name] = {count: measured.at(frozenset(order[:count])) for count in counts}
    return found


def table(shares: dict[str, int], lines: dict[str, dict[int, dict[str, float]]], layers: int) -> str:
    """Markdown: each order's share and its perplexity at the grid's points, the random orders as mean (least … most)."""
    counts = list(next(iter(lines.values())))
    heads = ["order", "layers within 5 %", *(f"perplexity, {count} lowered" for count in counts)]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in (n for n in shares if not n.startswith("random")):
        values = " | ".join(f"{lines[name][count]['perplexity']:.2f}" for count in counts)
        rows.append(f"| {name} | {shares[name]} of {layers} ({shares[name] / layers:.0%}) | {values} |")
    chance = [n for n in shares if n.startswith("random")]
    if chance:
        parts = [shares[n] for n in chance]
        values = " | ".join(spread([lines[n][count]["perplexity"] for n in chance]) for count in counts)
        mean = statistics.mean(parts)
        rows.append(
            f"| random, {len(chance)} seeds | {mean:.1f} ({mean / layers:.0%}; {min(parts)} … {max(parts)}) | {values} |"
        )
    return "\n".join(rows)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f} … {max(values):.2f})"


def plot(path: Path, lines: dict[str, dict[int, dict[str, float]]], about: dict[str, Any]) -> None:
    """Perplexity against the number of lowered layers; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, line in lines.items():
        values = [point["perplexity"] for point in line.values()]
        if name.startswith("random"):
            axes.plot(list(line), values, color="0.75", linewidth=0.8, label="random" if name == "random 0" else None)
        else:
            axes.plot(list(line), values, "--" if "reversed" in name else "-", marker="o", markersize=3, label=name)
    base = next(iter(lines.values()))[0]["perplexity"]
    axes.axhline(ALLOWED_RISE * base, color="k", linewidth=0.6, linestyle=":", label="5 % above none")
    axes.set_yscale("log")
    axes.set_xlabel(f"layers at {about['low']} bits, the others at {about['high']}")
    axes.set_ylabel("perplexity")
    axes.set_title(f"{about['model']}, groups of {about['group']}")
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Layers to fewer bits in LIM, ZD, reverse and random order.")
    parser.add_argument("--model", required=True, help="a decoder-only checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--calibration", type=Path, required=True, help="text for LIM")
    parser.add_argument("--high", type=int, default=8)
    parser.add_argument("--low", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--random", type=int, default=10, help="random orders")
    parser.add_argument("--step", type=int, default=6, help="layers between the points of the curves")
    parser.add_argument("--output", type=Path, default=Path("layerwise.json"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint(options.model)
    model = build(checkpoint.config)
    reference = Reference(checkpoint, options.text, options.windows, cache=options.cache)

    prompts = Prompts(text_windows(options.calibration, checkpoint.tokenizer, WINDOW, CALIBRATION_WINDOWS))
    spec = Generation(task="causal", vocab=reference.vocabulary, max_context=model.max_context, max_new_tokens=1)
    units = quantizable_units(model)
    source = Source(checkpoint, checkpoint.config, spec, [Sample(tuple(prompt)) for prompt in prompts.tokens])
    scores: dict[str, dict[int, float]] = {}
    for method in ("lim", "zd"):
        found = score_layers(method, source, units, prompts, progress)
        scores[method] = {layer: score for (_, layer), score in found.items()}
    low = Candidates(units, [Choice(options.low, options.group)])
    losses = score(ScoreOptions("fisher"), source, low, progress=progress).layers
    scores["fisher"] = {layer: loss for (_, layer), loss in losses.items()}

    load_original(model, checkpoint)
    about = {
        "model": Path(options.model).name,
        "high": options.high,
        "low": options.low,
        "group": options.group,
        "positions": options.windows * (WINDOW - 1),
        "original_perplexity": reference.perplexity,
    }
    two = TwoWidths(model, options.high, options.low, options.group)
    measured = Measurements(options.output, two, reference, about)
    ways = orders(scores, len(two.layers), options.random)
    shares = {name: crossing(measured, order, options.step) for name, order in ways.items()}
    lines = curves(measured, ways, options.step)
    measured.held |= {"scores": scores, "orders": ways, "shares": shares, "layers": len(two.layers), "curves": lines}
    measured.save()
    if options.plot is not None:
        plot(options.plot, lines, about)
    print(table(shares, lines, len(two.layers)))


if __name__ == "__main__":
    main()
