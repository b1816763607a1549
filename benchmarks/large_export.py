"""A T5Gemma of 2B-2B shape, 10 GiB of random bf16, exported at 4 bits inside a memory cgroup.

    python benchmarks/large_export.py DIRECTORY [--layers 26] [--limit 2g] [--keep]
    python benchmarks/large_export.py DIRECTORY --limit 4g --gptq TEXT --tokenizer TOKENIZER.json --kills 5

Writes the checkpoint by streaming, makes a memory cgroup (needs root; version 1 or 2), runs `edgewright export` in it, and
prints its time and its peak anonymous memory. With --kills it runs once more, killed so many times at random points and
begun again, and compares every file. Without --keep what it wrote is removed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from edgewright.checkpoints.safetensors_writer import StreamingWriter
from edgewright.models.registry import build

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


def export_in(group: Path, command: list[str], seconds: float | None = None) -> tuple[int, float]:
    """Run `command` in the cgroup, killed by SIGKILL after `seconds`. Returns its exit code and how long it took."""
    start = time.monotonic()

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    process = subprocess.Popen(command, preexec_fn=enter)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return process.returncode, time.monotonic() - start


def digests(bundle: Path) -> dict[str, str]:
    """SHA-256 of every file but the reports, which hold times."""
    found = {}
    for path in sorted(p for p in bundle.rglob("*") if p.is_file() and "reports" not in p.parts):
        with path.open("rb") as file:
            found[str(path.relative_to(bundle))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--limit", default="2g", help="cgroup limit in GiB, such as 2g")
    parser.add_argument("--gptq", type=Path, metavar="TEXT", help="GPTQ on this text with --memory-limit, else RTN")
    parser.add_argument("--tokenizer", type=Path, help="with --gptq: a tokenizer.json of no more than 256,000 tokens")
    parser.add_argument("--kills", type=int, default=0, help="then once more, killed so many times at random points")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    checkpoint = options.directory / "t5gemma-2b-2b-random"
    if not checkpoint.exists():
        start = time.monotonic()
        total = write_checkpoint(checkpoint, options.layers)
        print(f"checkpoint: {total / 2**30:.2f} GiB in bf16, written in {time.monotonic() - start:.0f} s", flush=True)
    group = memory_cgroup(int(float(options.limit.rstrip("gG")) * 2**30))
    command = [
        sys.executable,
        "-m",
        "edgewright.cli",
        "export",
        "-m",
        str(checkpoint),
        "--format",
        "onnx",
        "--no-verify",
    ]
    if options.gptq is None:
        command += ["--bits", "4.5", "--widths", "4,8", "-o"]
    else:
        shutil.copyfile(options.tokenizer, checkpoint / "tokenizer.json")
        command += ["--bits", "4.125", "--widths", "4", "--group-size", "128", "--quantizer", "gptq"]
        command += ["--calibration", str(options.gptq), "--memory-limit", options.limit, "-o"]
    try:
        whole = options.directory / "bundle"
        code, took = export_in(group, [*command, str(whole)])
        print(f"exit code {code} after {took:.0f} s in a cgroup of {options.limit}", flush=True)
        peak = group / "memory.max_usage_in_bytes"
        if peak.exists():
            print(f"cgroup peak (page cache included): {int(peak.read_text()) / 2**20:.0f} MiB", flush=True)
        if code == 0 and options.kills:
            want = digests(whole)
            shutil.rmtree(whole)  # two bundles beside the checkpoint would fill a small disk
            killed = options.directory / "killed"
            moments = random.Random(options.seed)
            for i in range(options.kills):
                code, after = export_in(
                    group, [*command, str(killed)], moments.uniform(20, 2 * took / (options.kills + 1))
                )
                print(f"kill {i + 1}: exit code {code} after {after:.0f} s", flush=True)
            code, after = export_in(group, [*command, str(killed)])
            same = code == 0 and digests(killed) == want
            print(
                f"last run: exit code {code} after {after:.0f} s; {len(want)} files byte-identical: {same}", flush=True
            )
            code = code or int(not same)
    finally:
        group.rmdir()
        if not options.keep:
            shutil.rmtree(options.directory, ignore_errors=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
