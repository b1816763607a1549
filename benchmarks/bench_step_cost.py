"""The cost of a decode step as the context grows: SambaY, a Gated DeltaNet hybrid and a plain transformer of equal size.

    python benchmarks/bench_step_cost.py DIRECTORY [--rounds 5] [--threads 2] [--plot docs/step_cost.svg]

Random weights at 4 bits, ONNX on this CPU, models interleaved: milliseconds of a step behind 0 … 10,240 tokens (the cache's
contents are zeros there: they cost what any contents cost), the prefill of 2,048 tokens, and from both the time of 8,192 tokens
generated behind that prompt.
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

DEPTHS = (0, 512, 1024, 2048, 4096, 6144, 8192, 10240)
PROMPT, ANSWER = 2048, 8192
STEPS = 8
SHARED: dict[str, Any] = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "vocab_size": 8192,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "transformer": SHARED
    | {
        "model_type": "llama",
        "num_hidden_layers": 16,
        "head_dim": 64,
        "intermediate_size": 2304,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
    },
    "sambay": SHARED
    | {
        "model_type": "phi4flash",
        "num_hidden_layers": 16,
        "intermediate_size": 2048,
        "sliding_window": 512,
        "mb_per_layer": 2,
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
    },
    "deltanet hybrid": SHARED
    | {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 16,
        "head_dim": 64,
        "intermediate_size": 1920,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 12,
        "linear_num_value_heads": 12,
        "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 10000.0, "rope_type": "default"},
    },
}


def prepared(directory: Path, name: str) -> Path:
    """The bundle of a model, made if it is not there."""
    stem = name.replace(" ", "-")
    checkpoint, bundle = directory / stem, directory / f"{stem}-bundle"
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
            "--widths",
            "4",
        ]
        command += ["--group-size", "32", "--importance", "uniform", "--max-context", "12288", "--no-verify"]
        subprocess.run([*command, "-o", str(bundle)], check=True, stdout=subprocess.DEVNULL)
    return bundle


def step(session: Session, spec: Generation, depth: int) -> float:
    """Seconds of a step behind `depth` tokens: the median of a few."""
    stream = Stream(session, spec, [[5]], DEPTHS[-1] + STEPS + 2)
    stream.past = depth
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        stream.feed(np.array([[7]]))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    sessions = {}
    for name in MODELS:
        bundle = Bundle.open(prepared(options.directory, name))
        print(f"{name}: {bundle.manifest.weights / 1e6:.1f}M quantizable weights", flush=True)
        sessions[name] = open_session(bundle, "onnx", options.threads), bundle.manifest.generation
    steps: dict[str, dict[int, list[float]]] = {name: {d: [] for d in DEPTHS} for name in sessions}
    prefills: dict[str, list[float]] = {name: [] for name in sessions}
    prompt = np.random.default_rng(0).integers(4, 8192, PROMPT).tolist()
    for round in range(options.rounds + 1):
        for name, (session, spec) in sessions.items():
            start = time.perf_counter()
            Stream(session, spec, [prompt], 1).prefill()
            taken = time.perf_counter() - start
            rows = {d: step(session, spec, d) for d in DEPTHS}
            if round:  # the first warms up
                prefills[name].append(taken)
                for depth, seconds in rows.items():
                    steps[name][depth].append(seconds)
    curves = {name: [1e3 * statistics.median(rows[d]) for d in DEPTHS] for name, rows in steps.items()}
    print("ms a step behind", *(f"{d:>7}" for d in DEPTHS))
    for name, curve in curves.items():
        print(f"{name:>16}", *(f"{ms:7.2f}" for ms in curve))
    base = None
    for name, curve in curves.items():
        prefill = statistics.median(prefills[name])
        depths = np.arange(PROMPT, PROMPT + ANSWER)
        answer = float(np.interp(depths, DEPTHS, curve).sum() / 1e3)
        base = base or (prefill, answer)
        print(
            f"{name}: prefill of {PROMPT} {prefill:.2f} s ({base[0] / prefill:.2f}x the transformer's rate), "
            f"{ANSWER} tokens {answer:.1f} s ({base[1] / answer:.2f}x; summed from the steps measured)"
        )
    if options.plot:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for name, curve in curves.items():
            axes.plot(DEPTHS, curve, marker="o", label=name)
        axes.set_xlabel("tokens in the context")
        axes.set_ylabel("ms a decode step (ONNX, 4 bits, measured)")
        axes.set_ylim(0)
        axes.legend()
        figure.savefig(options.plot, metadata={"Date": None})


if __name__ == "__main__":
    main()
