"""Quality per byte: perplexity, KL and top-1 agreement of plans and quantizers at the same budgets.

    python benchmarks/bench_quality.py MODEL --calibration CAL --text HELD [--windows 16] [--output FILE.json]

For each budget: mixed plans by Fisher losses, ZD and LIM, and the best uniform plan, by GPTQ, layer by layer as `edgewright
export` quantizes, with norms tuned afterwards if asked; and the uniform plan rounded to nearest. Groups are 64 and 128. Points
in the output are not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quality_text import Reference

from edgewright.calibration.prompts import Prompts
from edgewright.calibration.samples import read_samples
from edgewright.calibration.source import PART_TOKENS, Source
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.importance.candidates import Candidates
from edgewright.importance.fisher import WINDOWS
from edgewright.importance.score import ScoreOptions, Scores, score
from edgewright.pipeline.gptq import CodeStore, load_rounded, quantize_layerwise
from edgewright.pipeline.plan import plan
from edgewright.pipeline.request import BudgetOptions, CalibrationOptions, Request
from edgewright.pipeline.tune_norms import tune_norms
from edgewright.quant.allocator import Problem, allocate
from edgewright.quant.frontier import uniform
from edgewright.quant.plan import BitPlan, Budget, Choice
from edgewright.runtimes.eager import EagerSession

BUDGETS = (2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
GROUPS = (64, 128)
WIDTHS = (2, 3, 4, 5, 6, 8)
METHODS = ("fisher", "uniform", "zd", "lim")


def rounded(source: Source, made: BitPlan) -> Any:
    """The model with every planned weight as its codes and scales give it, fp32."""
    model = source.build()
    with tempfile.TemporaryDirectory() as folder:
        store = CodeStore(Path(folder))
        quantize_layerwise(source, made, store)
        load_rounded(model, source.checkpoint, made, store)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1 << 14, help="of the calibration text")
    parser.add_argument("--part-tokens", type=int, default=PART_TOKENS, help="that go through the model together")
    parser.add_argument("--fisher-windows", type=int, default=WINDOWS, help="of Fisher's backward pass")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="average bits, scales counted")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--norms", choices=("kept", "tuned"), default="kept")
    parser.add_argument("--output", type=Path, default=Path("quality.json"))
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model)
    planned = plan(Request(options.model, BudgetOptions(importance="uniform"), CalibrationOptions(quantizer="rtn")))
    units = planned.units
    samples = read_samples(options.calibration, checkpoint, planned.generation, 512, options.tokens)
    source = replace(planned.source, checkpoint=checkpoint, samples=samples, part_tokens=options.part_tokens)
    reference = Reference(checkpoint, options.text, options.windows)
    start = time.perf_counter()

    def said(text: str) -> None:
        print(f"{time.perf_counter() - start:7.0f} s  {text}", flush=True)

    said(f"{source.tokens} tokens of calibration text, perplexity {reference.perplexity:.3f} as it is")
    choices = [Choice(b, g, q) for b in WIDTHS for g in ((0,) if b == 8 else GROUPS) for q in ("rtn", "gptq")]
    prompts, candidates = Prompts([s.tokens for s in samples[:8]]), Candidates(units, choices, signed=True)
    scores = {
        m: score(ScoreOptions(m, windows=options.fisher_windows), source, candidates, prompts, said)
        for m in options.methods
    }
    about = [checkpoint.fingerprint(), str(options.calibration), str(options.text), options.windows, options.tokens]
    about += ["tuned norms"] if options.norms == "tuned" else []
    held = json.loads(options.output.read_text()) if options.output.exists() else {"about": about, "rows": []}
    if held["about"] != about:
        raise SystemExit(f"{options.output} holds points of {held['about']}: give another --output")
    rows: list[dict[str, Any]] = held["rows"]
    scored = {row["key"]: {k: row[k] for k in ("perplexity", "kl", "top1", "positions")} for row in rows}

    def run(method: str, budget: float, made: BitPlan | None) -> None:
        if made is None or any((row["method"], row["budget"]) == (method, budget) for row in rows):
            return
        lines = [(n, e.bits, e.group_size, e.quantizer, e.signed) for n, e in sorted(made.entries.items())]
        key = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
        if key not in scored:
            model = rounded(source, made)
            tuned = options.norms == "tuned" and any(e.quantizer == "gptq" for e in made.entries.values())
            if tuned and tune_norms(model, source, said) is None:
                raise SystemExit("too few --tokens to tune norms on")
            scored[key] = asdict(reference.score(EagerSession(model.graphs())))
        row = {"method": method, "budget": budget, "bits": made.average_bits, "bytes": made.total_bytes, "key": key}
        rows.append(row | scored[key])
        line = f"{method:12} {budget:.1f}: {made.average_bits:.3f} bits, KL {rows[-1]['kl']:.4f}, "
        said(line + f"perplexity {rows[-1]['perplexity']:.3f}, top-1 {rows[-1]['top1']:.4f}")
        options.output.write_text(json.dumps(held, indent=1))

    def by(made: BitPlan | None, quantizer: Any) -> BitPlan | None:
        return made and replace(made, entries={n: replace(e, quantizer=quantizer) for n, e in made.entries.items()})

    def problem(found: Scores) -> Problem:
        losses = found.losses
        if losses is not None:
            by_gptq = {u: {c: v for c, v in of.items() if c.quantizer == "gptq"} for u, of in losses.items()}
            losses = {u: by_gptq[u] or of for u, of in losses.items()}
        return Problem(units, found.weights, 0, WIDTHS, GROUPS, (), ("onnx",), found.method, losses=losses)

    budgets = [Budget("bits", value) for value in sorted(options.budgets, reverse=True)]
    for method in (m for m in options.methods if m != "uniform"):
        for budget in (b for b in budgets if method == "fisher" or b.value in BUDGETS):
            run(f"{method} gptq", budget.value, by(allocate(problem(scores[method]), budget), "gptq"))
    for quantizer in ("gptq", "rtn") if "uniform" in options.methods else ():
        for budget in budgets:
            run(f"uniform {quantizer}", budget.value, by(uniform(problem(scores["uniform"]), budget), quantizer))


if __name__ == "__main__":
    main()
