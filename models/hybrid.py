"""Decoders whose layers differ in kind, as data: `HybridSpec` says of which blocks each layer is, one module computes them all.

A block is attention, a Mamba-2 mixer, an RG-LRU or a feed-forward: `h + block(norm(h))`. A family is a function from config.json to
a `HybridSpec` and a table of names.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checkpoints.names import Names, Rule, rename
from ..graph import State
from .causal import CausalModel, DecoderParts, kv_states, window_states
from .config import ConfigReader
from .kv_cache import Cache
from .layers.activations import softcap
from .layers.attention import AttentionSpec, CachedAttention, WindowAttention
from .layers.linear import Embedding, Linear
from .layers.mamba2 import Mamba2, Mamba2Spec, in_proj_names, scaled
from .layers.mlp import MLPSpec
from .layers.norm import NormSpec
from .layers.rg_lru import RecurrentBlock, RecurrentSpec

BlockSpec = AttentionSpec | Mamba2Spec | RecurrentSpec | MLPSpec
LayerSpec = tuple[BlockSpec, ...]
"""The blocks of a layer, in order."""

NORMS = ("input_layernorm", "post_attention_layernorm")
"""The norms before a layer's blocks, under Llama's names."""

UNBOUNDED = 1 << 20
"""Positions of a model without attention, whose state is of one size however long the text is."""

LINEAR, FULL = "linear_attention", "full_attention"
OLDER = {"mamba": LINEAR, "attention": FULL}
"""What older files call the kinds of layers."""


@dataclass(frozen=True)
class HybridSpec:
    """A decoder of layers of several kinds.

    Attributes:
        vocab, hidden, positions: sizes; positions as the config gives them.
        layers: the blocks of each layer, at most two.
        norm: before each block and behind the last.
        embedding_scale, residual_scale, logits_scale: factors of the embeddings, of what a block adds, and of the logits.
        final_softcap: of the logits; 0 for none.
        tied: the head is the embedding's table.
    """

    vocab: int
    hidden: int
    positions: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    final_softcap: float = 0.0
    tied: bool = False

    def blocks(self) -> Iterator[BlockSpec]:
        for layer in self.layers:
            yield from layer

    @property
    def mixer(self) -> Mamba2Spec | None:
        """The Mamba-2 mixer, which is the same in all layers that have one; None where none has."""
        return next((block for block in self.blocks() if isinstance(block, Mamba2Spec)), None)


def named_module(block: BlockSpec) -> tuple[str, nn.Module]:
    """The name of a block in its layer, and its module."""
    if isinstance(block, AttentionSpec):
        return "self_attn", WindowAttention(block) if block.window else CachedAttention(block)
    if isinstance(block, Mamba2Spec):
        return "mamba", Mamba2(block)
    if isinstance(block, RecurrentSpec):
        return "recurrent", RecurrentBlock(block)
    return "mlp", block.made()


def block_states(block: BlockSpec, layer: int) -> list[State]:
    """What a block of a layer carries from call to call."""
    if isinstance(block, AttentionSpec):
        sizes = layer, block.kv_heads, block.head_dim
        return window_states(*sizes, block.window) if block.window else kv_states(*sizes)
    return [] if isinstance(block, MLPSpec) else block.states(layer)


_POSITIONED = ("self_attn", "recurrent")
"""The blocks that take the number of tokens before theirs."""


class HybridLayer(nn.Module):
    """The blocks of a layer, each behind a norm."""

    def __init__(self, spec: HybridSpec, layer: int) -> None:
        super().__init__()
        self.residual_scale = spec.residual_scale
        self.names: list[tuple[str, str, int]] = []  # of a block's norm and of its module, and how many states it has
        for norm, block in zip(NORMS, spec.layers[layer], strict=False):
            name, module = named_module(block)
            self.add_module(norm, spec.norm.of(spec.hidden))
            self.add_module(name, module)
            self.names.append((norm, name, len(block_states(block, layer))))

    def forward(self, h: torch.Tensor, past_length: torch.Tensor, *states: Cache) -> tuple[Cache, ...]:
        updated: list[Cache] = []
        for norm, name, count in self.names:
            x, module = getattr(self, norm)(h), getattr(self, name)
            own = states[len(updated) : len(updated) + count]
            mixed = module(x, past_length, *own) if name in _POSITIONED else module(x, *own)
            added, *new = mixed if isinstance(mixed, tuple) else (mixed,)
            h = h + scaled(added, self.residual_scale)
            updated += new
        return h, *updated


class HybridStack(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, spec: HybridSpec) -> None:
        super().__init__()
        self.scale = spec.embedding_scale
        self.embed_tokens = Embedding(spec.vocab, spec.hidden)
        self.layers = nn.ModuleList(HybridLayer(spec, i) for i in range(len(spec.layers)))
        self.norm = spec.norm.of(spec.hidden)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, S, hidden] of input_ids [B, S]."""
        return scaled(self.embed_tokens(input_ids), self.scale)


class DescribedHybrid(CausalModel):
    """A decoder-only model that is a `HybridSpec`, with a head."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.spec = spec = self.describe(self.section)
        self.vocab = spec.vocab
        ropes = [block.rope for block in spec.blocks() if isinstance(block, AttentionSpec) and block.rotary_dims]
        self.max_context = min([spec.positions, *(rope.within(spec.positions) for rope in ropes)])
        self.model = HybridStack(spec)
        self.lm_head = Linear(spec.hidden, spec.vocab)
        self.tied = {"lm_head.weight": "model.embed_tokens.weight"} if spec.tied else {}

    @staticmethod
    @abstractmethod
    def describe(section: ConfigReader) -> HybridSpec:
        """The decoder of a config.json. Raises UserError for a bad value."""

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """Logits [B, L, vocab] of normed hidden states [B, L, hidden]."""
        return softcap(scaled(self.lm_head(h), self.spec.logits_scale), self.spec.final_softcap)

    def parts(self) -> DecoderParts:
        return DecoderParts(self.model.embed, self.model.layers, self.model.norm, self.head)

    def states(self) -> list[list[State]]:
        return [[s for block in layer for s in block_states(block, i)] for i, layer in enumerate(self.spec.layers)]


def mamba_names(spec: HybridSpec, path: str) -> list[Rule]:
    """The mixers at `path` of the file (`model.layers.{}.mamba`)."""
    new = "model.layers.{}.mamba"
    moved = [] if path == new else [rename(f"{path}.*", f"{new}.*")]
    return moved if spec.mixer is None else [in_proj_names(spec.mixer, path, new), *moved]


def one_mixer_names(spec: HybridSpec) -> Names:
    """Files whose layers are one `norm` and one `mixer` each, under `backbone.` or `model.`."""
    rules: list[Rule] = []
    for root in ("backbone", "model"):
        layer = f"{root}.layers.{{}}"
        rules += mamba_names(spec, f"{layer}.mixer")
        rules += [rename(f"{layer}.mixer.*", f"model.layers.{{}}.{name}.*") for name in ("self_attn", "mlp")]
        rules += [rename(f"{layer}.norm", f"model.layers.{{}}.{NORMS[0]}"), rename(f"{root}.norm_f", "model.norm")]
        rules += [rename(f"{root}.{name}", "model.embed_tokens") for name in ("embeddings", "embedding")]
    return Names(*rules)


def layer_kinds(section: ConfigReader, layers: int, keys: Sequence[str], known: Mapping[str, str]) -> list[str] | None:
    """The kinds of so many layers under the first of `keys` that is there; None if none is.

    known: a file's name of a kind -> the kind. Raises UserError for another name or another number of layers.
    """
    key = next((k for k in keys if section.values.get(k) is not None), None)
    if key is None:
        return None
    value = section.values[key]
    good = isinstance(value, list) and len(value) == layers
    if not good or not all(isinstance(kind, str) and kind in known for kind in value):
        raise section.error(key, value, f"{layers} times one of {', '.join(sorted(known))}")
    return [known[kind] for kind in value]
