"""SambaY (arXiv 2507.06607), as in Phi-4-mini-flash: the upper half of the layers reads the states of the lower half.

The self-decoder has Mamba-1 layers (arXiv 2312.00752), layers of attention within a window, and one of full attention, whose
KV cache is the only one that grows. The cross-decoder has no states: its attention reads that cache, its gated memory units
(GMU) read the scan of the last Mamba layer. So it is computed only at the logit positions. All attention is differential
(arXiv 2410.05258), without positions.

Names, kinds of layers and formulas follow the released code and its weight index, keys the released configuration. Two keys are
ours: `gmu_norm` (nGMU: an RMSNorm after the gate, with the weight `attn.norm.weight` and the eps of the layer norms) and
`num_kept_layers` (only the first layers).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ...graph import State
from ..causal import CausalModel, CausalStep, DecoderParts, conv_state, kv_states, recurrent_state, window_states
from ..config import ConfigReader
from ..kv_cache import Cache, cached_attention, shared_attention
from ..layers.activations import activation, silu, softplus
from ..layers.attention import window_attention
from ..layers.block import Block
from ..layers.linear import Embedding, Linear
from ..layers.norm import CausalConv, RMSNorm
from ..layers.ops import EW

SUBLAYER_NORM_EPS = 1e-5  # of the norm inside differential attention; the config has no key for it


class Sizes:
    """The keys of config.json."""

    def __init__(self, section: ConfigReader) -> None:
        self.vocab = section.integer("vocab_size")
        self.hidden = section.integer("hidden_size")
        self.intermediate = section.integer("intermediate_size")
        self.layers = section.integer("num_hidden_layers", most=1024)
        if self.layers % 4:
            raise section.error("num_hidden_layers", self.layers, "a multiple of 4")
        if section.integer("mb_per_layer", 2, least=0) != 2:
            raise section.error(
                "mb_per_layer", section.values["mb_per_layer"], "2: every second layer a Mamba or a GMU"
            )
        self.kept = section.integer("num_kept_layers", self.layers, most=self.layers)
        self.heads = section.integer("num_attention_heads", most=4096)
        self.kv_heads = section.integer("num_key_value_heads", self.heads, most=4096)
        if self.kv_heads % 2 or self.heads % self.kv_heads:
            raise section.error("num_key_value_heads", self.kv_heads, f"an even divisor of {self.heads} heads")
        if self.hidden % (8 * self.heads):
            raise section.error("hidden_size", self.hidden, f"a multiple of 8 x {self.heads} heads")
        self.head_dim = self.hidden // self.heads
        self.window = section.integer("sliding_window", least=2) if "sliding_window" in section.values else 2047
        self.inner = self.hidden * section.integer("mamba_expand", 2, most=64)
        self.state = section.integer("mamba_d_state", 16, most=4096)
        self.taps = section.integer("mamba_d_conv", 4, least=2, most=64)
        auto = section.values.get("mamba_dt_rank", "auto") == "auto"
        self.dt_rank = -(-self.hidden // 16) if auto else section.integer("mamba_dt_rank", most=1 << 20)
        section.absent("mamba_proj_bias", "mlp_bias", "lm_head_bias")
        if not section.boolean("mamba_conv_bias", True):
            raise section.error("mamba_conv_bias", False, "true, as in the released code")
        self.eps = section.number("layer_norm_eps", 1e-5)
        self.act = section.text("hidden_act", "silu")
        self.gmu_norm = section.boolean("gmu_norm", False)
        self.max_positions = section.integer("max_position_embeddings", 4096)

    @property
    def full(self) -> int:
        """The layer of full attention, the last of the self-decoder."""
        return self.layers // 2 + 1

    @property
    def key_width(self) -> int:
        return self.kv_heads * self.head_dim


class LayerNorm(nn.Module):
    """`(x - mean) / deviation * weight + bias` over the last dimension, by hand. x: [..., size]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + self.eps)
        return scaled * self.weight.to(x.dtype) + self.bias.to(x.dtype)


class MLP(nn.Module):
    """`fc2(y * act(gate))`; fc1 computes gate and y side by side."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.fc1 = Linear(sizes.hidden, 2 * sizes.intermediate)
        self.fc2 = Linear(sizes.intermediate, sizes.hidden)
        self.act, self.width = activation(sizes.act), sizes.intermediate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.fc1(x)
        gate, y = both.narrow(-1, 0, self.width), both.narrow(-1, self.width, self.width)
        out: torch.Tensor = self.fc2(y * self.act(gate))
        return out


class Mamba(Block):
    """Mamba-1. x: [B, S, hidden] -> the mixed [B, S, hidden], the scan before its gate [B, S, inner], and both states."""

    # They make the decay of the scan: small beside the other matrices, and errors in them add up over the tokens.
    protected = ("x_proj", "dt_proj")

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.in_proj = Linear(sizes.hidden, 2 * sizes.inner)
        self.conv1d = CausalConv(sizes.inner, sizes.taps, bias=True)
        self.x_proj = Linear(sizes.inner, sizes.dt_rank + 2 * sizes.state)
        self.dt_proj = Linear(sizes.dt_rank, sizes.inner, bias=True)
        self.A_log = nn.Parameter(torch.empty(sizes.inner, sizes.state), requires_grad=False)
        self.D = nn.Parameter(torch.empty(sizes.inner), requires_grad=False)
        self.out_proj = Linear(sizes.inner, sizes.hidden)

    def forward(
        self, x: torch.Tensor, conv: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        s = self.sizes
        both = self.in_proj(x)
        u, gate = both.narrow(-1, 0, s.inner), both.narrow(-1, s.inner, s.inner)
        u, conv_out = self.conv1d(u, conv)
        u = silu(u)
        low = self.x_proj(u)
        dt = softplus(self.dt_proj(low.narrow(-1, 0, s.dt_rank)))
        b, c = low.narrow(-1, s.dt_rank, s.state), low.narrow(-1, s.dt_rank + s.state, s.state)
        a = -torch.exp(self.A_log.to(torch.float32))
        y, state_out = EW.selective_scan(u, dt, a, b, c, state)
        memory = y + u * self.D.to(u.dtype)
        return self.out_proj(memory * silu(gate)), memory, conv_out, state_out


class GatedMemory(nn.Module):
    """`(memory * silu(x W1)) W2`. x: [B, S, hidden]; memory: [B, S, inner], the scan of the last Mamba layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.in_proj = Linear(sizes.hidden, sizes.inner)
        self.out_proj = Linear(sizes.inner, sizes.hidden)
        self.norm = RMSNorm(sizes.inner, sizes.eps, offset=0.0) if sizes.gmu_norm else None

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        gated = memory * silu(self.in_proj(x))
        out: torch.Tensor = self.out_proj(gated if self.norm is None else self.norm(gated))
        return out


class Difference(nn.Module):
    """`(1 - l0) * norm(A1 [v1, v2] - l A2 [v1, v2])`, l from four learned vectors. `layer` counts from 0."""

    def __init__(self, head_dim: int, layer: int) -> None:
        super().__init__()
        self.start = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.lambda_q1 = nn.Parameter(torch.empty(head_dim), requires_grad=False)
        self.lambda_k1 = nn.Parameter(torch.empty(head_dim), requires_grad=False)
        self.lambda_q2 = nn.Parameter(torch.empty(head_dim), requires_grad=False)
        self.lambda_k2 = nn.Parameter(torch.empty(head_dim), requires_grad=False)
        self.subln = RMSNorm(2 * head_dim, SUBLAYER_NORM_EPS, offset=0.0)

    def forward(self, attended: torch.Tensor) -> torch.Tensor:
        """attended: [B, S, heads * 2D]; even heads hold A1 [v1, v2], odd ones A2 [v1, v2]. Returns [B, S, heads * D]."""
        batch, length, total = attended.shape
        width = self.subln.weight.shape[0]
        pairs = attended.reshape(batch, length, total // (2 * width), 2 * width)
        rate = _exp_of_product(self.lambda_q1, self.lambda_k1) - _exp_of_product(self.lambda_q2, self.lambda_k2)
        rest = pairs.narrow(-1, 0, width) - (rate + self.start) * pairs.narrow(-1, width, width)
        out: torch.Tensor = self.subln(rest) * (1.0 - self.start)
        return out.reshape(batch, length, total // 2)


def _exp_of_product(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """exp(q . k) in float32, as the vectors may be stored in 16 bits."""
    return torch.exp((q.to(torch.float32) * k.to(torch.float32)).sum())


class Attention(nn.Module):
    """The base of the two differential attentions.

    Heads 2j and 2j + 1 are the pair (1, 2). Keys and values of a pair lie side by side, as one head [k1, k2] and [v1, v2] of
    twice the size. A query [q1, 0] or [0, q2] then reads its half of the key and both values. So the ordinary attention ops
    compute it, and the cache holds every key and value once.
    """

    first_half: torch.Tensor
    second_half: torch.Tensor

    def __init__(self, sizes: Sizes, layer: int, outputs: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.Wqkv = Linear(sizes.hidden, outputs, bias=True)
        self.out_proj = Linear(sizes.hidden, sizes.hidden, bias=True)
        self.inner_cross_attn = Difference(sizes.head_dim, layer)
        odd = (torch.arange(sizes.heads, device="cpu") % 2).to(torch.float32).unsqueeze(-1)
        self.register_buffer("first_half", 1.0 - odd, persistent=False)  # [heads, 1]
        self.register_buffer("second_half", odd, persistent=False)

    def spread(self, q: torch.Tensor) -> torch.Tensor:
        """q [B, S, heads * D] as [B, S, heads, 2D], each head's values in its half."""
        q = q.reshape(*q.shape[:2], self.sizes.heads, self.sizes.head_dim)
        return torch.cat((q * self.first_half, q * self.second_half), -1)

    def finish(self, attended: torch.Tensor) -> torch.Tensor:
        """[B, S, hidden] of attended [B, S, heads * 2D]."""
        out: torch.Tensor = self.out_proj(self.inner_cross_attn(attended))
        return out


class SelfAttention(Attention):
    """Differential attention with a KV cache of all tokens, or, if `window` > 0, with the keys and values of the window."""

    def __init__(self, sizes: Sizes, layer: int, window: int) -> None:
        super().__init__(sizes, layer, sizes.hidden + 2 * sizes.key_width)
        self.window = window

    def forward(
        self, x: torch.Tensor, past_length: torch.Tensor, k_cache: Cache, v_cache: Cache
    ) -> tuple[torch.Tensor, Cache, Cache]:
        s, qkv = self.sizes, self.Wqkv(x)
        pair = (*x.shape[:2], s.kv_heads // 2, 2 * s.head_dim)
        k = qkv.narrow(-1, s.hidden, s.key_width).reshape(pair)
        v = qkv.narrow(-1, s.hidden + s.key_width, s.key_width).reshape(pair)
        q = self.spread(qkv.narrow(-1, 0, s.hidden))
        scale = s.head_dim**-0.5
        if self.window:  # its states are of a fixed size and float
            assert isinstance(k_cache, torch.Tensor)
            assert isinstance(v_cache, torch.Tensor)
            attended, k_last, v_last = window_attention(q, k, v, k_cache, v_cache, past_length, scale)
            return self.finish(attended), k_last, v_last
        attended, k_out, v_out = cached_attention(q, k, v, k_cache, v_cache, past_length, scale, 0.0, 0)
        return self.finish(attended), k_out, v_out


class CrossAttention(Attention):
    """Differential attention over the cache of the full layer; `Wqkv` computes queries only."""

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__(sizes, layer, sizes.hidden)

    def forward(self, x: torch.Tensor, k_cache: Cache, v_cache: Cache, positions: torch.Tensor) -> torch.Tensor:
        q = self.spread(self.Wqkv(x))
        return self.finish(shared_attention(q, k_cache, v_cache, positions, self.sizes.head_dim**-0.5))


class Layer(nn.Module):
    """A mixer and a feed-forward block, each behind a norm. Takes the mixer's arguments, returns h and its further outputs."""

    def __init__(self, sizes: Sizes, index: int) -> None:
        super().__init__()
        self.attn = _mixer(sizes, index)
        self.mlp = MLP(sizes)
        self.input_layernorm = LayerNorm(sizes.hidden, sizes.eps)
        self.post_attention_layernorm = LayerNorm(sizes.hidden, sizes.eps)

    def forward(self, h: torch.Tensor, *rest: Cache) -> tuple[Cache, ...]:
        mixed = self.attn(self.input_layernorm(h), *rest)
        out, *states = mixed if isinstance(mixed, tuple) else (mixed,)
        h = h + out
        return (h + self.mlp(self.post_attention_layernorm(h)), *states)


def _mixer(sizes: Sizes, index: int) -> nn.Module:
    """The mixer by the index: Mamba and windows in turn, full attention, then memory units and cross-attention in turn."""
    if index > sizes.full:
        return CrossAttention(sizes, index) if index % 2 else GatedMemory(sizes)
    if index % 2 == 0:
        return Mamba(sizes)
    return SelfAttention(sizes, index, 0 if index == sizes.full else sizes.window)


class Decoder(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed_tokens = Embedding(sizes.vocab, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes, i) for i in range(sizes.kept))
        self.final_layernorm = LayerNorm(sizes.hidden, sizes.eps)


class Step(CausalStep):
    """Prefill and decode step: the self-decoder over all tokens, the rest at the logit positions."""

    def __init__(self, model: Model) -> None:
        super().__init__({"model": model.model, "lm_head": model.lm_head}, model.parts(), ())
        self.full = model.sizes.full

    def hidden(
        self, h: torch.Tensor, past_length: torch.Tensor, logit_positions: torch.Tensor, states: list[Cache]
    ) -> tuple[torch.Tensor, list[Cache]]:
        layers = list(self.parts.layers)
        memory = h  # of the last Mamba layer, which the first layer is
        updated: list[Cache] = []
        for i, layer in enumerate(layers[: self.full + 1]):
            own = states[len(updated) : len(updated) + 2]
            if i % 2:
                h, *new = layer(h, past_length, *own)
            else:
                h, memory, *new = layer(h, *own)
            updated += new
        h, memory = h.index_select(1, logit_positions), memory.index_select(1, logit_positions)
        for i, layer in enumerate(layers[self.full + 1 :], self.full + 1):
            (h,) = layer(h, *updated[-2:], past_length + logit_positions) if i % 2 else layer(h, memory)
        return h, updated


class Model(CausalModel):
    """A SambaY checkpoint's modules, named as the checkpoint names them."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.sizes = Sizes(self.section)
        self.vocab, self.max_context = self.sizes.vocab, self.sizes.max_positions
        self.model = Decoder(self.sizes)
        self.lm_head = Linear(self.sizes.hidden, self.vocab)
        self.tied = self.tied_head(default=True)

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        """The first `layers` layers alone: `num_hidden_layers` also decides which layer is of which kind, so it stays."""
        return config | {"num_kept_layers": min(layers, config.get("num_kept_layers") or config["num_hidden_layers"])}

    def parts(self) -> DecoderParts:
        return DecoderParts(self.model.embed_tokens, self.model.layers, self.model.final_layernorm, self.lm_head)

    def step(self) -> CausalStep:
        return Step(self)

    def states(self) -> list[list[State]]:
        return _states(self.sizes)


def _states(sizes: Sizes) -> list[list[State]]:
    """The states of each layer of the self-decoder."""
    states: list[list[State]] = []
    for i in range(min(sizes.kept, sizes.full + 1)):
        if i == sizes.full:
            states.append(kv_states(i, sizes.kv_heads // 2, 2 * sizes.head_dim))
        elif i % 2:
            states.append(window_states(i, sizes.kv_heads // 2, 2 * sizes.head_dim, sizes.window))
        else:
            states.append([conv_state(i, sizes.inner, sizes.taps), recurrent_state(i, sizes.inner, sizes.state)])
    return states
