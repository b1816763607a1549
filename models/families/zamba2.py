"""Zamba 2 (arXiv 2411.15242): Mamba-2 layers; some first run a transformer block whose weights they share.

A shared block reads the layer's input beside the embeddings. Each use has low-rank adapters of its own. Files hold a block once,
in the first layer that uses it; here each layer has its modules, tied to those. The time step is at least `time_step_min`, as
transformers computes a prompt; its own decode step leaves that limit out, ours does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...checkpoints.names import Names, Rule, rename
from ...graph import State
from ..causal import CausalModel, CausalStep, DecoderParts, kv_states
from ..config import ConfigReader
from ..hybrid import LINEAR, OLDER, layer_kinds
from ..kv_cache import Cache, cached_attention
from ..language_model import shorten_stack
from ..layers.activations import activation
from ..layers.attention import AttentionSpec, SelfAttention
from ..layers.block import Block
from ..layers.linear import Embedding, Linear
from ..layers.mamba2 import Mamba2, Mamba2Spec, in_proj_names, read_groups
from ..layers.norm import RMSNorm
from ..rope import Rope, read_rope

KINDS = {LINEAR: LINEAR, "mamba": OLDER["mamba"], "hybrid": "hybrid"}
DEFAULT = [LINEAR, *([LINEAR] * 5 + ["hybrid"]) * 7, *[LINEAR] * 4, "hybrid", *[LINEAR] * 3, "hybrid", LINEAR, LINEAR]
SHARED = "shared_transformer"


@dataclass(frozen=True)
class Spec:
    """A Zamba 2.

    Attributes:
        source: of each layer the first layer that uses the same shared block; None where it uses none.
        act, intermediate, bias: of the shared feed-forward.
        rank: of the adapters.
        adapted: attention has adapters, too.
    """

    vocab: int
    hidden: int
    positions: int
    eps: float
    source: tuple[int | None, ...]
    mixer: Mamba2Spec
    attention: AttentionSpec
    intermediate: int
    act: str
    bias: bool
    rank: int
    adapted: bool


def layer_types(section: ConfigReader) -> list[str]:
    """The kind of each layer."""
    layers = section.integer("num_hidden_layers", 54, most=1024)
    found = layer_kinds(section, layers, ("layers_block_type", "layer_types"), KINDS)
    if found is None and layers != len(DEFAULT):
        raise section.error("layers_block_type", None, f"a list of {layers} layers")
    return DEFAULT if found is None else found


def describe(section: ConfigReader) -> Spec:
    """A Zamba 2 by its config.json."""
    section.absent("use_long_context")
    if not section.flag("tie_word_embeddings", True):  # transformers then shares no block either
        raise section.error("tie_word_embeddings", section.values["tie_word_embeddings"], "true")
    if not section.boolean("use_conv_bias", True):
        raise section.error("use_conv_bias", False, "true")
    hidden, types = section.integer("hidden_size", 2560), layer_types(section)
    blocks = section.integer("num_mem_blocks", 1, most=64)
    hybrid = [i for i, kind in enumerate(types) if kind == "hybrid"]
    positions = section.integer("max_position_embeddings", 4096)
    bias = section.boolean("add_bias_linear", False)
    adapted = section.boolean("use_shared_attention_adapter", False)
    wide = 4 * hidden if section.values.get("intermediate_size") is None else section.integer("intermediate_size")
    return Spec(
        vocab=section.integer("vocab_size", 32000),
        hidden=hidden,
        positions=positions,
        eps=section.number("rms_norm_eps", 1e-5),
        source=tuple(hybrid[hybrid.index(i) % blocks] if i in hybrid else None for i in range(len(types))),
        mixer=_mixer(section, hidden, bias),
        attention=_attention(section, hidden, positions, adapted),
        intermediate=wide,
        act=section.text("hidden_act", "gelu"),
        bias=bias,
        rank=section.integer("adapter_rank", 128, most=65536),
        adapted=adapted,
    )


def _attention(section: ConfigReader, hidden: int, positions: int, adapted: bool) -> AttentionSpec:
    heads = section.integer("num_attention_heads", 32, most=4096)
    head_dim = ConfigReader({"head_dim": 2 * hidden // heads}, "2 hidden_size / num_attention_heads as ").head_dim(None)
    kv_heads, rotates = section.kv_heads(heads), section.boolean("use_mem_rope", False)
    if 2 * hidden % heads or (adapted and kv_heads != heads):
        raise section.error("num_attention_heads", heads, "as many heads of keys, together twice hidden_size")
    rope = read_rope(section, 10000.0, positions=positions) if rotates else Rope()
    return AttentionSpec(
        2 * hidden, heads, kv_heads, head_dim, (head_dim / 2) ** -0.5, rope, rotated=None if rotates else 0
    )


def _mixer(section: ConfigReader, hidden: int, bias: bool) -> Mamba2Spec:
    heads, inner = section.integer("n_mamba_heads", 8, most=4096), section.integer("mamba_expand", 2, most=64) * hidden
    if inner % heads or section.values.get("mamba_headdim", inner // heads) != inner // heads:
        raise section.error("n_mamba_heads", heads, f"heads of mamba_headdim, together {inner} channels")
    return Mamba2Spec(
        hidden,
        heads,
        inner // heads,
        read_groups(section, "mamba_ngroups", heads, 1),
        section.integer("mamba_d_state", 64, most=65536),
        section.integer("mamba_d_conv", 4, least=2, most=64),
        "silu",
        1e-5,  # whatever rms_norm_eps says
        in_bias=bias,
        out_bias=bias,
        limits=(section.number("time_step_min", 0.001), math.inf),
    )


class Adapter(nn.Module):
    """`up(down(x))`."""

    def __init__(self, inputs: int, rank: int, outputs: int) -> None:
        super().__init__()
        self.down = Linear(inputs, rank)
        self.up = Linear(rank, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.up(self.down(x))
        return out


class SharedAttention(SelfAttention):
    """Causal attention over inputs of twice the width, with adapters of this use."""

    def __init__(self, spec: Spec) -> None:
        a = spec.attention
        super().__init__(a)
        self.o_proj = Linear(a.heads * a.head_dim, spec.hidden)
        self.adapted = spec.adapted
        if spec.adapted:
            self.q_adapter = Adapter(a.hidden, spec.rank, a.hidden)
            self.k_adapter = Adapter(a.hidden, spec.rank, a.hidden)
            self.v_adapter = Adapter(a.hidden, spec.rank, a.hidden)

    def forward(
        self, x: torch.Tensor, past_length: torch.Tensor, k_cache: Cache, v_cache: Cache
    ) -> tuple[torch.Tensor, Cache, Cache]:
        """x: [B, S, 2 hidden]. Returns [B, S, hidden] and the caches."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.adapted:
            q, k, v = q + self.q_adapter(x), k + self.k_adapter(x), v + self.v_adapter(x)
        positions = past_length + torch.arange(x.shape[1], device=x.device)
        q, k, v = self.normed_and_rotated(q, k, v, positions)
        attended, k_out, v_out = cached_attention(
            q, k, v, k_cache, v_cache, past_length, self.spec.rotated_scale, 0.0, 0
        )
        return self.o_proj(attended), k_out, v_out


class SharedMLP(Block):
    """`down(act(gate) * up)`; one linear and its adapter compute gate and up side by side."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.act, self.wide = activation(spec.act), spec.intermediate
        self.gate_up_proj = Linear(spec.hidden, 2 * spec.intermediate, spec.bias)
        self.gate_up_adapter = Adapter(spec.hidden, spec.rank, 2 * spec.intermediate)
        self.down_proj = Linear(spec.intermediate, spec.hidden, spec.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.gate_up_proj(x) + self.gate_up_adapter(x)
        out: torch.Tensor = self.down_proj(
            self.act(both.narrow(2, 0, self.wide)) * both.narrow(2, self.wide, self.wide)
        )
        return out


class SharedBlock(nn.Module):
    """Attention and feed-forward, each behind a norm, without residuals."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.self_attn = SharedAttention(spec)
        self.feed_forward = SharedMLP(spec)
        self.input_layernorm = RMSNorm(2 * spec.hidden, spec.eps, offset=0.0)
        self.pre_ff_layernorm = RMSNorm(spec.hidden, spec.eps, offset=0.0)

    def forward(
        self, h: torch.Tensor, embedded: torch.Tensor, past_length: torch.Tensor, k_cache: Cache, v_cache: Cache
    ) -> tuple[torch.Tensor, Cache, Cache]:
        x = self.input_layernorm(torch.cat((h, embedded), 2))
        attended, k, v = self.self_attn(x, past_length, k_cache, v_cache)
        return self.feed_forward(self.pre_ff_layernorm(attended)), k, v


class Layer(nn.Module):
    """A Mamba-2 mixer behind a norm, whose input a shared block adds to."""

    def __init__(self, spec: Spec, shared: bool) -> None:
        super().__init__()
        self.mamba = Mamba2(spec.mixer)
        self.input_layernorm = RMSNorm(spec.hidden, spec.eps, offset=0.0)
        self.shares = shared
        if shared:
            self.shared_transformer = SharedBlock(spec)
            self.linear = Linear(spec.hidden, spec.hidden)

    def forward(
        self, h: torch.Tensor, embedded: torch.Tensor, past_length: torch.Tensor, *states: Cache
    ) -> tuple[Cache, ...]:
        """embedded: [B, S, hidden], the embeddings. states: the caches, where there is a shared block; convolution, recurrence."""
        x, caches = h, []
        if self.shares:
            added, *caches = self.shared_transformer(h, embedded, past_length, *states[:2])
            x = h + self.linear(added)
        mixed, *new = self.mamba(self.input_layernorm(x), *states[len(caches) :])
        return (h + mixed, *caches, *new)


class Decoder(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.embed_tokens = Embedding(spec.vocab, spec.hidden)
        self.layers = nn.ModuleList(Layer(spec, source is not None) for source in spec.source)
        self.final_layernorm = RMSNorm(spec.hidden, spec.eps, offset=0.0)


class Step(CausalStep):
    """Prefill and decode step; every layer gets the embeddings."""

    def hidden(
        self, h: torch.Tensor, past_length: torch.Tensor, logit_positions: torch.Tensor, states: list[Cache]
    ) -> tuple[torch.Tensor, list[Cache]]:
        embedded, updated = h, list[Cache]()
        for layer, count in zip(self.parts.layers, self.counts, strict=True):
            h, *new = layer(h, embedded, past_length, *states[len(updated) : len(updated) + count])
            updated += new
        return h.index_select(1, logit_positions), updated


class Model(CausalModel):
    """A Zamba 2 checkpoint's modules."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.spec = spec = describe(self.section)
        self.vocab, self.max_context = spec.vocab, spec.attention.rope.within(spec.positions)
        self.model = Decoder(spec)
        self.lm_head = Linear(spec.hidden, spec.vocab)
        self.tied = self.tied_head(default=True) | self._shared()

    def _shared(self) -> dict[str, str]:
        """The weights of later uses of a block -> those of its first use. Adapters are each use's own."""
        tied = {}
        for i, source in enumerate(self.spec.source):
            if source is not None and source != i:
                block = self.model.layers[i].get_submodule(SHARED)
                for name, _ in block.named_parameters():
                    if "adapter." not in name:
                        tied[f"model.layers.{i}.{SHARED}.{name}"] = f"model.layers.{source}.{SHARED}.{name}"
        return tied

    @property
    def names(self) -> Names:
        """Files number the uses of all blocks; the adapters of a use are in the block's first layer."""
        layer = "model.layers.{}."
        mixers = (f"{layer}mamba", f"{layer}mamba_decoder.mamba")
        rules: list[Rule] = [in_proj_names(self.spec.mixer, path, mixers[0]) for path in mixers]
        rules.append(rename(f"{layer}mamba_decoder.*", f"{layer}*"))
        uses = [(i, source) for i, source in enumerate(self.spec.source) if source is not None]
        parts = {f"self_attn.linear_{n}_adapter_list": f"self_attn.{n}_adapter" for n in "qkv"}
        parts["feed_forward.gate_up_proj_adapter_list"] = "feed_forward.gate_up_adapter"
        for use, (i, source) in enumerate(uses):
            for old, new in parts.items():
                at = f"model.layers.{source}.{SHARED}.{old}.{use}"
                rules += [
                    rename(f"{at}.{j}", f"model.layers.{i}.{SHARED}.{new}.{n}") for j, n in enumerate(("down", "up"))
                ]
        copies = [f"*.layers.{i}.{SHARED}.*_adapter_list.*" for i, source in uses if i != source]
        return Names(*rules, ignored=copies)

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        types = layer_types(ConfigReader(config, ""))
        values = {k: v for k, v in config.items() if k != "layer_types"} | {"num_hidden_layers": len(types)}
        short = shorten_stack(values, layers)
        return short | {"layers_block_type": types[: short["num_hidden_layers"]]}

    def step(self) -> CausalStep:
        return Step({"whole": self}, self.parts(), [len(states) for states in self.states()])

    def parts(self) -> DecoderParts:
        return DecoderParts(self.model.embed_tokens, self.model.layers, self.model.final_layernorm, self.lm_head)

    def states(self) -> list[list[State]]:
        a, mixer = self.spec.attention, self.spec.mixer
        return [
            [*(kv_states(i, a.kv_heads, a.head_dim) if source is not None else []), *mixer.states(i)]
            for i, source in enumerate(self.spec.source)
        ]
