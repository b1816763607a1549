"""How long a billion weights take to round to nearest, against copying their file and reading it.

    python benchmarks/bench_rtn.py DIRECTORY [--weights 1e9] [--bits 4] [--group 128] [--rounds 3]

Writes a safetensors file of random bf16 matrices (4096 x 4096), then in turn copies it, and quantizes it into a quantized
checkpoint, so many rounds; prints medians and the ratio. The page cache holds the file where memory allows: say so with it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import torch

from edgewright.checkpoints.opening import open_checkpoint
from edgewright.checkpoints.safetensors_writer import StreamingWriter
from edgewright.quant.plan import BitPlan, Budget, Entry
from edgewright.quant.quantize_checkpoint import quantize_checkpoint
from edgewright.system.memory_peak import PeakAnonymous

SIDE = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--weights", type=float, default=1e9)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    source, count = options.directory / "source", round(options.weights / SIDE**2)
    source.mkdir(parents=True)
    torch.manual_seed(0)
    noise = torch.randn(SIDE, SIDE).mul_(0.02).to(torch.bfloat16)
    names = [f"layers.{i}.weight" for i in range(count)]
    with StreamingWriter(source / "model.safetensors", [(n, "BF16", (SIDE, SIDE)) for n in names], {}) as writer:
        for i, name in enumerate(names):
            writer.write(name, noise.roll(i, 1))
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    entry = Entry(options.bits, options.group, 1.0, "")
    plan = BitPlan(1, "uniform", Budget("bits", float(options.bits)), dict.fromkeys(names, entry), 0.0, 0)
    times: dict[str, list[float]] = {"copy": [], "quantize": []}
    with PeakAnonymous() as peak:
        for i in range(options.rounds):
            start = time.perf_counter()
            shutil.copyfile(source / "model.safetensors", options.directory / "copy")
            times["copy"].append(time.perf_counter() - start)
            (options.directory / "copy").unlink()
            start = time.perf_counter()
            quantize_checkpoint(open_checkpoint(str(source)), plan, {}, options.directory / f"quantized{i}", ())
            times["quantize"].append(time.perf_counter() - start)
            shutil.rmtree(options.directory / f"quantized{i}")
    shutil.rmtree(options.directory)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"{count * SIDE**2 / 1e9:.2f}e9 weights, {options.bits} bits g{options.group}, {torch.get_num_threads()} threads: "
        f"copy {medians['copy']:.1f} s, quantize {medians['quantize']:.1f} s ({medians['quantize'] / medians['copy']:.1f} "
        f"times), peak anonymous memory {peak.bytes / 2**20:.0f} MiB; all: {times}"
    )


if __name__ == "__main__":
    main()
