"""Published models at their true shapes, with random weights: what `export` takes, and whether it fits a limit of memory.

    python benchmarks/true_shapes.py DIRECTORY [--models t5-small qwen3-0.6b …] [--limit 3Gi] [--keep]
    python benchmarks/true_shapes.py DIRECTORY --dry-run
    python benchmarks/true_shapes.py DIRECTORY --awq --models llama-3.2-3b --limit 3Gi

Writes each checkpoint by streaming, in bfloat16, with --awq as AutoAWQ's 4-bit layout; runs `edgewright export --format onnx
--bits 4.5` on it, and prints the peak of anonymous memory. A dry run is one with `--importance uniform`, which reads no weight:
its checkpoint is a file of zeros that takes no disk. Without --keep what it wrote is removed. The configs are the
models' published config.json; the sources stand beside them. Tensors have the names of `models/`, not those of each publisher.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from random_checkpoint import write_random, write_random_awq, write_zeros

from edgewright.system.memory import anonymous_of

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
SHARD = 1 << 30  # bytes of a file
_PATTERN = ["sliding_attention"] * 4 + ["full_attention"]
_PHI_FACTORS = 48  # rotated dimensions of a head, 96, by two

CONFIGS: dict[str, dict[str, Any]] = {
    # huggingface.co/google-t5/t5-small: config.json
    "t5-small": {
        "model_type": "t5",
        "d_ff": 2048,
        "d_kv": 64,
        "d_model": 512,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "layer_norm_epsilon": 1e-6,
        "n_positions": 512,
        "num_heads": 8,
        "num_layers": 6,
        "pad_token_id": 0,
        "relative_attention_num_buckets": 32,
        "vocab_size": 32128,
    },
    # huggingface.co/Qwen/Qwen3-0.6B: config.json
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    # huggingface.co/meta-llama/Llama-3.2-1B and Llama-3.2-3B: config.json
    "llama-3.2-1b": _LLAMA | {"head_dim": 64, "hidden_size": 2048, "num_attention_heads": 32, "num_hidden_layers": 16},
    "llama-3.2-3b": _LLAMA | {"head_dim": 128, "hidden_size": 3072, "num_attention_heads": 24, "num_hidden_layers": 28},
    # huggingface.co/microsoft/Phi-4-mini-instruct: config.json, but for the values of the factors
    "phi-4-mini": {
        "model_type": "phi3",
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * _PHI_FACTORS,
            "long_factor": [1.0 + i for i in range(_PHI_FACTORS)],
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    },
    # huggingface.co/google/gemma-4-E2B: text_config of config.json; the sizes also in google/gemma.cpp, gemma/configs.cc
    "gemma-4-e2b": {
        "model_type": "gemma4_text",
        "final_logit_softcapping": 30.0,
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1536,
        "hidden_size_per_layer_input": 256,
        "intermediate_size": 6144,
        "layer_types": _PATTERN * 7,
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_hidden_layers": 35,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "rms_norm_eps": 1e-6,
        "sliding_window": 512,
        "tie_word_embeddings": True,
        "use_double_wide_mlp": True,
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
    },
    # transformers, models/gemma3n/configuration_gemma3n.py: the defaults, which are those of google/gemma-3n-E4B
    "gemma-3n-e4b": {
        "model_type": "gemma3n_text",
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2048,
        "hidden_size_per_layer_input": 256,
        "intermediate_size": 16384,
        "max_position_embeddings": 32768,
        "num_attention_heads": 8,
        "num_hidden_layers": 35,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 15,
        "rms_norm_eps": 1e-6,
        "sliding_window": 512,
        "vocab_size": 262400,
        "vocab_size_per_layer_input": 262144,
    },
}


def run(command: list[str]) -> tuple[str, float, int]:
    """What a command prints, its seconds, and the peak of its anonymous memory. Ends the program if it fails."""
    start, peak = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output)
        while process.poll() is None:
            peak = max(peak, anonymous_of(Path(f"/proc/{process.pid}/status")))
            time.sleep(0.02)
        if process.returncode:
            raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}")
        output.seek(0)
        return output.read(), time.monotonic() - start, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--models", nargs="+", default=sorted(CONFIGS), choices=sorted(CONFIGS))
    parser.add_argument("--awq", action="store_true", help="the checkpoint in AutoAWQ's layout")
    parser.add_argument("--dry-run", action="store_true", help="plan, and write no bundle")
    parser.add_argument("--limit", help="--memory-limit of the export")
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    print("| model | parameters | checkpoint | peak anonymous memory | weights in codes | seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in given.models:
        checkpoint, bundle = given.directory / name, given.directory / f"{name}-bundle"
        if given.dry_run:
            count = write_zeros(checkpoint, CONFIGS[name])
        elif given.awq:
            count = write_random_awq(checkpoint, CONFIGS[name], SHARD)
        else:
            count = write_random(checkpoint, CONFIGS[name], SHARD)
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        command = [sys.executable, "-m", "edgewright.cli", "export", "-m", str(checkpoint), "--format", "onnx"]
        command += ["--bits", "4.5", "--json", "--against", "none"]
        command += ["--dry-run", "--importance", "uniform"] if given.dry_run else ["-o", str(bundle)]
        command += ["--memory-limit", given.limit] if given.limit else []
        command += ["--no-verify"] if given.no_verify and not given.dry_run else []
        printed, seconds, peak = run(command)
        found = json.loads(printed)
        if not given.dry_run:
            peak = found["peak_anonymous_bytes"]
        plan = found if given.dry_run else found["plan"]
        codes = plan["total_bytes"]
        print(
            f"| {name} | {count / 1e6:.0f}M | {size / 2**30:.2f} GiB | {peak / 2**20:.0f} MiB | {codes / 1e6:.0f} MB "
            f"| {seconds:.0f} |",
            flush=True,
        )
        if not given.keep:
            shutil.rmtree(checkpoint)
            shutil.rmtree(bundle, ignore_errors=True)


if __name__ == "__main__":
    main()
