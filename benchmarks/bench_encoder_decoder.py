"""An encoder-decoder against a decoder-only model of equal parameters and bits (arXiv 2501.16273), interleaved.

    python benchmarks/bench_encoder_decoder.py DIRECTORY [--input 512] [--new 64] [--rounds 7] [--threads 2]

Random weights at 4 bits, ONNX on this CPU. The encoder-decoder is Mu's shape made smaller: two thirds of the layers encode.
First-token latency of an input, and tokens a second of the answer behind it: medians of ratios.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from random_checkpoint import write_random

from edgewright.bundle import Bundle, Generation
from edgewright.runtimes.generate import Stream
from edgewright.runtimes.registry import open_session
from edgewright.runtimes.session import Session

MODELS: dict[str, dict[str, Any]] = {
    "encoder-decoder": {
        "model_type": "mu",
        "d_model": 640,
        "num_layers": 12,
        "num_decoder_layers": 6,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "d_kv": 64,
        "d_ff": 2560,
        "vocab_size": 8192,
        "n_positions": 2048,
    },
    # Equal in parameters: the cross-attention of six layers goes into the FFNs.
    "decoder-only": {
        "model_type": "llama",
        "hidden_size": 640,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 1792,
        "hidden_act": "silu",
        "vocab_size": 8192,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
}


def prepared(directory: Path, name: str) -> Path:
    """The bundle of a model, made if it is not there."""
    checkpoint, bundle = directory / name, directory / f"{name}-bundle"
    if not bundle.exists():
        if not checkpoint.exists():
            print(f"{name}: {write_random(checkpoint, MODELS[name]) / 1e6:.1f}M parameters", flush=True)
        command = [
            sys.executable,
            "-m",
            "edgewright.cli",
            "export",
            "-m",
            str(checkpoint),
            "--bits",
            "4.5",
            "--widths",
            "4",
        ]
        command += ["--group-size", "32", "--importance", "uniform", "--no-verify", "-o", str(bundle)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return bundle


def once(session: Session, spec: Generation, tokens: list[int], new: int) -> tuple[float, float]:
    """(seconds to the first token, tokens a second of the `new` that follow)."""
    start = time.perf_counter()
    stream = Stream(session, spec, [tokens], new + 1)
    chosen = stream.prefill()[:, -1].argmax(-1)
    first = time.perf_counter()
    for _ in range(new):
        chosen = stream.feed(chosen[:, None].astype(np.int64))[:, -1].argmax(-1)
    return first - start, new / (time.perf_counter() - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--input", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    sessions = {}
    for name in MODELS:
        bundle = Bundle.open(prepared(options.directory, name))
        size = bundle.target("onnx").stored_bytes
        print(f"{name}: {bundle.manifest.weights / 1e6:.1f}M weights, {size / 1e6:.1f} MB", flush=True)
        sessions[name] = open_session(bundle, "onnx", options.threads), bundle.manifest.generation
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 8192, options.input).tolist()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sessions}
    for round in range(options.rounds + 1):
        for name, (session, spec) in sessions.items():
            result = once(session, spec, tokens, options.new)
            if round:  # the first warms up
                found[name].append(result)
    for name, rows in found.items():
        first, rate = (statistics.median(values) for values in zip(*rows))
        print(f"  {name}: first token {1e3 * first:.1f} ms, {rate:.1f} tokens/s (medians of {len(rows)}, measured)")
    pairs = list(zip(found["encoder-decoder"], found["decoder-only"], strict=True))
    latency = statistics.median(e[0] / d[0] for e, d in pairs)
    rate = statistics.median(e[1] / d[1] for e, d in pairs)
    print(
        f"  first token {1 - latency:+.0%} lower ({latency:.2f}x), throughput {rate:.2f}x; input {options.input}, "
        f"{options.new} new tokens, {options.threads} threads"
    )


if __name__ == "__main__":
    main()
