"""A T5Gemma of 2B-2B shape, 10 GiB of random bf16, exported at 4 bits inside a memory cgroup of 2 GiB.

    python benchmarks/large_export.py DIRECTORY [--layers 26] [--limit 2g] [--keep]

Writes the checkpoint by streaming, makes a memory cgroup (needs root; version 1 or 2), runs `edgewright export` in it, and
prints its time and its peak anonymous memory. Without --keep what it wrote is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from edgewright.models import build
from edgewright.safetensors_writer import StreamingWriter

STACK = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
ROWS = 4096
SHARDS = 3


def write_checkpoint(directory: Path, layers: int) -> int:
    """Random weights of 2B-2B shape with `layers` layers a stack, in shards. Returns their bytes."""
    directory.mkdir(parents=True)
    stack = STACK | {"num_hidden_layers": layers}
    config = {"model_type": "t5gemma", "encoder": stack, "decoder": stack, "tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    model = build(config)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False) if n not in model.tied}
    names = list(shapes)
    weight_map: dict[str, str] = {}
    torch.manual_seed(0)
    # Reused at other offsets: 10 GiB of fresh normals would take minutes.
    noise = torch.randn(2 * ROWS * 9216).mul_(0.02).to(torch.bfloat16)
    total = 0
    for shard in range(SHARDS):
        part = names[shard::SHARDS]
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        with StreamingWriter(directory / file, [(n, "BF16", shapes[n]) for n in part], {"format": "pt"}) as writer:
            for at, name in enumerate(part):
                shape = shapes[name]
                rows = shape[0] if len(shape) == 2 else 1
                width = shape[-1]
                for start in range(0, rows, ROWS):
                    count = (min(rows, start + ROWS) - start) * width
                    offset = (at * 79_999 + start * 7919) % (len(noise) - count + 1)
                    writer.write(name, noise[offset : offset + count])
                    total += 2 * count
                weight_map[name] = file
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def memory_cgroup(limit: int) -> Path:
    """A fresh memory cgroup with this limit. Raises OSError without the right to make one."""
    v1 = Path("/sys/fs/cgroup/memory")
    group = (v1 if v1.is_dir() else Path("/sys/fs/cgroup")) / f"edgewright-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")).write_text(str(limit))
    return group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--limit", default="2g", help="cgroup limit in GiB, such as 2g")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    checkpoint, bundle = options.directory / "t5gemma-2b-2b-random", options.directory / "bundle"
    if not checkpoint.exists():
        start = time.monotonic()
        total = write_checkpoint(checkpoint, options.layers)
        print(f"checkpoint: {total / 2**30:.2f} GiB in bf16, written in {time.monotonic() - start:.0f} s", flush=True)
    group = memory_cgroup(int(float(options.limit.rstrip("gG")) * 2**30))
    command = [sys.executable, "-m", "edgewright.cli", "export", "-m", str(checkpoint), "--format", "onnx"]
    command += ["--bits", "4.5", "--widths", "4,8", "--no-verify", "-o", str(bundle)]
    start = time.monotonic()

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        done = subprocess.run(command, preexec_fn=enter, check=False)
        print(f"exit code {done.returncode} after {time.monotonic() - start:.0f} s in a cgroup of {options.limit}")
        peak = group / "memory.max_usage_in_bytes"
        if peak.exists():
            print(f"cgroup peak (page cache included): {int(peak.read_text()) / 2**20:.0f} MiB")
    finally:
        group.rmdir()
        if not options.keep:
            shutil.rmtree(options.directory, ignore_errors=True)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
