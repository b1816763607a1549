"""Gemma 4, text (dense: E2B, E4B and their kin): Gemma 3 with three changes.

A table beside the embedding gives each token a row for each layer (per-layer inputs). The upper layers compute no keys and values:
they read those of the last layer of their kind that does. Full layers have wider heads, of which RoPE turns a quarter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...checkpoints.names import Names
from ...graph import State
from ..causal import CausalModel, CausalStep, DecoderParts, kv_states
from ..config import ConfigReader, StackKeys
from ..kv_cache import Cache, cached_attention, shared_attention
from ..language_model import shorten_stack
from ..layers.activations import softcap
from ..layers.block import Block
from ..layers.linear import Embedding, Linear
from ..layers.mlp import GatedMLP
from ..layers.norm import RMSNorm
from ..layers.ops import EW
from ..rope import Rope, read_rope
from .gemma import FULL, SLIDING, optional_number

ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


class Config(StackKeys):
    """The keys of config.json. source: of each layer, the layer whose keys and values it reads: itself, or an earlier one."""

    def __init__(self, section: ConfigReader) -> None:
        super().__init__(section, positions=131072, head_dim=256)
        section.absent("enable_moe_block", "attention_bias")
        if section.values.get("use_bidirectional_attention") == "all":
            raise section.error("use_bidirectional_attention", "all", "null or 'vision'; an encoder is not supported")
        self.act = section.text("hidden_activation", "gelu_pytorch_tanh")
        self.final_softcap = optional_number(section, "final_logit_softcapping")
        self.types = layer_types(section)
        self.window = section.window(self.types)
        self.alike = section.flag("attention_k_eq_v", False)  # values of full layers are their keys
        full = _full_layers(section, self.types, self.alike)
        wide = full.head_dim(512)
        full_heads = full.divisor("num_key_value_heads", self.heads, self.kv_heads)
        self.dims, self.kv = {FULL: wide, SLIDING: self.head_dim}, {FULL: full_heads, SLIDING: self.kv_heads}
        named = ConfigReader({"rope_parameters": ROPE} | dict(section.values), section.where)
        self.ropes: dict[str, Rope] = {kind: read_rope(named, 10_000.0, kind) for kind in (FULL, SLIDING)}
        self.source = _sources(section, self.types)
        self.double = section.flag("use_double_wide_mlp", False)
        self.extra = section.integer("hidden_size_per_layer_input", 256, least=0)
        self.extra_vocab = section.integer("vocab_size_per_layer_input", self.vocab) if self.extra else 0

    def norm(self, size: int | None = None) -> RMSNorm:
        return RMSNorm(size or self.hidden, self.eps, offset=0.0)


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


def _sources(section: ConfigReader, types: list[str]) -> list[int]:
    shared = section.integer("num_kv_shared_layers", 0, least=0, most=len(types) - 1)
    first = len(types) - shared
    last = {kind: i for i, kind in enumerate(types[:first])}
    if missing := set(types) - set(last):
        raise section.error(
            "num_kv_shared_layers", shared, f"fewer: no layer before computes keys for a {missing.pop()}"
        )
    return [i if i < first else last[kind] for i, kind in enumerate(types)]


class Attention(Block):
    """Attention with norms on queries, keys and values; over its own cache, or over that of an earlier layer."""

    fused = (("q_proj", "k_proj", "v_proj"),)
    key_value = ("k_proj", "v_proj")
    inv_freq: torch.Tensor

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        kind = config.types[layer]
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv[kind], config.dims[kind]
        self.window = config.window if kind == SLIDING else 0
        self.own = config.source[layer] == layer
        self.alike = config.alike and kind == FULL
        self.q_proj = Linear(config.hidden, self.heads * self.head_dim)
        self.q_norm = config.norm(self.head_dim)
        if self.own:
            self.k_proj = Linear(config.hidden, self.kv_heads * self.head_dim)
            self.k_norm = config.norm(self.head_dim)
            if not self.alike:
                self.v_proj = Linear(config.hidden, self.kv_heads * self.head_dim)
            self.register_buffer("ones", torch.ones(self.head_dim, device="cpu"), persistent=False)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden)
        self.eps = config.eps
        self.register_buffer("inv_freq", config.ropes[kind].frequencies(self.head_dim), persistent=False)

    def forward(
        self, x: torch.Tensor, past_length: torch.Tensor, k_cache: Cache, v_cache: Cache
    ) -> tuple[torch.Tensor, Cache, Cache]:
        """Of a layer without its own keys, the caches are those that an earlier layer has written in this call."""
        lead = x.shape[:2]
        positions = past_length + torch.arange(x.shape[1], device=x.device)
        q = EW.rope(self.q_norm(self.q_proj(x).reshape(*lead, self.heads, self.head_dim)), positions, self.inv_freq)
        if not self.own:
            attended = shared_attention(q, k_cache, v_cache, positions, 1.0, self.window)
            return self.o_proj(attended), k_cache, v_cache
        keys = self.k_proj(x).reshape(*lead, self.kv_heads, self.head_dim)
        values = keys if self.alike else self.v_proj(x).reshape(*lead, self.kv_heads, self.head_dim)
        k = EW.rope(self.k_norm(keys), positions, self.inv_freq)
        v = EW.rms_norm(values, self.ones, self.eps, 0.0)
        attended, k_new, v_new = cached_attention(q, k, v, k_cache, v_cache, past_length, 1.0, 0.0, self.window)
        return self.o_proj(attended), k_new, v_new


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


class Decoder(nn.Module):
    """Embedding, per-layer inputs, layers and last norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.hidden, self.extra = config.hidden, config.extra
        self.embed_tokens = Embedding(config.vocab, config.hidden)
        if config.extra:
            width = config.layers * config.extra
            self.embed_tokens_per_layer = Embedding(config.extra_vocab, width)
            self.per_layer_model_projection = Linear(config.hidden, width)
            self.per_layer_projection_norm = config.norm(config.extra)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = config.norm()

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.embed_tokens(input_ids) * self.hidden**0.5
        return out

    def inputs(self, input_ids: torch.Tensor, h: torch.Tensor) -> list[torch.Tensor | None]:
        """Of each layer its input [B, S, extra]: from the token's row and from its embedding h [B, S, hidden]."""
        count = len(self.layers)
        if not self.extra:
            return [None] * count
        shape = (*input_ids.shape, count, self.extra)
        rows = (self.embed_tokens_per_layer(input_ids) * self.extra**0.5).reshape(shape)
        seen = (self.per_layer_model_projection(h) * self.hidden**-0.5).reshape(shape)
        both = (self.per_layer_projection_norm(seen) + rows) * 0.5**0.5
        return [both.narrow(2, i, 1).squeeze(2) for i in range(count)]


class Step(CausalStep):
    """Prefill and decode step; upper layers read the caches that lower ones have written."""

    def __init__(self, model: Model) -> None:
        super().__init__({"whole": model}, model.parts(), [len(states) for states in model.states()])
        self.sources, self.model = tuple(model.config.source), (model.model,)

    def forward(
        self,
        input_ids: torch.Tensor,
        past_length: torch.Tensor,
        logit_positions: torch.Tensor,
        states: list[Cache],
    ) -> tuple[Cache, ...]:
        h = self.parts.embed(input_ids)
        inputs = self.model[0].inputs(input_ids, h)
        caches: list[tuple[Cache, Cache]] = []
        updated: list[Cache] = []
        for i, layer in enumerate(self.parts.layers):
            source = self.sources[i]
            k, v = (states[len(updated)], states[len(updated) + 1]) if source == i else caches[source]
            h, k, v = layer(h, past_length, inputs[i], k, v)
            caches.append((k, v))
            if source == i:
                updated += [k, v]
        return (self.parts.head(self.parts.norm(h.index_select(1, logit_positions))), *updated)


class Model(CausalModel):
    """A Gemma 4 text checkpoint's modules."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.config = Config(self.section)
        self.vocab, self.max_context = self.config.vocab, self.config.max_positions
        self.model = Decoder(self.config)
        self.lm_head = Linear(self.config.hidden, self.vocab)
        self.tied = self.tied_head(default=True)

    @property
    def names(self) -> Names:
        """Files may hold keys and values of layers that read those of others."""
        shared = [i for i, source in enumerate(self.config.source) if source != i]
        unread = ("k_proj.*", "v_proj.*", "k_norm.*", "v_norm.*")
        return Names(ignored=[f"*.layers.{i}.self_attn.{name}" for i in shared for name in unread])

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        """Up to the first full layer behind so many, as the last layer is full. Sharing layers go first."""
        types = layer_types(ConfigReader(config, ""))
        layers = next(i for i in range(min(layers, len(types)), len(types) + 1) if types[i - 1] == FULL)
        short = shorten_stack(config | {"layer_types": types}, layers)
        computing = len(types) - (config.get("num_kv_shared_layers") or 0)
        return short | {"num_kv_shared_layers": max(0, layers - computing)}

    def step(self) -> CausalStep:
        return Step(self)

    def head(self, h: torch.Tensor) -> torch.Tensor:
        return softcap(self.lm_head(h), self.config.final_softcap)

    def parts(self) -> DecoderParts:
        return DecoderParts(self.model.embed, self.model.layers, self.model.norm, self.head)

    def states(self) -> list[list[State]]:
        c = self.config
        return [kv_states(i, c.kv[kind], c.dims[kind]) if c.source[i] == i else [] for i, kind in enumerate(c.types)]
