"""The headline ratios of three papers, predicted on a phone's CPU, GPU and NPU at 4 bits. Predicted, not measured.

    python benchmarks/headline_ratios.py [--device samsung-galaxy-s25]

Encoder-decoder against decoder-only of one size (arXiv 2501.16273: 47 % lower first-token latency, 4.7 times the throughput), a
context read into memory against the same context in the prompt (Dolphin, arXiv 2408.15518: 5 times the latency, 10 times the
energy), SambaY against dense attention at 2K prompt and 32K generated (arXiv 2507.06607: 10 times the decode throughput). The costs
are those of published rows of that device: llama.cpp on CPU and GPU, Qualcomm's runtime on the NPU. Only shapes are used.
"""

from __future__ import annotations

import argparse
from typing import Any

from bench_dolphin import config as dolphin
from bench_host_prediction import llama

from edgewright.device_profiles.predict import predict
from edgewright.device_profiles.profile import DeviceProfile, load
from edgewright.device_profiles.work import Phase
from edgewright.models.language_model import LanguageModel
from edgewright.models.registry import build
from edgewright.quant.units import quantizable_units
from edgewright.quant.workload import as_work, graph_work, planned_names

TARGETS = {"cpu": "onnx", "gpu": "coreml", "npu": "qnn"}
"""Unit -> a target whose costs there are the published runtime's."""

CHUNK = 128


def dense(hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int) -> dict[str, Any]:
    return llama(hidden, ffn, layers, heads, kv, vocab) | {"max_position_embeddings": 65536}


# Mu 330M (arXiv 2501.16273): 20 encoder and 10 decoder layers; against 30 decoder layers of the same width.
MU = {
    "model_type": "mu",
    "d_model": 1024,
    "d_ff": 4096,
    "d_kv": 64,
    "num_heads": 6,
    "num_key_value_heads": 3,
    "num_layers": 20,
    "num_decoder_layers": 10,
    "vocab_size": 32128,
    "n_positions": 4096,
    "decoder_start_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "layer_norm_epsilon": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
# SambaY as Phi-4-mini-flash-reasoning, against Phi-4-mini's 32 layers of dense attention.
SAMBAY = {
    "model_type": "phi4flash",
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "layer_norm_eps": 1e-5,
    "mamba_d_state": 16,
    "mamba_dt_rank": 160,
    "max_position_embeddings": 65536,
    "mb_per_layer": 2,
    "num_attention_heads": 40,
    "num_hidden_layers": 32,
    "num_key_value_heads": 20,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}


class Costed:
    """A model on one unit: seconds of its graphs' calls."""

    def __init__(self, config: dict[str, Any], device: DeviceProfile, kind: str) -> None:
        self.model: LanguageModel = build(config)
        self.planned = planned_names(quantizable_units(self.model))
        self.graphs = {g.name: g for g in self.model.graphs()}
        self.device, self.kind = device, kind

    def seconds(self, graph: str, tokens: int, depth: int, source: int, phase: Phase, times: float) -> float:
        work = graph_work(self.model, self.graphs[graph], tokens, depth, source, self.planned)
        unit = next(u for u in self.device.units if u.kind == self.kind)
        target = TARGETS[self.kind]
        return predict(as_work(work, phase, target, None), times, target, unit, self.device).seconds

    def prompt(self, length: int, graph: str = "decoder", source: int = 1) -> float:
        """Read `length` tokens in chunks."""
        return self.seconds(graph, min(CHUNK, length), max(0, length - CHUNK) // 2, source, "prefill", length)

    def step(self, depth: int, source: int = 1) -> float:
        return self.seconds("decoder", 1, depth, source, "decode", 1)

    def encode(self, length: int) -> float:
        """The encoder and the keys and values of cross-attention, all tokens at once."""
        names = [name for name in self.graphs if name != "decoder"]
        return sum(self.seconds(name, length, 0, length, "prefill", length) for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="samsung-galaxy-s25")
    device = load(parser.parse_args().device)
    print(f"PREDICTED on {device.name}, all weights at 4 bits, one stream; the papers' machines are others")
    for kind in ("cpu", "gpu", "npu"):
        mu = Costed(MU, device, kind)
        only = Costed(dense(1024, 4096, 30, 6, 3, 32128) | {"head_dim": 64}, device, kind)
        for source in (256, 1024):
            first = mu.encode(source) + mu.step(0, source), only.prompt(source) + only.step(source)
            rate = only.step(source + 64) / mu.step(64, source)
            whole = (first[1] + 127 * only.step(source + 64)) / (first[0] + 127 * mu.step(64, source))
            print(
                f"{kind}: encoder-decoder 330M, input {source}: first token {1 - first[0] / first[1]:+.0%} lower, "
                f"decode {rate:.1f}x, input and 128 tokens {whole:.1f}x (paper: 47 %, 4.7x)"
            )
        both = Costed(dolphin("full"), device, kind)
        for context in (1024, 4096):
            memory = both.prompt(context, "context") + both.prompt(48)
            ratio = both.prompt(context + 16) / memory
            reuse = both.prompt(context + 16) / both.prompt(48)
            print(
                f"{kind}: Dolphin 0.5B + 7B, context {context}: first token {ratio:.1f}x sooner, {reuse:.0f}x with the "
                f"memory kept; energy at one power the same {ratio:.1f}x (paper: 5x, energy 10x)"
            )
        samba = Costed(SAMBAY, device, kind)
        phi = Costed(dense(3072, 8192, 32, 24, 8, 200064), device, kind)
        depths = range(2048, 2048 + 32768, 4096)
        ratio = sum(phi.step(d) for d in depths) / sum(samba.step(d) for d in depths)
        print(f"{kind}: SambaY 3.8B against dense, 2K prompt and 32K generated: decode {ratio:.1f}x (paper: 10x)")


if __name__ == "__main__":
    main()
