"""What Gemma 3n and Gemma 4 share: an input of its own for each layer, and layers that read the keys and values of others.

A table beside the embedding gives each token a row for each layer (per-layer inputs). The upper layers compute no keys and values:
they read those of the last layer of their kind that does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ...checkpoints.names import Names
from ...graph import State
from ..causal import CausalModel, CausalStep, DecoderParts, kv_states
from ..config import OURS, ConfigReader, StackKeys
from ..kv_cache import Cache, cached_attention, shared_attention
from ..layers.activations import softcap
from ..layers.block import Block
from ..layers.linear import Embedding, Linear
from ..layers.norm import RMSNorm
from ..layers.ops import EW
from ..rope import Rope
from .gemma import FULL, SLIDING, optional_number

_INPUTS = "per_layer_inputs"
"""Key of `OURS`: for how many layers a shortened model's table has inputs."""


class PerLayerKeys(StackKeys):
    """The keys of config.json that both families have.

    types: "full_attention" or "sliding_attention" of each layer. positions, kv_heads, final_softcap, shared: defaults. source: of
    each layer, the layer whose keys and values it reads: itself, or an earlier one. Heirs set by the kind of a layer `ropes`,
    `dims` of a head and `kv` heads; and `extra_vocab`, rows of the table of per-layer inputs.
    """

    ropes: Mapping[str, Rope]
    dims: Mapping[str, int]
    kv: Mapping[str, int]
    extra_vocab: int
    alike: bool = False
    """Values of full layers are their keys."""

    def __init__(
        self,
        section: ConfigReader,
        types: list[str],
        positions: int,
        kv_heads: int | None = None,
        final_softcap: float = 0.0,
        shared: int = 0,
    ) -> None:
        super().__init__(section, positions, head_dim=256, kv_heads=kv_heads)
        section.absent("attention_bias")
        self.act = section.text("hidden_activation", "gelu_pytorch_tanh")
        self.final_softcap = optional_number(section, "final_logit_softcapping", final_softcap)
        self.types = types
        self.window = section.window(types)
        self.source = _sources(section, types, shared)
        self.extra = section.integer("hidden_size_per_layer_input", 256, least=0)
        ours = section.section(OURS) if OURS in section.values else ConfigReader({}, "")
        self.inputs = ours.integer(_INPUTS, self.layers, least=self.layers, most=1024)

    def norm(self, size: int | None = None) -> RMSNorm:
        return RMSNorm(size or self.hidden, self.eps, offset=0.0)


def with_inputs_of(short: dict[str, Any], full: PerLayerKeys) -> dict[str, Any]:
    """The config of a shortened model whose table stays that of `full`."""
    return short | {OURS: dict(short.get(OURS) or {}) | {_INPUTS: full.inputs}} if full.extra else short


def _sources(section: ConfigReader, types: list[str], default: int) -> list[int]:
    shared = section.integer("num_kv_shared_layers", default, least=0, most=len(types) - 1)
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

    def __init__(self, config: PerLayerKeys, layer: int) -> None:
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


class PerLayerDecoder(nn.Module):
    """Embedding, per-layer inputs, layers and last norm."""

    def __init__(self, config: PerLayerKeys, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.hidden, self.extra = config.hidden, config.extra
        self.embed_tokens = Embedding(config.vocab, config.hidden)
        if config.extra:
            width = config.inputs * config.extra
            self.held = config.inputs
            self.rows, self.every = config.extra_vocab, config.vocab <= config.extra_vocab
            self.embed_tokens_per_layer = Embedding(config.extra_vocab, width)
            self.per_layer_model_projection = Linear(config.hidden, width)
            self.per_layer_projection_norm = config.norm(config.extra)
        self.layers = nn.ModuleList(layers)
        self.norm = config.norm()

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.embed_tokens(input_ids) * self.hidden**0.5
        return out

    def begin(self, h: torch.Tensor) -> torch.Tensor:
        """What the first layer reads of embeddings h [B, S, hidden]."""
        return h

    def end(self, h: torch.Tensor) -> torch.Tensor:
        """What the head reads, [B, L, hidden], of the last layer's output."""
        out: torch.Tensor = self.norm(h)
        return out

    def inputs(self, input_ids: torch.Tensor, h: torch.Tensor) -> list[torch.Tensor | None]:
        """Of each layer its input [B, S, extra]: from the token's row and from its embedding h [B, S, hidden]."""
        count = len(self.layers)
        if not self.extra:
            return [None] * count
        shape = (*input_ids.shape, self.held, self.extra)
        if not self.every:  # tokens of images and sound, which have no row
            input_ids = torch.where(input_ids < self.rows, input_ids, torch.zeros_like(input_ids))
        rows = (self.embed_tokens_per_layer(input_ids) * self.extra**0.5).reshape(shape)
        seen = (self.per_layer_model_projection(h) * self.hidden**-0.5).reshape(shape)
        both = (self.per_layer_projection_norm(seen) + rows) * 0.5**0.5
        return [both.narrow(2, i, 1).squeeze(2) for i in range(count)]


class PerLayerStep(CausalStep):
    """Prefill and decode step; upper layers read the caches that lower ones have written."""

    def __init__(self, model: PerLayerModel) -> None:
        super().__init__({"whole": model}, model.parts(), [len(states) for states in model.states()])
        self.sources, self.model = tuple(model.config.source), (model.model,)

    def forward(
        self,
        input_ids: torch.Tensor,
        past_length: torch.Tensor,
        logit_positions: torch.Tensor,
        states: list[Cache],
    ) -> tuple[Cache, ...]:
        (model,) = self.model
        h = self.parts.embed(input_ids)
        inputs = model.inputs(input_ids, h)
        h = model.begin(h)
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


class PerLayerModel(CausalModel):
    """The text model of a checkpoint of either family, of its `config` and `model`."""

    def __init__(self, section: ConfigReader, config: PerLayerKeys, model: PerLayerDecoder) -> None:
        super().__init__(dict(section.values))
        self.config, self.model = config, model
        self.vocab, self.max_context = config.vocab, config.max_positions
        self.lm_head = Linear(config.hidden, self.vocab)
        self.tied = self.tied_head(default=True)

    @property
    def names(self) -> Names:
        """Files may hold keys and values of layers that read those of others."""
        shared = [i for i, source in enumerate(self.config.source) if source != i]
        unread = ("k_proj.*", "v_proj.*", "k_norm.*", "v_norm.*")
        return Names(ignored=[f"*.layers.{i}.self_attn.{name}" for i in shared for name in unread])

    def step(self) -> CausalStep:
        return PerLayerStep(self)

    def head(self, h: torch.Tensor) -> torch.Tensor:
        return softcap(self.lm_head(h), self.config.final_softcap)

    def parts(self) -> DecoderParts:
        return DecoderParts(self.model.embed, self.model.layers, self.model.end, self.head)

    def states(self) -> list[list[State]]:
        c = self.config
        return [kv_states(i, c.kv[kind], c.dims[kind]) if c.source[i] == i else [] for i, kind in enumerate(c.types)]
