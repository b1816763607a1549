"""A context read into memory (Dolphin, arXiv 2408.15518) against the same context through the main decoder, interleaved.

    python benchmarks/bench_dolphin.py DIRECTORY [--shape scaled|full] [--context 4096] [--rounds 5] [--threads 2]

Random weights at 4 bits, ONNX on this CPU, time to the first token of an answer to a question of 16 tokens: medians, ratios,
and the ratio of energy that the operations and bytes of both ways predict. A second question on the kept memory beside it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from random_checkpoint import write_random

from edgewright.bundle import Bundle
from edgewright.models.registry import build
from edgewright.runtimes.generate import Stream, read_context
from edgewright.runtimes.registry import open_session

QUESTION = 16
# Mark Horowitz, ISSCC 2014, 45 nm: an 8-bit multiply 0.2 pJ and a 32-bit add 0.1 pJ; DRAM 1.3 to 2.6 nJ for 64 bits.
JOULES_PER_MAC = 0.3e-12
JOULES_PER_BYTE = 1.95e-9 / 8

SHAPES: dict[str, dict[str, Any]] = {
    "scaled": {
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
        "encoder_config": {
            "hidden_size": 320,
            "intermediate_size": 1408,
            "num_hidden_layers": 7,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "vocab_size": 8192,
        },
    },
    "full": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "encoder_config": {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
    },
}


def config(shape: str) -> dict[str, Any]:
    both = {"max_position_embeddings": 8192, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
    main = SHAPES[shape] | both
    vocab = main["encoder_config"]["vocab_size"]
    return main | {
        "model_type": "dolphin",
        "encoder_config": main["encoder_config"] | both,
        "tie_word_embeddings": False,
        "num_memory_tokens": 32,
        "memory_token_ids": list(range(vocab - 32, vocab)),
        "splice": "exact",
        "prompt_prefix": [220],
    }


def linear_weights(given: dict[str, Any]) -> tuple[int, int]:
    """(context model, main decoder): weights that every token is multiplied with; embeddings are looked up."""
    model = build(given)
    counts = [0, 0]
    for name, p in model.named_parameters():
        if p.dim() == 2 and "embed_tokens" not in name and "lm_head" not in name:
            counts["context_encoder" not in name] += math.prod(p.shape)
    return counts[0], counts[1]


def energy(weights: int, tokens: int, chunk: int, layers: int, width: int) -> float:
    """Joules that Horowitz's figures give: products with weights and keys, and the 4-bit weights read once a chunk."""
    macs = weights * tokens + layers * width * tokens**2
    return macs * JOULES_PER_MAC + weights / 2 * 1.06 * math.ceil(tokens / chunk) * JOULES_PER_BYTE


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="scaled")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepare", action="store_true", help="make the bundle and stop")
    options = parser.parse_args()
    given = config(options.shape)
    checkpoint, bundle = options.directory / f"dolphin-{options.shape}", options.directory / f"bundle-{options.shape}"
    if not bundle.exists():
        if not checkpoint.exists():
            seconds, count = timed(lambda: write_random(checkpoint, given))
            print(f"{count / 1e6:.0f}M random parameters written in {seconds:.0f} s", flush=True)
        command = [sys.executable, "-m", "edgewright.cli", "export", "-m", str(checkpoint), "--bits", "4.5"]
        command += ["--widths", "4", "--group-size", "32", "--importance", "uniform", "--max-context", "6144"]
        seconds, done = timed(lambda: subprocess.run([*command, "--no-verify", "-o", str(bundle)], check=False))
        print(f"export: exit code {done.returncode} after {seconds:.0f} s", flush=True)
        if done.returncode:
            sys.exit(done.returncode)
    if options.prepare:
        return

    opened = Bundle.open(bundle)
    spec = opened.manifest.generation
    session = open_session(opened, "onnx", options.threads)
    rng = np.random.default_rng(0)
    context = rng.integers(4, spec.vocab, options.context).tolist()
    question = rng.integers(4, spec.vocab, QUESTION).tolist()

    times: dict[str, list[float]] = {"memory": [], "second question": [], "full context": []}
    for round in range(options.rounds + (options.rounds > 1)):  # the first round warms up, where there are several
        reading, memory = timed(lambda: read_context(session, spec, context))
        answering, _ = timed(lambda m=memory: Stream(session, spec, [question], 1, m).prefill())
        again, _ = timed(lambda m=memory: Stream(session, spec, [question], 1, m).prefill())
        whole, _ = timed(lambda: Stream(session, spec, [[*context, *question]], 1).prefill())
        print(f"round {round}: memory {reading:.2f} + {answering:.2f} s, full context {whole:.2f} s", flush=True)
        if round or options.rounds == 1:
            times["memory"].append(reading + answering)
            times["second question"].append(again)
            times["full context"].append(whole)

    small, large = linear_weights(given)
    middle = {name: statistics.median(values) for name, values in times.items()}
    ratio = statistics.median(w / m for w, m in zip(times["full context"], times["memory"]))
    second = statistics.median(w / a for w, a in zip(times["full context"], times["second question"]))
    print(
        f"{options.shape}: {small / 1e6:.1f}M and {large / 1e6:.1f}M weights a token (1 to {large / small:.1f}), "
        f"context {options.context}, {options.threads} threads, {len(times['memory'])} rounds"
    )
    for name, value in middle.items():
        print(f"  {name}: {value:.3f} s to the first token (median, measured)")
    print(f"  memory against full context: {ratio:.2f}x; a second question: {second:.2f}x (medians of ratios)")
    chunk, n = spec.prefill_chunk, options.context
    enc, dec = given["encoder_config"], given
    fresh = energy(small, n + 32, chunk, enc["num_hidden_layers"], enc["hidden_size"])
    fresh += energy(large, 33 + QUESTION, chunk, dec["num_hidden_layers"], dec["hidden_size"])
    full = energy(large, n + QUESTION, chunk, dec["num_hidden_layers"], dec["hidden_size"])
    print(f"  energy (predicted from operations and bytes): {fresh:.3g} J against {full:.3g} J, {full / fresh:.2f}x")


if __name__ == "__main__":
    main()
