"""How far off predictions for this machine are: shapes that `devices measure --models` never ran, predicted, then exported and run.

    XDG_CONFIG_HOME=DIR edgewright devices measure --models
    XDG_CONFIG_HOME=DIR python benchmarks/bench_host_prediction.py [--shapes NAME …]

Every prediction is printed before its model is run. The weights are random: speed depends on shapes and not on values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from edgewright.bundle import PREFILL_CHUNK
from edgewright.commands.measure_models import export_and_run, write_random_model
from edgewright.commands.profile import ProfileLengths
from edgewright.device_profiles.profile import load
from edgewright.models.registry import build
from edgewright.quant.prediction import Asked, predicted_rows
from edgewright.quant.units import quantizable_units

EXAMPLES = Path(__file__).parent.parent / "examples"
CONTEXT = 1024


def llama(hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }


def example(name: str, **changes: Any) -> dict[str, Any]:
    """An example's config with other sizes; dicts are merged."""
    config: dict[str, Any] = json.loads((EXAMPLES / name / "config.json").read_text())
    for key, value in changes.items():
        config[key] = (
            {**config[key], **value} if isinstance(value, dict) and isinstance(config.get(key), dict) else value
        )
    return config


STACK = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "head_dim": 64, "vocab_size": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "decoder 10M": llama(384, 1024, 6, 6, 2, 4096),
    "decoder 75M": llama(768, 2048, 10, 12, 4, 16384),
    "decoder 360M (SmolLM2's)": llama(960, 2560, 32, 15, 5, 49152),
    "decoder 1B": llama(2048, 5632, 20, 16, 4, 32768),
    "encoder-decoder 40M": example(
        "t5gemma-g2p",
        vocab_size=8192,
        encoder={**STACK, "query_pre_attn_scalar": 64, "max_position_embeddings": CONTEXT},
        decoder={
            **STACK,
            "query_pre_attn_scalar": 64,
            "max_position_embeddings": CONTEXT,
            "cross_attention_hidden_size": 512,
        },
    ),
    "hybrid 60M": example(
        "deltanet-g2p",
        hidden_size=768,
        intermediate_size=2304,
        head_dim=64,
        num_attention_heads=12,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_num_key_heads=6,
        linear_num_value_heads=12,
        vocab_size=16384,
        max_position_embeddings=CONTEXT,
    ),
    "the encoder-decoder example": example("t5gemma-g2p"),
    "the Dolphin example": example("dolphin-packages"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    options = parser.parse_args()
    host = load("host")
    errors: dict[bool, list[float]] = {True: [], False: []}
    inside = 0
    for name in options.shapes:
        config = SHAPES[name]
        model = build(config)
        units = quantizable_units(model)
        room = min(CONTEXT, model.max_context) - 1
        prompt, new = min(256, room - 40), 32
        depths = (0,) if model.task != "causal" else (0, min(512, room - new - 2))
        lengths = ProfileLengths(prompts=(prompt,), new=new, depths=depths, repeats=5)
        with tempfile.TemporaryDirectory(prefix="edgewright-predict-") as folder:
            source = write_random_model(Path(folder) / "model", config)
            predicted = {}
            for depth in depths:
                rows = predicted_rows(model, units, None, [host], ["onnx"], Asked(prompt, new, depth), PREFILL_CHUNK)
                predicted |= {r.test: (r.rate, r.tokens / r.predicted.high, r.tokens / r.predicted.low) for r in rows}
            told = ", ".join(f"{test} {rate:.1f}" for test, (rate, _, _) in predicted.items())
            print(f"{name}: predicted {told}", flush=True)
            rates = export_and_run(source, Path(folder) / "bundle", lengths)
        for test, (rate, low, high) in predicted.items():
            true = rates.get(test.replace("encode ", "pp").replace("context ", "pp"))
            if true is None:
                continue
            errors[test.startswith("tg")].append(abs(rate / true - 1))
            inside += low <= true <= high
            print(f"  {test}: predicted {rate:.1f}, measured {true:.1f} tokens/s, {rate / true - 1:+.1%}", flush=True)
    for decode, found in errors.items():
        print(f"{'decode' if decode else 'prefill'}: median error {statistics.median(found):.1%} of {len(found)}")
    print(f"in the interval: {inside} of {sum(map(len, errors.values()))}")


if __name__ == "__main__":
    main()
