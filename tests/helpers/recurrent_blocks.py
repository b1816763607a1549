"""Small graphs of single recurrences and attentions, for the targets' tests, and how a session is fed.

Each is one layer (two where one layer reads another's cache) between an embedding and a head, with random weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgewright.graph import Graph, Port, State
from edgewright.models.causal import CausalStep, DecoderParts, causal_graph, conv_state, kv_states, recurrent_state
from edgewright.models.config import ConfigReader
from edgewright.models.families.rwkv7 import Layer as RwkvLayer
from edgewright.models.families.rwkv7 import read_sizes
from edgewright.models.layers.activations import silu
from edgewright.models.layers.linear import Embedding, Linear
from edgewright.models.layers.mamba2 import Mamba2, Mamba2Spec
from edgewright.models.layers.norm import RMSNorm
from edgewright.models.layers.rg_lru import RecurrentBlock, RecurrentSpec
from edgewright.models.rope import Rope
from edgewright.runtimes.session import Session

EW = torch.ops.edgewright
VOCAB, HIDDEN, HEADS, KV, DIM = 61, 32, 4, 2, 16
F32, I64 = torch.float32, torch.int64


class DeltaNet(nn.Module):
    """Convolution, normalised queries and keys of fewer heads than values, gated delta rule."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = (2 + 2) * DIM + HEADS * 8
        self.inner, self.gates = Linear(HIDDEN, self.channels), Linear(HIDDEN, 2 * HEADS)
        self.conv = nn.Parameter(torch.empty(self.channels, 1, 4))
        self.a_log, self.dt_bias = nn.Parameter(torch.empty(HEADS)), nn.Parameter(torch.empty(HEADS))
        self.out = Linear(HEADS * 8, HIDDEN)
        self.norm = RMSNorm(8, 2.0**-20, 0.0)

    def states(self, layer: int) -> list[State]:
        return [conv_state(layer, self.channels, 4), recurrent_state(layer, HEADS, DIM, 8)]

    def forward(self, h: torch.Tensor, past: torch.Tensor, conv: torch.Tensor, state: torch.Tensor) -> Any:
        lead = h.shape[:2]
        x, conv = EW.causal_conv(self.inner(h), self.conv.squeeze(1), None, conv)
        q, k, v = silu(x).split((2 * DIM, 2 * DIM, HEADS * 8), -1)
        q, k = (t.reshape(*lead, 2, DIM) for t in (q, k))
        q, k = (t * torch.rsqrt((t * t).sum(-1, keepdim=True) + 1e-6) for t in (q, k))
        beta, rate = self.gates(h).chunk(2, -1)
        g = -torch.exp(self.a_log.float()) * nn.functional.softplus(rate.float() + self.dt_bias)
        out, state = EW.gated_delta_rule(q, k, v.reshape(*lead, HEADS, 8), g, torch.sigmoid(beta), state, DIM**-0.5)
        return h + self.out(self.norm(out).reshape(*lead, HEADS * 8)), conv, state


class Mamba(nn.Module):
    """Mamba-1: convolution with a bias, selective scan, skip and gate."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.dt = Linear(HIDDEN, 80), Linear(4, 40, bias=True)
        self.conv, self.bias = nn.Parameter(torch.empty(40, 4)), nn.Parameter(torch.empty(40))
        self.project, self.out = Linear(40, 4 + 2 * 6), Linear(40, HIDDEN)
        self.a_log, self.skip = nn.Parameter(torch.empty(40, 6)), nn.Parameter(torch.empty(40))

    def states(self, layer: int) -> list[State]:
        return [conv_state(layer, 40, 4), recurrent_state(layer, 40, 6)]

    def forward(self, h: torch.Tensor, past: torch.Tensor, conv: torch.Tensor, state: torch.Tensor) -> Any:
        x, gate = self.inner(h).chunk(2, -1)
        x, conv = EW.causal_conv(x, self.conv, self.bias, conv)
        x = silu(x)
        dt, b, c = self.project(x).split((4, 6, 6), -1)
        rate = nn.functional.softplus(self.dt(dt))
        y, state = EW.selective_scan(x, rate, -torch.exp(self.a_log.float()), b, c, state)
        return h + self.out((y + self.skip * x) * silu(gate)), conv, state


class Hgrn(nn.Module):
    """HGRN-2: a decay for each key dimension, and no convolution."""

    def __init__(self, per_head: bool = False) -> None:
        super().__init__()
        self.q, self.f, self.i = (Linear(HIDDEN, HEADS * 8) for _ in range(3))
        self.out, self.norm, self.per_head = Linear(HEADS * 8, HIDDEN), RMSNorm(HEADS * 8, 2.0**-20, 0.0), per_head

    def states(self, layer: int) -> list[State]:
        return [recurrent_state(layer, HEADS, 8, 8)]

    def forward(self, h: torch.Tensor, past: torch.Tensor, state: torch.Tensor) -> Any:
        lead = h.shape[:2]
        q, f, i = (p(h).reshape(*lead, HEADS, 8) for p in (self.q, self.f, self.i))
        forget = torch.sigmoid(f)
        forget = forget[..., :1] if self.per_head else forget
        out, state = EW.linear_attention(silu(q), 1 - forget.expand(q.shape), i, torch.log(forget), state, 1.0)
        return h + self.out(self.norm(out.reshape(*lead, HEADS * 8))), state


class Griffin(nn.Module):
    """The recurrent block of RecurrentGemma: a diagonal scan, whose first token enters whole."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = RecurrentSpec(HIDDEN, 40, 4, 4, "silu")
        self.norm, self.block = RMSNorm(HIDDEN, 2.0**-20, 0.0), RecurrentBlock(self.spec)

    def states(self, layer: int) -> list[State]:
        return self.spec.states(layer)

    def forward(self, h: torch.Tensor, past: torch.Tensor, conv: torch.Tensor, state: torch.Tensor) -> Any:
        mixed, conv, state = self.block(self.norm(h), past, conv, state)
        return h + mixed, conv, state


class Rwkv(nn.Module):
    """A layer of RWKV-7: token shifts and the generalized delta rule."""

    def __init__(self) -> None:
        super().__init__()
        config = {"hidden_size": HIDDEN, "head_dim": 8, "num_hidden_layers": 1, "intermediate_size": 48}
        self.sizes = read_sizes(ConfigReader(config, ""))
        self.layer = RwkvLayer(self.sizes, first=True)

    def states(self, layer: int) -> list[State]:
        return self.sizes.states(layer)

    def forward(self, h: torch.Tensor, past: torch.Tensor, *states: torch.Tensor) -> Any:
        h, _, *new = self.layer(h, None, *states)
        return h, *new


class Mixer(nn.Module):
    """A Mamba-2 mixer of two groups, with bounded time steps."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = Mamba2Spec(HIDDEN, HEADS, DIM, 2, 6, 4, "silu", 2.0**-20, limits=(0.1, 2.0))
        self.norm, self.mixer = RMSNorm(HIDDEN, 2.0**-20, 0.0), Mamba2(self.spec)

    def states(self, layer: int) -> list[State]:
        return self.spec.states(layer)

    def forward(self, h: torch.Tensor, past: torch.Tensor, conv: torch.Tensor, state: torch.Tensor) -> Any:
        mixed, conv, state = self.mixer(self.norm(h), conv, state)
        return h + mixed, conv, state


class Attention(nn.Module):
    """A causal attention, rotary on none, some or all of a head's dimensions."""

    def __init__(self, rotated: int, window: int = 0) -> None:
        super().__init__()
        self.q, self.k, self.v = Linear(HIDDEN, HEADS * DIM), Linear(HIDDEN, KV * DIM), Linear(HIDDEN, KV * DIM)
        self.out, self.rotated, self.window = Linear(HEADS * DIM, HIDDEN), rotated, window
        self.register_buffer("inv_freq", Rope(1e4).frequencies(max(rotated, 2)), persistent=False)

    def states(self, layer: int) -> list[State]:
        return kv_states(layer, KV, DIM)

    def project(self, h: torch.Tensor, past: torch.Tensor) -> list[torch.Tensor]:
        lead = h.shape[:2]
        positions = past + torch.arange(h.shape[1])
        q, k = self.q(h).reshape(*lead, HEADS, DIM), self.k(h).reshape(*lead, KV, DIM)
        return [*(self.rotate(x, positions) for x in (q, k)), self.v(h).reshape(*lead, KV, DIM)]

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if not self.rotated:
            return x
        if self.rotated == DIM:
            return EW.rope(x, positions, self.inv_freq)  # type: ignore[no-any-return]
        first = EW.rope(x[..., : self.rotated], positions, self.inv_freq)
        return torch.cat((first, x[..., self.rotated :]), -1)

    def forward(self, h: torch.Tensor, past: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> Any:
        q, k, v = self.project(h, past)
        out, k_cache, v_cache = EW.cached_attention(q, k, v, k_cache, v_cache, past, DIM**-0.5, 0.0, self.window)
        return h + self.out(out), k_cache, v_cache


class Shared(Attention):
    """An attention, and another over the cache that the first has written."""

    def __init__(self) -> None:
        super().__init__(0)
        self.later = Linear(HIDDEN, HEADS * DIM)

    def forward(self, h: torch.Tensor, past: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> Any:
        q, k, v = self.project(h, past)
        out, k_cache, v_cache = EW.cached_attention(q, k, v, k_cache, v_cache, past, DIM**-0.5, 0.0, 0)
        h = h + self.out(out)
        q = self.later(h).reshape(*h.shape[:2], HEADS, DIM)
        positions = past + torch.arange(h.shape[1])
        return h + self.out(EW.shared_attention(q, k_cache, v_cache, positions, DIM**-0.5, 0)), k_cache, v_cache


class Merged(Attention):
    """A decoder step of one layer whose attention sees its cache and an encoder's keys and values."""

    def __init__(self, window: int, softcap: float) -> None:
        super().__init__(DIM, window)
        self.softcap = softcap
        self.embed, self.head = Embedding(VOCAB, HIDDEN), Linear(HIDDEN, VOCAB)

    def forward(self, ids: Any, past: Any, mask: Any, asked: Any, states: list[torch.Tensor]) -> Any:  # type: ignore[override]
        h = self.embed(ids)
        k_cache, v_cache, cross_k, cross_v = states
        q, k, v = self.project(h, past)
        seen = mask.unsqueeze(1).unsqueeze(1)
        out, k_cache, v_cache = EW.merged_attention(
            q, k, v, k_cache, v_cache, cross_k, cross_v, seen, past, DIM**-0.5, self.softcap, self.window
        )
        return self.head((h + self.out(out)).index_select(1, asked)), k_cache, v_cache


class CrossKV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = Linear(HIDDEN, KV * DIM), Linear(HIDDEN, KV * DIM)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        lead = hidden.shape[:2]
        k, v = (p(hidden).reshape(*lead, KV, DIM).transpose(1, 2) for p in (self.k, self.v))
        return k, v


class Recalling(nn.Module):
    """A decoder step that reads some of its tokens' embeddings from a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.head = Embedding(VOCAB, HIDDEN), Attention(8), Linear(HIDDEN, VOCAB)

    def forward(self, ids: Any, past: Any, asked: Any, memory: Any, slots: Any, states: list[torch.Tensor]) -> Any:
        recalled = memory.index_select(1, slots.clamp(min=0))
        h = torch.where((slots >= 0).unsqueeze(0).unsqueeze(2), recalled, self.embed(ids))
        h, k_cache, v_cache = self.layer(h, past, *states)
        return self.head(h.index_select(1, asked)), k_cache, v_cache


class Reading(nn.Module):
    """The step that fills such a memory, with a cache of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = Embedding(VOCAB, HIDDEN), Attention(DIM)

    def forward(self, ids: Any, past: Any, asked: Any, states: list[torch.Tensor]) -> Any:
        h, k_cache, v_cache = self.layer(self.embed(ids), past, *states)
        return h.index_select(1, asked), k_cache, v_cache


def initialised(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.5 if "conv" in name or parameter.dim() == 1 else 0.5 if "embed" in name else 0.25
        value = noise * scale + (1.0 if name.endswith("norm.weight") else 0.0)
        parameter.data = value.to(torch.bfloat16).float()  # as of a checkpoint, and exact in every target's float types
        parameter.requires_grad_(False)
    return module.eval()


def causal(layers: Sequence[Any], most: int, seed: int = 0) -> list[Graph]:
    """The graph `decoder` of layers between an embedding and a head."""
    model = nn.Module()
    model.embed, model.layers = Embedding(VOCAB, HIDDEN), nn.ModuleList(layers)
    model.norm, model.head = RMSNorm(HIDDEN, 2.0**-20, 0.0), Linear(HIDDEN, VOCAB)
    initialised(model, seed)
    states = [layer.states(i) for i, layer in enumerate(layers)]
    parts = DecoderParts(model.embed, model.layers, model.norm, model.head)
    return [causal_graph(CausalStep({"whole": model}, parts, [len(s) for s in states]), states, VOCAB, most)]


def merged(most: int, window: int = 0, softcap: float = 0.0) -> list[Graph]:
    """Graphs `cross_kv` and `decoder`."""
    cross = ("batch", KV, "source", DIM)
    states = kv_states(0, KV, DIM) + [State(f"cross_{n}_0", "cross", F32, cross, updated=False) for n in ("k", "v")]
    hidden, mask = (
        Port("encoder_hidden", F32, ("batch", "source", HIDDEN)),
        Port("encoder_mask", torch.bool, ("batch", "source")),
    )
    source = {"batch": (1, 8), "source": (1, most)}
    return [
        Graph(
            "cross_kv",
            initialised(CrossKV(), 1),
            (hidden,),
            tuple(Port(s.name, F32, s.shape) for s in states if s.kind == "cross"),
            example={"batch": 2, "source": 5},
            bounds=source,
        ),
        Graph(
            "decoder",
            initialised(Merged(window, softcap), 2),
            (
                Port("input_ids", I64, ("batch", "sequence")),
                Port("past_length", I64, (1,)),
                mask,
                Port("logit_positions", I64, ("logits",)),
            ),
            (Port("logits", F32, ("batch", "logits", VOCAB)),),
            tuple(states),
            {"batch": 2, "source": 5, "sequence": 3, "capacity": 7, "logits": 2},
            source | dict.fromkeys(("sequence", "capacity", "logits"), (1, most)),
        ),
    ]


def remembering(most: int, memory: int) -> list[Graph]:
    """Graphs `context`, which makes a memory, and `decoder`, which reads it."""
    ids, past = Port("input_ids", I64, ("batch", "sequence")), Port("past_length", I64, (1,))
    asked = Port("logit_positions", I64, ("logits",))
    own = [State(f"context_{s.name}", s.kind, s.dtype, s.shape, updated=True) for s in kv_states(0, KV, DIM)]
    bounds = {"batch": (1, 8)} | dict.fromkeys(("sequence", "capacity", "logits"), (1, most))
    example = {"batch": 2, "sequence": 3, "capacity": 7, "logits": 2}
    return [
        Graph(
            "context",
            initialised(Reading(), 3),
            (ids, past, asked),
            (Port("memory", F32, ("batch", "logits", HIDDEN)),),
            tuple(own),
            example,
            bounds,
        ),
        Graph(
            "decoder",
            initialised(Recalling(), 4),
            (ids, past, asked, Port("memory", F32, ("batch", "memory", HIDDEN)), Port("slots", I64, ("sequence",))),
            (Port("logits", F32, ("batch", "logits", VOCAB)),),
            tuple(kv_states(0, KV, DIM)),
            example | {"memory": 4},
            bounds | {"memory": (1, memory)},
        ),
    ]


BLOCKS: dict[str, Any] = {
    "delta": lambda most: causal([DeltaNet()], most),
    "mamba": lambda most: causal([Mamba()], most),
    "hgrn": lambda most: causal([Hgrn()], most),
    "per_head": lambda most: causal([Hgrn(per_head=True)], most),
    "mixer": lambda most: causal([Mixer()], most),
    "griffin": lambda most: causal([Griffin()], most),
    "rwkv": lambda most: causal([Rwkv()], most),
    "hybrid": lambda most: causal([DeltaNet(), Attention(4), Hgrn()], most),
    "no_rope": lambda most: causal([Attention(0), Attention(0, window=5)], most),
    "partial": lambda most: causal([Attention(4), Attention(8, window=5)], most),
    "shared": lambda most: causal([Shared(), Attention(DIM)], most),
}
"""Name -> the graphs of a decoder-only model of so many positions."""

QUICK = ("delta", "mamba")
SOME = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in BLOCKS]
"""All of them, as parameters of a test; a few are enough for the fast suite."""


def tokens(batch: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, count))


def feed(
    session: Session, state: Any, ids: np.ndarray, pieces: Sequence[int], extra: dict[str, Any] | None = None
) -> np.ndarray:
    """All logits [batch, n, vocab] of `ids`, given in pieces of these lengths, from position 0 on."""
    at, logits = 0, []
    for piece in pieces:
        inputs = {
            "input_ids": ids[:, at : at + piece],
            "past_length": np.array([at], np.int64),
            "logit_positions": np.arange(piece, dtype=np.int64),
            **(extra or {}),
        }
        logits.append(session.run("decoder", inputs, state)["logits"])
        at += piece
    return np.concatenate(logits, 1)


def worst(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference, relative to the largest value of `want`."""
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())
