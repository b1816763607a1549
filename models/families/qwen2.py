"""Qwen2 (arXiv 2407.10671): Llama with biases on q, k and v, and windows in the upper layers where the config asks for them.

What may enter: `ops`, the shared layers, Llama's layer.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...graph import Graph
from ..causal import CausalStep, causal_graph, kv_states
from ..config import ConfigReader
from ..layers.attention import AttentionSpec
from ..layers.linear import Embedding, Linear
from ..layers.norm import RMSNorm
from .llama import Layer


class StackConfig:
    """The keys of one Qwen2 stack, as transformers reads them."""

    def __init__(self, section: ConfigReader) -> None:
        self.vocab = section.integer("vocab_size")
        self.hidden = section.integer("hidden_size")
        self.intermediate = section.integer("intermediate_size")
        self.layers = section.integer("num_hidden_layers", most=1024)
        self.heads = section.integer("num_attention_heads", most=4096)
        self.kv_heads = section.integer("num_key_value_heads", self.heads, most=4096)
        if self.heads % self.kv_heads:
            raise section.error("num_key_value_heads", self.kv_heads, f"a divisor of {self.heads} heads")
        self.head_dim = section.head_dim(self.hidden // self.heads)
        self.eps = section.number("rms_norm_eps", 1e-6)
        self.act = section.text("hidden_act", "silu")
        self.theta, self.rope_factor = section.rope(10000.0)
        self.max_positions = section.integer("max_position_embeddings", 32768)
        self.windows = _windows(section, self.layers)

    def attention(self, layer: int) -> AttentionSpec:
        return AttentionSpec(
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            theta=self.theta,
            rope_factor=self.rope_factor,
            window=self.windows[layer],
            bias=True,
        )


def _windows(section: ConfigReader, layers: int) -> list[int]:
    """The window of each layer, 0 where it attends to everything: `use_sliding_window` turns them on."""
    on = section.boolean("use_sliding_window", False) and section.values.get("sliding_window", 0) is not None
    if section.values.get("layer_types") is not None:
        types = section.layer_types(layers, 1)
        if not on and "sliding_attention" in types:
            raise section.error("use_sliding_window", section.values.get("use_sliding_window"), "true for these layers")
    else:
        first = section.integer("max_window_layers", 28, least=0) if on else layers
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    window = section.window(types)
    return [window if kind == "sliding_attention" else 0 for kind in types]


class Stack(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(
            Layer(config.attention(i), config.intermediate, config.act, config.eps, mlp_bias=False)
            for i in range(config.layers)
        )
        self.norm = RMSNorm(config.hidden, config.eps, offset=0.0)


def shorten_stack(values: dict[str, Any], layers: int) -> dict[str, Any]:
    """The keys of a stack with at most `layers` layers, each of the kind it was."""
    short = values | {"num_hidden_layers": min(layers, values["num_hidden_layers"])}
    if short.get("layer_types"):
        short["layer_types"] = short["layer_types"][: short["num_hidden_layers"]]
    return short


class Model(nn.Module):
    """A Qwen2 checkpoint's modules, named as the checkpoint names them."""

    task = "causal"

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        section = ConfigReader(config, "")
        self.stack = StackConfig(section)
        self.model = Stack(self.stack)
        self.lm_head = Linear(self.stack.hidden, self.stack.vocab)
        tied = section.boolean("tie_word_embeddings", False)
        self.tied = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
        self.decoder_start = None
        self.max_context = self.stack.max_positions

    @staticmethod
    def shorten(config: dict[str, Any], layers: int) -> dict[str, Any]:
        """The config with at most `layers` layers (a rehearsal)."""
        return shorten_stack(config, layers)

    def stacks(self) -> dict[str, nn.ModuleList]:
        return {"decoder": self.model.layers}

    def graphs(self) -> list[Graph]:
        inner = self.model
        step = CausalStep(self, inner.embed_tokens, inner.layers, inner.norm, self.lm_head)
        states = [kv_states(i, self.stack.kv_heads, self.stack.head_dim) for i in range(len(inner.layers))]
        return causal_graph(step, states, self.stack.vocab, self.max_context)
