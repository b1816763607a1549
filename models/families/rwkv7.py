"""RWKV-7 (arXiv 2503.14456) in the layout of flash-linear-attention: a generalized delta rule, and a feed-forward of two tokens.

Both halves of a layer read each token beside the one before it (token shift). The values of the first layer are mixed into those of
the others. What steers the state (decay, rate, the mixing of values) keeps 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...checkpoints.names import Names, rename
from ...graph import State
from ..causal import CausalModel, CausalStep, DecoderParts, recurrent_state
from ..config import ConfigReader
from ..kv_cache import Cache
from ..layers.activations import l2_normalise, squared_relu
from ..layers.block import Block
from ..layers.linear import Embedding, Linear
from ..layers.norm import LayerNorm
from ..layers.ops import EW

_SLOWEST = 0.6065306597126334  # e^-0.5: a token keeps at least exp(-e^-0.5) of the state
_MIXED = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
_LOW_RANK = ("w", "v", "a", "g")


@dataclass(frozen=True)
class Sizes:
    """The keys of config.json. ranks: of the low-rank projections of decay (w), value mixing (v), rate (a) and gate (g)."""

    vocab: int
    hidden: int
    heads: int
    head_dim: int
    intermediate: int
    layers: int
    ranks: dict[str, int]
    eps: float
    norm_bias: bool
    norm_first: bool
    positions: int

    def norm(self) -> Norm:
        return Norm(self.hidden, self.eps, self.norm_bias)

    def states(self, layer: int) -> list[State]:
        last = ("batch", self.hidden, 1)
        return [
            State(f"shift_{layer}", "conv", torch.float32, last, updated=True),
            recurrent_state(layer, self.heads, self.head_dim, self.head_dim),
            State(f"shift_ffn_{layer}", "conv", torch.float32, last, updated=True),
        ]


def read_sizes(section: ConfigReader) -> Sizes:
    """The sizes by a config.json. Raises UserError for a bad value, and for layers of attention."""
    section.absent("attn")
    act = section.text("hidden_act", "sqrelu")
    if act not in ("sqrelu", "relu2"):
        raise section.error("hidden_act", act, "'sqrelu'")
    hidden, layers = section.integer("hidden_size", 2048), section.integer("num_hidden_layers", 24, most=1024)
    head_dim = _head_dim(section, hidden)
    values = section.values.get("value_dim")
    if values not in (None, hidden, [hidden] * layers):
        raise section.error("value_dim", values, f"{hidden} in each layer, or null")
    return Sizes(
        vocab=section.integer("vocab_size", 32000),
        hidden=hidden,
        heads=hidden // head_dim,
        head_dim=head_dim,
        intermediate=_intermediate(section, hidden),
        layers=layers,
        ranks=_ranks(section, hidden, head_dim),
        eps=section.number("norm_eps", 1e-5),
        norm_bias=section.boolean("norm_bias", True),
        norm_first=section.boolean("norm_first", True),
        positions=section.integer("max_position_embeddings", 2048),
    )


def _head_dim(section: ConfigReader, hidden: int) -> int:
    if section.values.get("head_dim", 64) is not None:
        return section.divisor("head_dim", hidden, 64)
    return hidden // section.divisor("num_heads", hidden)


def _intermediate(section: ConfigReader, hidden: int) -> int:
    if section.values.get("intermediate_size") is not None:
        return section.integer("intermediate_size")
    wide = int(hidden * min(section.number("hidden_ratio", 4.0), 1024.0))
    return max(32, -(-wide // 32) * 32)


def _ranks(section: ConfigReader, hidden: int, head_dim: int) -> dict[str, int]:
    """The ranks; where one is null, by the width as the library chooses it."""
    keys = {"w": "decay_low_rank_dim", "v": "v_low_rank_dim", "a": "a_low_rank_dim", "g": "gate_low_rank_dim"}
    wide = head_dim / 64
    factors = {"w": 2.5 * wide, "v": 1.7 * wide, "a": 2.5 * wide, "g": 5.0}
    defaults = {"w": 64, "v": 16, "a": 64, "g": 128}
    found = {}
    for name, key in keys.items():
        if key in section.values and section.values[key] is None:
            found[name] = max(32, round(factors[name] * hidden**0.5 / 32) * 32)
        else:
            found[name] = section.integer(key, defaults[name])
    return found


class Norm(LayerNorm):
    """A LayerNorm without casts: behind a recurrence that Core ML computes in wider numbers, torch.export checks each of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normed = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + self.eps) * self.weight.to(x.dtype)
        return normed if self.bias is None else normed + self.bias.to(x.dtype)


def shifted(x: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The token before each of x [B, T, hidden], and the last of x. last: [B, hidden, 1], the token before x."""
    before = torch.cat((last.transpose(1, 2), x), 1).narrow(1, 0, x.shape[1])
    return before, x.narrow(1, x.shape[1] - 1, 1).transpose(1, 2).contiguous()


class TimeMix(Block):
    """The generalized delta rule. In the first layer there is nothing to mix into the values."""

    protected = ("w_down", "w_up", "a_down", "a_up", "v_down", "v_up")

    def __init__(self, sizes: Sizes, first: bool) -> None:
        super().__init__()
        hidden, self.heads, self.head_dim, self.first = sizes.hidden, sizes.heads, sizes.head_dim, first
        for name in _MIXED:
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, hidden), requires_grad=False))
        self.k_k = nn.Parameter(torch.empty(hidden), requires_grad=False)
        self.k_a = nn.Parameter(torch.empty(hidden), requires_grad=False)
        self.r_k = nn.Parameter(torch.empty(sizes.heads, sizes.head_dim), requires_grad=False)
        self.r_proj, self.k_proj = Linear(hidden, hidden), Linear(hidden, hidden)
        self.v_proj, self.o_proj = Linear(hidden, hidden), Linear(hidden, hidden)
        ranks = sizes.ranks
        self.w_down, self.w_up = Linear(hidden, ranks["w"]), Linear(ranks["w"], hidden, bias=True)
        if not first:
            self.v_down, self.v_up = Linear(hidden, ranks["v"]), Linear(ranks["v"], hidden, bias=True)
        self.a_down, self.a_up = Linear(hidden, ranks["a"]), Linear(ranks["a"], hidden, bias=True)
        self.g_down, self.g_up = Linear(hidden, ranks["g"]), Linear(ranks["g"], hidden)
        self.g_norm = LayerNorm(hidden, sizes.head_dim * sizes.eps, bias=True)

    def forward(
        self, x: torch.Tensor, first_values: torch.Tensor | None, last: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """x: [B, T, hidden]; first_values: the first layer's. Returns [B, T, hidden], the first layer's values, both states."""
        before, last = shifted(x, last)
        r, w, k, v, a, g = (x + (before - x) * getattr(self, name).to(x.dtype) for name in _MIXED)
        receptance, key, value = self.r_proj(r), self.k_proj(k), self.v_proj(v)
        fade = torch.sigmoid(self.w_up(torch.tanh(self.w_down(w)))) * -_SLOWEST
        if first_values is None:
            first_values = value
        else:
            value = value + (first_values - value) * torch.sigmoid(self.v_up(self.v_down(v)))
        rate = torch.sigmoid(self.a_up(self.a_down(a)))
        gate = self.g_up(torch.sigmoid(self.g_down(g)))
        removed = l2_normalise(self.by_head(key * self.k_k.to(x.dtype)))
        key = key * ((rate - 1.0) * self.k_a.to(x.dtype) + 1.0)
        r_h, k_h, v_h = self.by_head(receptance), self.by_head(key), self.by_head(value)
        out, state = EW.generalized_delta_rule(
            r_h, k_h, v_h, self.by_head(fade), -removed, removed * self.by_head(rate), state
        )
        bonus = (r_h * k_h * self.r_k.to(x.dtype)).sum(-1, keepdim=True) * v_h
        mixed = (self.normed(out) + bonus.reshape(x.shape)) * gate
        return self.o_proj(mixed), first_values, last, state

    def by_head(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:2], self.heads, self.head_dim)

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, hidden] of x [B, T, H, D], each head normed by itself."""
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + self.g_norm.eps)
        flat = scaled.reshape(*x.shape[:2], self.heads * self.head_dim) * self.g_norm.weight.to(x.dtype)
        assert self.g_norm.bias is not None
        return flat + self.g_norm.bias.to(x.dtype)


class ChannelMix(Block):
    """`value(relu(key(x))^2)`, x between each token and the one before."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(sizes.hidden), requires_grad=False)
        self.key = Linear(sizes.hidden, sizes.intermediate)
        self.value = Linear(sizes.intermediate, sizes.hidden)

    def forward(self, x: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before, last = shifted(x, last)
        return self.value(squared_relu(self.key(x + (before - x) * self.x_k.to(x.dtype)))), last


class Layer(nn.Module):
    """Time mix and channel mix, each behind a norm; in the first layer the embeddings are normed before."""

    def __init__(self, sizes: Sizes, first: bool) -> None:
        super().__init__()
        self.pre_norm = sizes.norm() if first and sizes.norm_first else None
        self.attn_norm = sizes.norm()
        self.attn = TimeMix(sizes, first)
        self.ffn_norm = sizes.norm()
        self.ffn = ChannelMix(sizes)

    def forward(
        self,
        h: torch.Tensor,
        first_values: torch.Tensor | None,
        last: torch.Tensor,
        state: torch.Tensor,
        ffn_last: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Returns h, the first layer's values, and the three states."""
        if self.pre_norm is not None:
            h = self.pre_norm(h)
        mixed, first_values, last, state = self.attn(self.attn_norm(h), first_values, last, state)
        h = h + mixed
        mixed, ffn_last = self.ffn(self.ffn_norm(h), ffn_last)
        return h + mixed, first_values, last, state, ffn_last


class Decoder(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embeddings = Embedding(sizes.vocab, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes, i == 0) for i in range(sizes.layers))
        self.norm = sizes.norm()


class Step(CausalStep):
    """Prefill and decode step; the first layer's values go to all others."""

    def hidden(
        self, h: torch.Tensor, past_length: torch.Tensor, logit_positions: torch.Tensor, states: list[Cache]
    ) -> tuple[torch.Tensor, list[Cache]]:
        values, updated = None, list[Cache]()
        for layer in self.parts.layers:
            h, values, *new = layer(h, values, *states[len(updated) : len(updated) + 3])
            updated += new
        return h.index_select(1, logit_positions), updated


class Model(CausalModel):
    """An RWKV-7 checkpoint's modules, named as flash-linear-attention names them but for the low-rank projections."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.sizes = sizes = read_sizes(self.section)
        self.vocab, self.max_context = sizes.vocab, sizes.positions
        self.model = Decoder(sizes)
        self.lm_head = Linear(sizes.hidden, sizes.vocab)
        self.tied = self.tied_head(default=False, table="model.embeddings.weight")

    @property
    def names(self) -> Names:
        path = "model.layers.{}.attn."
        return Names(
            *(
                rename(f"{path}{name}_lora.lora.{i}", f"{path}{name}_{part}")
                for name in _LOW_RANK
                for i, part in ((0, "down"), (2, "up"))
            )
        )

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        sizes = read_sizes(ConfigReader(config, ""))
        return config | {"num_hidden_layers": min(layers, sizes.layers), "value_dim": None}

    def step(self) -> CausalStep:
        return Step({"whole": self}, self.parts(), [len(states) for states in self.states()])

    def parts(self) -> DecoderParts:
        return DecoderParts(self.model.embeddings, self.model.layers, self.model.norm, self.lm_head)

    def states(self) -> list[list[State]]:
        return [self.sizes.states(i) for i in range(self.sizes.layers)]
