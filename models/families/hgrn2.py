"""HGRN-2 (arXiv 2404.07904): gated linear attention with 1 - forget gate as its keys.

Names, the scale of the queries and the epsilon of the norm before the output projection are those of the
flash-linear-attention release. By the key `attn` some layers are plain attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...graph import State
from ..causal import CausalModel, CausalStep, DecoderParts, kv_states, recurrent_state
from ..config import ConfigReader
from ..kv_cache import Cache
from ..language_model import shorten_stack
from ..layers.activations import silu, softplus, twice_atanh
from ..layers.attention import AttentionSpec, CachedAttention
from ..layers.block import Block
from ..layers.linear import Embedding, Linear
from ..layers.mlp import GatedMLP
from ..layers.norm import RMSNorm
from ..layers.ops import EW
from ..rope import Rope

_OUTPUT_EPS = 1e-5  # of the norm before the output projection; norm_eps is for the others
_LEAST_KEPT = 1e-6  # below it the log of an underflowed gate would be minus infinity
_CONFIG, _ROWS = "edgewright", "lower_bounds"  # where a shortened config says how many rows the checkpoint has


class LinearAttention(Block):
    """For each token `S = diag(kept) S + (1 - kept) i'`; `kept` is the forget gate above its lower bound."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = Linear(hidden, hidden)
        self.f_proj = Linear(hidden, hidden)
        self.i_proj = Linear(hidden, hidden)
        self.g_norm = RMSNorm(hidden, _OUTPUT_EPS, offset=0.0)
        self.o_proj = Linear(hidden, hidden)

    def forward(
        self, x: torch.Tensor, bound: torch.Tensor | None, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [B, T, hidden]; bound: [hidden]; state: [B, H, D, D]. Returns the output and the state after these tokens."""
        split = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        q, (fade, keys) = silu(self.q_proj(x)), forget(self.f_proj(x), bound)
        out, state = EW.linear_attention(
            q.reshape(split),
            keys.reshape(split),
            self.i_proj(x).reshape(split),
            fade.reshape(split),
            state,
            split[3] ** -0.5,
        )
        return self.o_proj(self.g_norm(out.reshape(x.shape))), state


def forget(f: torch.Tensor, bound: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(log of the share that is kept, the share that is lost), each [..., hidden], of gate inputs f and lower bounds [hidden]."""
    lost = torch.sigmoid(-f)
    if bound is None:
        return -softplus(-f), lost
    lost = lost * (1.0 - bound)
    kept = bound + torch.sigmoid(f) * (1.0 - bound)
    # log(kept) is minus 2 atanh of this ratio; near 1 a logarithm in half precision would lose it.
    near = -twice_atanh(lost / (kept * 2.0 + lost))
    far = torch.log(torch.relu(kept - _LEAST_KEPT) + _LEAST_KEPT)
    return torch.where(lost < kept, near, far), lost


class Layer(nn.Module):
    """Linear or plain attention and the gated MLP, each behind a norm."""

    def __init__(self, attn: LinearAttention | CachedAttention, hidden: int, mlp: GatedMLP, eps: float) -> None:
        super().__init__()
        self.linear = isinstance(attn, LinearAttention)
        self.attn = attn
        self.attn_norm = RMSNorm(hidden, eps, offset=0.0)
        self.mlp_norm = RMSNorm(hidden, eps, offset=0.0)
        self.mlp = mlp

    def forward(
        self, h: torch.Tensor, past_length: torch.Tensor, bound: torch.Tensor | None, *states: Cache
    ) -> tuple[Cache, ...]:
        x = self.attn_norm(h)
        mixed, *new = self.attn(x, bound, *states) if self.linear else self.attn(x, past_length, *states)
        h = h + mixed
        return (h + self.mlp(self.mlp_norm(h)), *new)


class Decoder(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, section: ConfigReader, vocab: int) -> None:
        super().__init__()
        section.absent("use_short_conv")
        self.hidden = hidden = section.integer("hidden_size")
        layers = section.integer("num_hidden_layers", most=1024)
        self.heads, eps = read_heads(section, hidden), section.number("norm_eps", 1e-6)
        if not section.boolean("elementwise_affine", True):
            raise section.error("elementwise_affine", False, "true")
        self.attending, self.spec = read_attention(section, hidden, layers)
        intermediate, act = intermediate_size(section, hidden), section.text("hidden_act", "swish")
        self.embeddings = Embedding(vocab, hidden)
        self.bounded = section.boolean("use_lower_bound", True)
        if self.bounded:
            rows = layers
            if isinstance(section.values.get(_CONFIG), dict):
                rows = section.section(_CONFIG).integer(_ROWS, layers, least=layers, most=1024)
            self.lower_bounds = nn.Parameter(torch.empty(rows, hidden), requires_grad=False)
        self.layers = nn.ModuleList()
        for i in range(layers):
            attends = self.spec is not None and i in self.attending
            attn = CachedAttention(self.spec) if self.spec and attends else LinearAttention(hidden, self.heads)
            self.layers.append(Layer(attn, hidden, GatedMLP(hidden, intermediate, act), eps))
        self.norm = RMSNorm(hidden, eps, offset=0.0)

    def bounds(self) -> list[torch.Tensor | None]:
        """The lower bound [hidden] of each layer: sums of a softmax over the layers, None in the first."""
        bounds: list[torch.Tensor | None] = [None] * len(self.layers)
        if self.bounded:
            shares = torch.softmax(self.lower_bounds.to(torch.float32).transpose(0, 1), -1)  # [hidden, rows]
            for i in range(1, len(self.layers)):
                bounds[i] = shares.narrow(1, 1, i).sum(1)
        return bounds

    def states(self) -> list[list[State]]:
        width = self.hidden // self.heads
        return [
            kv_states(i, self.spec.kv_heads, self.spec.head_dim)
            if self.spec is not None and i in self.attending
            else [recurrent_state(i, self.heads, width, width)]
            for i in range(len(self.layers))
        ]


def read_heads(section: ConfigReader, hidden: int) -> int:
    """Heads of the linear attention, by their width `expand_ratio`; if that is null, by `num_heads`."""
    if "expand_ratio" in section.values and section.values["expand_ratio"] is None:
        return section.divisor("num_heads", hidden)
    return hidden // section.divisor("expand_ratio", hidden, min(128, hidden))


def read_attention(section: ConfigReader, hidden: int, layers: int) -> tuple[list[int], AttentionSpec | None]:
    """The layers with plain attention and its shape, by the object `attn`."""
    if section.values.get("attn") is None:
        return [], None
    attn = section.section("attn")
    attn.absent("qk_norm")
    which = attn.values.get("layers")
    if not isinstance(which, list) or not all(type(i) is int and 0 <= i < layers for i in which):
        raise attn.error("layers", which, f"a list of layers from 0 to {layers - 1}")
    heads = attn.divisor("num_heads", hidden)
    kv_heads = attn.divisor("num_kv_heads", heads, heads)
    if hidden // heads % 8 or hidden // heads > 4096:
        raise attn.error("num_heads", heads, f"heads of {hidden} dimensions in all, each a multiple of 8 up to 4096")
    head_dim = hidden // heads
    return which, AttentionSpec(
        hidden,
        heads,
        kv_heads,
        head_dim,
        head_dim**-0.5,
        Rope(attn.number("rope_theta", 10000.0, least=1.0)),
        window=attn.integer("window_size") if attn.values.get("window_size") is not None else 0,
        bias=attn.boolean("qkv_bias", False),
    )


def intermediate_size(section: ConfigReader, hidden: int) -> int:
    """`intermediate_size`; if absent, two thirds of `hidden_ratio` times hidden, rounded up to a multiple of 256."""
    if section.values.get("intermediate_size") is not None:
        return section.integer("intermediate_size")
    ratio = section.number("hidden_ratio", 4.0, least=1.0)
    return -(-int(hidden * min(ratio, 64.0) * 2 / 3) // 256) * 256


class BoundedStep(CausalStep):
    """Prefill and decode step that computes the lower bounds once for all layers."""

    def __init__(self, model: Model) -> None:
        super().__init__({"whole": model}, model.parts(), [len(states) for states in model.states()])
        self.bounds = model.model.bounds

    def hidden(
        self, h: torch.Tensor, past_length: torch.Tensor, logit_positions: torch.Tensor, states: list[Cache]
    ) -> tuple[torch.Tensor, list[Cache]]:
        updated: list[Cache] = []
        for layer, bound, count in zip(self.parts.layers, self.bounds(), self.counts, strict=True):
            h, *new = layer(h, past_length, bound, *states[len(updated) : len(updated) + count])
            updated += new
        return h.index_select(1, logit_positions), updated


class Model(CausalModel):
    """An HGRN-2 checkpoint's modules, named as the checkpoint names them."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.vocab = self.section.integer("vocab_size")
        self.model = Decoder(self.section, self.vocab)
        self.lm_head = Linear(self.model.hidden, self.vocab)
        self.tied = self.tied_head(default=False, table="model.embeddings.weight")
        self.max_context = self.section.integer("max_position_embeddings", 2048)

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        """As the base does; the checkpoint's lower bounds keep all their rows."""
        ours = config.get(_CONFIG) or {}
        short = shorten_stack(config, layers)
        short[_CONFIG] = ours | {_ROWS: ours.get(_ROWS, config["num_hidden_layers"])}
        if short.get("attn"):
            kept = [i for i in short["attn"]["layers"] if i < short["num_hidden_layers"]]
            short["attn"] = short["attn"] | {"layers": kept}
        return short

    def step(self) -> CausalStep:
        return BoundedStep(self)

    def parts(self) -> DecoderParts:
        return DecoderParts(self.model.embeddings, self.model.layers, self.model.norm, self.lm_head)

    def states(self) -> list[list[State]]:
        return self.model.states()
