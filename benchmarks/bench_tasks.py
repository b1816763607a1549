"""Task accuracy and agreement of the examples at several budgets, measured on the exported ONNX artefact.

    python benchmarks/bench_tasks.py [EXAMPLE ...] [--budgets 2.5 3 …] [--norms tuned] [--output FILE.json]

The first half of an example's held-out task file is for calibration, the second for the test. Agreement is the share of
the test's prompts that the artefact answers with the same tokens as the original does. Points in the output are not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgewright.bundle import Bundle, Generation
from edgewright.calibration.prompts import Task, read_task
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.checkpoints.tokenizer import Tokenizer
from edgewright.compiler import export
from edgewright.models.loading import load_original
from edgewright.models.registry import build
from edgewright.pipeline.plan import plan
from edgewright.pipeline.request import BudgetOptions, CalibrationOptions, CheckOptions, Request
from edgewright.quant.allocator import allocate
from edgewright.quant.frontier import uniform
from edgewright.quant.plan import BitPlan, Budget
from edgewright.runtimes.eager import EagerSession
from edgewright.runtimes.generate import generate_batch
from edgewright.runtimes.registry import open_session
from edgewright.runtimes.session import Session

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = ("t5gemma-g2p", "deltanet-g2p", "dolphin-packages")
BUDGETS = (2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
METHODS = ("fisher gptq", "zd gptq", "lim gptq", "uniform gptq", "uniform rtn")
BATCH = 50


def answers(session: Session, spec: Generation, tokenizer: Tokenizer, task: Task) -> list[list[int]]:
    """The greedy answer to each prompt, in order."""
    order = sorted(range(len(task.prompts)), key=lambda i: len(task.prompts[i]))  # little padding
    found: list[list[int]] = [[]] * len(order)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        ids = [tokenizer.encode(task.prompts[i]) for i in rows]
        contexts = [tokenizer.encode(task.contexts[i], special=False) for i in rows if task.contexts]
        for row, tokens in zip(rows, generate_batch(session, spec, ids, spec.max_new_tokens, contexts), strict=True):
            found[row] = list(tokens)
    return found


def accuracy(found: list[list[int]], tokenizer: Tokenizer, task: Task) -> float:
    return sum(tokenizer.decode(t).strip() in a for t, a in zip(found, task.answers, strict=True)) / len(found)


def halves(file: Path, folder: Path) -> tuple[Path, Path]:
    """Two task files of a task file's lines."""
    lines = file.read_text().splitlines(keepends=True)
    paths = folder / "calibration.tsv", folder / "test.tsv"
    for path, part in zip(paths, (lines[: len(lines) // 2], lines[len(lines) // 2 :]), strict=True):
        path.write_text("".join(part))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("examples", nargs="*", default=NAMES)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="average bits, scales counted")
    parser.add_argument("--norms", choices=("kept", "tuned"), default="kept")
    parser.add_argument("--output", type=Path, default=Path("tasks.json"))
    options = parser.parse_args()
    held = json.loads(options.output.read_text()) if options.output.exists() else {"norms": options.norms, "rows": []}
    if not isinstance(held, dict) or held["norms"] != options.norms:
        raise SystemExit(f"{options.output} does not hold points with norms {options.norms}: give another --output")
    for name in options.examples:
        with tempfile.TemporaryDirectory() as temporary:
            _measure(name, options, held, Path(temporary))


def plans(source: Path, calibration: Path, budgets: list[float]) -> Iterator[tuple[str, float, BitPlan]]:
    """(method, budget, plan), each method's weights scored once; a uniform plan gives all weights one width and group."""
    for method in METHODS:
        importance, quantizer = method.split()
        asked = "zd" if importance == "uniform" else importance
        made = plan(
            Request(
                str(source),
                BudgetOptions(bits=max(budgets), importance=asked),
                CalibrationOptions(quantizer="gptq", task=calibration),
            )
        )
        assert made.problem is not None
        for bits in budgets:
            budget = Budget("bits", bits)
            found = (uniform if importance == "uniform" else allocate)(made.problem, budget)
            if found is None:
                continue
            entries = {n: replace(e, quantizer=quantizer) for n, e in found.entries.items()}  # type: ignore[arg-type]
            yield method, bits, replace(found, entries=entries)


def _measure(name: str, options: argparse.Namespace, held: dict[str, Any], work: Path) -> None:
    rows: list[dict[str, object]] = held["rows"]
    checkpoint = open_checkpoint(str(EXAMPLES / name))
    assert checkpoint.tokenizer is not None
    model = build(checkpoint.config)
    load_original(model, checkpoint)
    original: list[list[int]] | None = None
    calibration, test = halves(EXAMPLES / name / "task.tsv", work)
    start = time.perf_counter()
    for method, bits, made in plans(EXAMPLES / name, calibration, options.budgets):
        if any((r["example"], r["method"], r["budget"]) == (name, method, bits) for r in rows):
            continue
        out = work / f"{method}-{bits}"
        data = calibration if "gptq" in method else None
        export(
            Request(
                str(EXAMPLES / name),
                BudgetOptions(plan=made),
                CalibrationOptions(task=data, norms=options.norms),
                checks=CheckOptions(verify=False),
            ),
            out,
        )
        bundle = Bundle.open(out)
        spec = bundle.manifest.generation
        task = read_task(test, None, spec.task == "memory")
        tokenizer = checkpoint.tokenizer
        if original is None:
            original = answers(EagerSession(model.graphs()), spec, tokenizer, task)
        found = answers(open_session(bundle, "onnx", 0), spec, tokenizer, task)
        row = {
            "example": name,
            "method": method,
            "budget": bits,
            "bits": made.average_bits,
            "bytes": made.total_bytes,
            "accuracy": accuracy(found, tokenizer, task),
            "agreement": sum(a == b for a, b in zip(found, original, strict=True)) / len(found),
            "original": accuracy(original, tokenizer, task),
        }
        rows.append(row)
        options.output.write_text(json.dumps(held, indent=1))
        print(
            f"{time.perf_counter() - start:6.0f} s  {name} {method} {bits}: {row['bits']:.3f} bits, right {row['accuracy']:.3f} "
            f"(original {row['original']:.3f}), as the original {row['agreement']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
