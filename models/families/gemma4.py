"""Gemma 4, text (dense: E2B, E4B and their kin): Gemma 3 with three changes.

Layers have inputs of their own, and the upper ones read the keys and values of others (`gemma_per_layer`). Full layers have wider
heads, of which RoPE turns a quarter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..config import ConfigReader
from ..kv_cache import Cache
from ..language_model import shorten_stack
from ..layers.linear import Linear
from ..layers.mlp import GatedMLP
from ..rope import read_rope
from .gemma import FULL, SLIDING
from .gemma_per_layer import Attention, PerLayerDecoder, PerLayerKeys, PerLayerModel, with_inputs_of

ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


class Config(PerLayerKeys):
    """The keys of config.json."""

    def __init__(self, section: ConfigReader) -> None:
        super().__init__(section, layer_types(section), positions=131072)
        section.absent("enable_moe_block")
        if section.values.get("use_bidirectional_attention") == "all":
            raise section.error("use_bidirectional_attention", "all", "null or 'vision'; an encoder is not supported")
        self.alike = section.flag("attention_k_eq_v", False)
        full = _full_layers(section, self.types, self.alike)
        wide = full.head_dim(512)
        full_heads = full.divisor("num_key_value_heads", self.heads, self.kv_heads)
        self.dims, self.kv = {FULL: wide, SLIDING: self.head_dim}, {FULL: full_heads, SLIDING: self.kv_heads}
        named = ConfigReader({"rope_parameters": ROPE} | dict(section.values), section.where)
        self.ropes = {kind: read_rope(named, 10_000.0, kind) for kind in (FULL, SLIDING)}
        self.double = section.flag("use_double_wide_mlp", False)
        self.extra_vocab = section.integer("vocab_size_per_layer_input", self.vocab) if self.extra else 0


def layer_types(section: ConfigReader) -> list[str]:
    """`layer_types`; if absent, every sixth layer is full. The last one always is."""
    layers = section.integer("num_hidden_layers", most=1024)
    return [*section.layer_types(layers, 6)[:-1], FULL]


def _full_layers(section: ConfigReader, types: list[str], alike: bool) -> ConfigReader:
    """`head_dim` and `num_key_value_heads` of full layers: from `per_layer_config`, or the older `global_…` keys."""
    each = section.values.get("per_layer_config")
    if each is None:
        older = {"head_dim": "global_head_dim"} | (
            {"num_key_value_heads": "num_global_key_value_heads"} if alike else {}
        )
        known = {new: section.values[old] for new, old in older.items() if section.values.get(old) is not None}
        return ConfigReader(known, f"{section.where}global_")
    if not isinstance(each, dict):
        raise section.error("per_layer_config", each, "an object")
    found = [each.get(str(i), {}) for i, kind in enumerate(types) if kind == FULL]
    known_keys = {"head_dim", "num_key_value_heads"}
    alone = all(isinstance(f, dict) and f == found[0] and f.keys() <= known_keys for f in found)
    if not alone or any(each.get(str(i)) for i, kind in enumerate(types) if kind == SLIDING):
        raise section.error("per_layer_config", each, "one head_dim and num_key_value_heads for all full layers alone")
    inner = dict(found[0])
    inner.setdefault("head_dim", section.values.get("head_dim", 256))
    return ConfigReader(inner, f"{section.where}per_layer_config.")


class Layer(nn.Module):
    """Attention and gated MLP, each between two norms; then the layer's own input; all times a learned factor."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        wide = config.intermediate * (2 if config.double and config.source[layer] != layer else 1)
        self.mlp = GatedMLP(config.hidden, wide, config.act)
        self.input_layernorm = config.norm()
        self.post_attention_layernorm = config.norm()
        self.pre_feedforward_layernorm = config.norm()
        self.post_feedforward_layernorm = config.norm()
        self.layer_scalar = nn.Parameter(torch.empty(1), requires_grad=False)
        self.extra = bool(config.extra)
        if self.extra:
            self.per_layer_input_gate = Linear(config.hidden, config.extra)
            self.per_layer_projection = Linear(config.extra, config.hidden)
            self.post_per_layer_input_norm = config.norm()
            self.act = self.mlp.act

    def forward(
        self, h: torch.Tensor, past_length: torch.Tensor, own: torch.Tensor | None, k_cache: Cache, v_cache: Cache
    ) -> tuple[torch.Tensor, Cache, Cache]:
        """own: [B, S, extra], this layer's input of each token."""
        attended, k, v = self.self_attn(self.input_layernorm(h), past_length, k_cache, v_cache)
        h = h + self.post_attention_layernorm(attended)
        h = h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h)))
        if self.extra:
            assert own is not None
            added = self.per_layer_projection(self.act(self.per_layer_input_gate(h)) * own)
            h = h + self.post_per_layer_input_norm(added)
        return h * self.layer_scalar.to(h.dtype), k, v


class Model(PerLayerModel):
    """A Gemma 4 text checkpoint's modules."""

    def __init__(self, config: dict[str, Any]) -> None:
        section = ConfigReader(config, "")
        own = Config(section)
        super().__init__(section, own, PerLayerDecoder(own, (Layer(own, i) for i in range(own.layers))))

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        """Up to the first full layer behind so many, as the last layer is full. Sharing layers go first."""
        types = layer_types(ConfigReader(config, ""))
        layers = next(i for i in range(min(layers, len(types)), len(types) + 1) if types[i - 1] == FULL)
        short = shorten_stack(config | {"layer_types": types}, layers)
        computing = len(types) - (config.get("num_kv_shared_layers") or 0)
        short |= {"num_kv_shared_layers": max(0, layers - computing)}
        return with_inputs_of(short, Config(ConfigReader(config, "")))
