"""Quality per byte: perplexity, KL and top-1 agreement of plans and quantizers at the same budgets.

    python benchmarks/bench_quality.py MODEL --calibration CAL --text HELD [--windows 16] [--output FILE.json]

For each budget: the best uniform plan rounded to nearest and by GPTQ, and mixed plans by ZD, LIM and Fisher losses, by GPTQ. So
that many plans cost little, every weight's codes at a choice are made once, on the Hessians of the original model; `edgewright
export` goes layer by layer instead, each on what the quantized ones before it give. Groups are 64 and 128.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from quality_text import Reference
from torch import nn

from edgewright.calibration import Sample, Walk, read_samples
from edgewright.checkpoint import Checkpoint, open_checkpoint
from edgewright.compiler import Request, plan
from edgewright.divergence import measured_kl
from edgewright.models import build
from edgewright.models.layers import Linear
from edgewright.models.loading import load_original
from edgewright.quant.allocate import Problem, plan_within
from edgewright.quant.frontier import uniform
from edgewright.quant.gptq import Factor, damping_for, factor, quantize_gptq
from edgewright.quant.plan import BitPlan, Budget, Choice, Entry
from edgewright.quant.rtn import quantize_rtn
from edgewright.runtimes.eager import EagerSession
from edgewright.scoring import Probes, Scores, score
from edgewright.sensitivity import evenly

BUDGETS = (2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
GROUPS = (64, 128)
WIDTHS = (2, 3, 4, 5, 6, 8)


class Codes:
    """Values of weights at any choice, each made once and kept in float16 (which holds code times scale to 11 bits)."""

    def __init__(self, checkpoint: Checkpoint, factors: dict[str, Factor]) -> None:
        self._checkpoint, self._factors = checkpoint, factors
        self._made: dict[tuple[Any, ...], tuple[torch.Tensor, ...]] = {}
        self.seconds = 0.0

    def value(self, name: str, entry: Entry) -> torch.Tensor:
        if entry.bits == 16:
            return self._checkpoint.tensor(name).to(torch.bfloat16).float()
        made = self._factors.get(name) if entry.quantizer == "gptq" else None
        key = (name, entry.bits, entry.group_size, made is None)
        if key not in self._made:
            start = time.perf_counter()
            weight = self._checkpoint.tensor(name)
            self._made[key] = (
                quantize_rtn(weight, entry.bits, entry.group_size)
                if made is None
                else quantize_gptq(weight, made, entry.bits, entry.group_size)
            )
            self.seconds += time.perf_counter() - start
        return self._made[key].dequantize()


def factors(checkpoint: Checkpoint, config: dict[str, Any], spec: Any, samples: list[Sample]) -> dict[str, Factor]:
    """The factor of every linear's inputs in the original model."""
    found: dict[str, Factor] = {}
    last: list[Any] = [None, None]

    def visit(name: str, _: Linear, x: torch.Tensor) -> None:
        if last[0] is not x:
            rows = walk.rows(x)
            last[:] = [x, factor((rows.T @ rows) / len(rows), damping_for(rows.shape[1], len(rows)))]
        found[name] = last[1]

    walk = Walk(build(config), checkpoint, spec, samples, visit=visit)
    walk.to_head()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1 << 15, help="of the calibration text")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="average bits, scales counted")
    parser.add_argument("--output", type=Path, default=Path("quality.json"))
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model)
    planned = plan(Request(options.model, quantizer="rtn", importance="uniform"))
    spec, units, config = planned.generation, planned.units, planned.config
    samples = read_samples(options.calibration, checkpoint, spec, 512, options.tokens)
    reference = Reference(checkpoint, options.text, options.windows)
    start = time.perf_counter()

    def said(text: str) -> None:
        print(f"{time.perf_counter() - start:7.0f} s  {text}", flush=True)

    codes = Codes(checkpoint, factors(checkpoint, config, spec, samples))
    said(f"Hessians of {sum(s.size for s in samples)} tokens")
    choices = [Choice(b, g, q) for b in WIDTHS for g in ((0,) if b == 8 else GROUPS) for q in ("rtn", "gptq")]
    windows = [s.tokens for s in samples]
    probes = Probes([list(w) for w in windows[:8]])
    scores = {
        m: score(m, checkpoint, config, units, choices, spec, probes, samples, progress=said)
        for m in ("uniform", "zd", "lim", "fisher")
    }
    session_model = build(config)
    load_original(session_model, checkpoint)
    session = EagerSession(session_model.graphs())
    modules = [(session_model.tied.get(f"{p}.weight", f"{p}.weight"), m) for p, m in session_model.named_modules()]
    held = {n for u in units for n in (w.name for w in u.weights)}
    rows: list[dict[str, Any]] = []
    scored: dict[str, dict[str, float]] = {}

    def run(method: str, budget: float, made: BitPlan | None, losses: float | None = None) -> None:
        if made is None:
            return
        key = json.dumps([(n, e.bits, e.group_size, e.quantizer) for n, e in sorted(made.entries.items())])
        if key not in scored:
            values: dict[str, nn.Parameter] = {}
            for name, module in modules:
                if name in held and hasattr(module, "weight"):
                    if name not in values:
                        values[name] = nn.Parameter(codes.value(name, made.entries[name]), requires_grad=False)
                    module.weight = values[name]
            scored[key] = asdict(reference.score(session))
        row = {"method": method, "budget": budget, "bits": made.average_bits, "bytes": made.total_bytes} | scored[key]
        rows.append(row)
        line = f"{method:12} {budget:.1f}: {made.average_bits:.3f} bits, KL {row['kl']:.4f}, "
        said(line + f"perplexity {row['perplexity']:.3f}, top-1 {row['top1']:.4f}")
        options.output.write_text(json.dumps(rows, indent=1))

    def by(made: BitPlan | None, quantizer: Any) -> BitPlan | None:
        return made and replace(made, entries={n: replace(e, quantizer=quantizer) for n, e in made.entries.items()})

    def problem(found: Scores) -> Problem:
        losses = found.losses
        if losses is not None:
            by_gptq = {u: {c: v for c, v in of.items() if c.quantizer == "gptq"} for u, of in losses.items()}
            losses = {u: by_gptq[u] or of for u, of in losses.items()}
        return Problem(units, found.weights, 0, WIDTHS, GROUPS, (), (), found.method, losses=losses)

    few = evenly(samples, 8)
    budgets = [Budget("bits", value) for value in sorted(options.budgets, reverse=True)]
    for budget in budgets:
        run("fisher gptq", budget.value, plan_within(problem(scores["fisher"]), budget))
    for quantizer in ("gptq", "rtn"):
        for budget in budgets:
            run(f"uniform {quantizer}", budget.value, by(uniform(problem(scores["uniform"]), budget), quantizer))
    for method in ("zd", "lim"):
        for budget in (b for b in budgets if b.value in BUDGETS):
            run(f"{method} gptq", budget.value, by(plan_within(problem(scores[method]), budget), "gptq"))
    for budget in budgets:
        ours, even = plan_within(problem(scores["fisher"]), budget), uniform(problem(scores["uniform"]), budget)
        if even is not None:
            a, b = measured_kl(checkpoint, config, [ours, even], spec, few)
            said(f"{budget.value}: on calibration data, rounded to nearest: {a:.4f} planned, {b:.4f} uniform")
    said(f"codes took {codes.seconds:.0f} s")


if __name__ == "__main__":
    main()
