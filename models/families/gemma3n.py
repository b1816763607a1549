"""Gemma 3n, text (E2B, E4B and what is cut out of them): Gemma's layers around streams of hidden states.

AltUp (arXiv 2301.13310): a token has several hidden states. A layer predicts all of them by a mixture, computes one, and corrects
the others by what it learnt. LAuReL (arXiv 2411.07501): a low-rank branch beside attention. The lower layers keep the largest
gates of the feed-forward alone, by a cutoff that a normal distribution gives. Each layer has a width of its own (MatFormer,
arXiv 2310.07707). Per-layer inputs and shared keys and values are those of `gemma_per_layer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import nn

from ..config import ConfigReader
from ..kv_cache import Cache
from ..language_model import shorten_stack
from ..layers.activations import activation
from ..layers.block import Block
from ..layers.linear import Linear
from ..layers.mlp import GatedMLP
from ..rope import read_rope
from .gemma import FULL, SLIDING
from .gemma_per_layer import Attention, PerLayerDecoder, PerLayerKeys, PerLayerModel, with_inputs_of

_MOST_STREAMS = 16
_SMALLEST = 1e-5
"""Of a stream's mean square, so that one of zeros is not divided by zero."""


class Config(PerLayerKeys):
    """The keys of config.json. widths: of each layer's feed-forward; sparsity: the share of its gates that are cut, of each layer.

    streams: hidden states of a token; active: the one that layers compute; scaled: its correction has a gain.
    """

    def __init__(self, section: ConfigReader) -> None:
        layers = section.integer("num_hidden_layers", most=1024)
        self.widths = _widths(section, layers)
        one_width = ConfigReader(dict(section.values) | {"intermediate_size": self.widths[0]}, section.where)
        types = section.layer_types(layers, 5)
        super().__init__(one_width, types, positions=32768, kv_heads=2, final_softcap=30.0, shared=15)
        if not self.extra:
            raise section.error("hidden_size_per_layer_input", 0, "at least 1")
        self.extra_vocab = section.integer("vocab_size_per_layer_input", 262_144)
        self.ropes = {FULL: read_rope(section, 1_000_000.0, FULL), SLIDING: read_rope(section, 10_000.0, SLIDING)}
        self.dims = dict.fromkeys((FULL, SLIDING), self.head_dim)
        self.kv = dict.fromkeys((FULL, SLIDING), self.kv_heads)
        self.sparsity = _sparsity(section, layers)
        self.laurel_rank = section.integer("laurel_rank", 64)
        self.streams = section.integer("altup_num_inputs", 4, least=2, most=_MOST_STREAMS)
        self.active = section.integer("altup_active_idx", 0, least=0, most=self.streams - 1)
        self.scaled = section.boolean("altup_correct_scale", True)


def _widths(section: ConfigReader, layers: int) -> list[int]:
    """`intermediate_size`: of all layers, or a list with that of each."""
    value = section.values.get("intermediate_size")
    if not isinstance(value, list):
        return [section.integer("intermediate_size")] * layers
    if len(value) != layers:
        raise section.error("intermediate_size", value, f"a size, or a list of {layers}")
    return [ConfigReader({"intermediate_size": one}, section.where).integer("intermediate_size") for one in value]


def _sparsity(section: ConfigReader, layers: int) -> list[float]:
    """`activation_sparsity_pattern`; if absent, 95 % in the first ten of more than ten layers."""
    value = section.values.get("activation_sparsity_pattern")
    if value is None:
        sparse = 10 if layers > 10 else 0
        return [0.95] * sparse + [0.0] * (layers - sparse)
    good = isinstance(value, list) and len(value) == layers
    if not good or not all(type(share) in (int, float) and 0 <= share < 1 for share in value):
        raise section.error("activation_sparsity_pattern", value, f"{layers} shares from 0 to below 1")
    return [float(share) for share in value]


class SparseMLP(GatedMLP):
    """A gated feed-forward that cuts what its gates have below `mean + factor * deviation` of a token's."""

    def __init__(self, hidden: int, intermediate: int, act: str, sparsity: float) -> None:
        super().__init__(hidden, intermediate, act)
        self.factor = NormalDist().inv_cdf(sparsity)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x)
        centred = gate - gate.mean(-1, keepdim=True)
        deviation = torch.sqrt((centred * centred).mean(-1, keepdim=True))
        kept = torch.relu(centred - deviation * self.factor)
        out: torch.Tensor = self.down_proj(self.act(kept) * self.up_proj(x))
        return out


class Laurel(Block):
    """`x + norm(right(left(x)))`, of low rank. x: [B, S, hidden]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.linear_left = Linear(config.hidden, config.laurel_rank)
        self.linear_right = Linear(config.laurel_rank, config.hidden)
        self.post_laurel_norm = config.norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.post_laurel_norm(self.linear_right(self.linear_left(x)))
        return out


class AltUp(Block):
    """Alternating updates of a token's hidden states [B, S, streams, hidden]."""

    protected = ("correction_coefs", "prediction_coefs", "modality_router")

    def __init__(self, config: Config) -> None:
        super().__init__()
        count = self.streams = config.streams
        self.hidden, self.active = config.hidden, config.active
        self.correct_output_scale = nn.Parameter(torch.empty(config.hidden), requires_grad=False)
        self.correction_coefs = Linear(count, count)
        self.prediction_coefs = Linear(count, count**2)
        self.modality_router = Linear(config.hidden, count)
        self.router_norm = config.norm()

    def computed(self, h: torch.Tensor) -> torch.Tensor:
        """The hidden state that layers compute, [B, S, hidden]."""
        return h.narrow(2, self.active, 1).squeeze(2)

    def _routed(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, streams] of a hidden state [B, S, hidden]."""
        return torch.tanh(self.modality_router(self.router_norm(x) * self.hidden**-1.0))

    def predict(self, h: torch.Tensor) -> torch.Tensor:
        """All hidden states before the layer: each as it was, and a mixture of all."""
        mixed = self.prediction_coefs(self._routed(self.computed(h)))
        return torch.matmul(mixed.reshape(*h.shape[:2], self.streams, self.streams), h) + h

    def correct(self, predicted: torch.Tensor, computed: torch.Tensor) -> torch.Tensor:
        """All hidden states behind the layer, which computed [B, S, hidden] for one that was predicted."""
        shares = self.correction_coefs(self._routed(computed)) + 1.0
        learnt = computed - self.computed(predicted)
        corrected: torch.Tensor = learnt.unsqueeze(2) * shares.unsqueeze(3) + predicted
        return corrected


class Layer(nn.Module):
    """Gemma's attention and feed-forward, each between two norms, of one hidden state; the others by AltUp.

    The layer's own input is added to all but the first of them.
    """

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.streams, self.hidden, self.scaled = config.streams, config.hidden, config.scaled
        self.self_attn = Attention(config, layer)
        width, sparsity = config.widths[layer], config.sparsity[layer]
        if sparsity:
            self.mlp: GatedMLP = SparseMLP(config.hidden, width, config.act, sparsity)
        else:
            self.mlp = GatedMLP(config.hidden, width, config.act)
        self.input_layernorm = config.norm()
        self.post_attention_layernorm = config.norm()
        self.pre_feedforward_layernorm = config.norm()
        self.post_feedforward_layernorm = config.norm()
        self.altup = AltUp(config)
        self.laurel = Laurel(config)
        self.per_layer_input_gate = Linear(config.hidden, config.extra)
        self.per_layer_projection = Linear(config.extra, config.hidden)
        self.post_per_layer_input_norm = config.norm()
        self.act = activation(config.act)

    def forward(
        self, h: torch.Tensor, past_length: torch.Tensor, own: torch.Tensor, k_cache: Cache, v_cache: Cache
    ) -> tuple[torch.Tensor, Cache, Cache]:
        """h: [B, S, streams * hidden]; own: [B, S, extra], this layer's input of each token."""
        lead = h.shape[:2]
        predicted = self.altup.predict(h.reshape(*lead, self.streams, self.hidden))
        x = self.altup.computed(predicted)
        normed = self.input_layernorm(x)
        attended, k, v = self.self_attn(normed, past_length, k_cache, v_cache)
        x = (x + self.post_attention_layernorm(attended) + self.laurel(normed)) * 0.5**0.5
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        corrected = self.altup.correct(predicted, x)
        first = self.altup.computed(corrected)
        if self.scaled:
            first = first * self.altup.correct_output_scale.to(first.dtype)
        added = self.post_per_layer_input_norm(
            self.per_layer_projection(self.act(self.per_layer_input_gate(first)) * own)
        )
        others = corrected.narrow(2, 1, self.streams - 1) + added.unsqueeze(2)
        streams = torch.cat((corrected.narrow(2, 0, 1), others), 2)
        return streams.reshape(*lead, self.streams * self.hidden), k, v


class Decoder(PerLayerDecoder):
    """The decoder between the projections that make the other hidden states of the first one, and bring them back."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, (Layer(config, i) for i in range(config.layers)))
        others = range(1, config.streams)
        self.altup_projections = nn.ModuleList(Linear(config.hidden, config.hidden) for _ in others)
        self.altup_unembed_projections = nn.ModuleList(Linear(config.hidden, config.hidden) for _ in others)

    def begin(self, h: torch.Tensor) -> torch.Tensor:
        """[B, S, streams * hidden] of embeddings h [B, S, hidden]."""
        return torch.cat(_as_large(h, [projection(h) for projection in self.altup_projections]), -1)

    def end(self, h: torch.Tensor) -> torch.Tensor:
        first, *others = (h.narrow(2, i * self.hidden, self.hidden) for i in range(h.shape[2] // self.hidden))
        back = [p(other) for p, other in zip(self.altup_unembed_projections, others, strict=True)]
        streams = _as_large(first, back)
        out: torch.Tensor = self.norm(sum(streams[1:], streams[0]) * len(streams) ** -1.0)
        return out


def _as_large(first: torch.Tensor, others: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The first, and the others with its root mean square."""
    size = torch.sqrt((first * first).mean(-1, keepdim=True))
    return [first, *(x * (size * torch.rsqrt((x * x).mean(-1, keepdim=True).clamp(min=_SMALLEST))) for x in others)]


class Model(PerLayerModel):
    """A Gemma 3n text checkpoint's modules."""

    def __init__(self, config: dict[str, Any]) -> None:
        section = ConfigReader(config, "")
        own = Config(section)
        super().__init__(section, own, Decoder(own))

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        """The lists of each layer's keys are cut, too. Sharing layers go first."""
        full = Config(ConfigReader(config, ""))
        kept = min(layers, full.layers)
        each = {
            "layer_types": full.types,
            "intermediate_size": full.widths[:kept],
            "activation_sparsity_pattern": full.sparsity[:kept],
        }
        computing = sum(source == i for i, source in enumerate(full.source))
        short = shorten_stack(config | each, layers) | {"num_kv_shared_layers": max(0, kept - computing)}
        return with_inputs_of(short, full)
