"""SmolLM2-135M on one thread: Edgewright's ONNX and ExecuTorch, llama.cpp and onnxruntime-genai, interleaved in one run.

    python benchmarks/bench_smollm2.py [--rounds 7] [--group 64] [--bundle EXISTING]

Installs the peers (see `peers.py`), exports the bundle from the same GGUF, asks all workers in turn, and prints medians
and the ratios that matter: time of a decode step and rate of a prefill against each peer, peak memory.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from peers import CACHE, CHAT, HERE, WorkerProcess, memory_of, source_gguf, start_peers

CONTEXTS = (128, 1024)
FORMATS = ("onnx", "executorch")


def bundle_of(group: int) -> Path:
    """The bundle of the same weights, 4 bits everywhere in groups of `group`, exported and verified once."""
    target = CACHE / f"smollm2-edgewright-4g{group}-{'-'.join(FORMATS)}"
    if not target.exists():
        command = [sys.executable, "-m", "edgewright.cli", "export", "-m", str(source_gguf()), "--widths", "4"]
        command += ["--group-size", str(group), "--bits", str(4 + 16 / group), "--importance", "uniform"]
        command += [part for name in FORMATS for part in ("--format", name)]
        subprocess.run([*command, "-o", str(target)], check=True)
    return target


def ours(bundle: Path) -> list[WorkerProcess]:
    worker = [sys.executable, str(HERE / "worker_edgewright.py"), str(bundle)]
    return [WorkerProcess(f"edgewright {name}", [*worker, name]) for name in FORMATS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--group", type=int, default=64, choices=(32, 64), help="inputs a scale; llama.cpp's Q4_0 has 32"
    )
    parser.add_argument("--bundle", type=Path)
    options = parser.parse_args()
    bundle = options.bundle or bundle_of(options.group)
    workers = [*ours(bundle), *start_peers()]
    for worker in workers:
        print(f"{worker.name}: {worker.ask('load', threads=1)['system']}", file=sys.stderr)
    for worker in workers:
        print(f"{worker.name} says: {worker.ask('generate', prompt=CHAT, n=24)['text']!r}", file=sys.stderr)

    prefill: dict[str, list[float]] = {w.name: [] for w in workers}
    steps: dict[tuple[str, int], list[float]] = {(w.name, c): [] for w in workers for c in CONTEXTS}
    for _ in range(options.rounds):
        for worker in workers:
            prefill[worker.name].append(worker.ask("prefill", n=512)["seconds"])
        for context in CONTEXTS:
            for worker in workers:
                seconds = worker.ask("decode", context=context, n=32)["seconds_per_token"]
                steps[worker.name, context].append(statistics.median(seconds))
    for worker in workers:
        worker.close()
    peaks = {w.name: memory_of(w) for w in [*ours(bundle), *start_peers()]}

    print(f"{platform.machine()}, {bundle.name}, 1 thread, medians of {options.rounds} interleaved rounds")
    print("| runtime | ms/token at 128 | at 1024 | prefill 512, tok/s | peak MB |\n|---|---|---|---|---|")
    for name in prefill:
        near, far = (1e3 * statistics.median(steps[name, c]) for c in CONTEXTS)
        speed = 512 / statistics.median(prefill[name])
        print(f"| {name} | {near:.2f} | {far:.2f} | {speed:.0f} | {peaks[name]:.0f} |")
    print("\nagainst (median of the rounds' ratios; time below 1 and rate above 1 are better):")
    print("| ours | against | step time at 128 | at 1024 | prefill rate | peak memory |\n|---|---|---|---|---|---|")
    for mine in list(prefill)[: len(FORMATS)]:
        for name in (n for n in prefill if n != mine):
            near, far = (_ratio(steps[mine, c], steps[name, c]) for c in CONTEXTS)
            rate = _ratio(prefill[name], prefill[mine])
            print(f"| {mine} | {name} | {near:.2f}x | {far:.2f}x | {rate:.2f}x | {peaks[mine] / peaks[name]:.2f}x |")


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
