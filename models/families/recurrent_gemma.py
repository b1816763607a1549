"""RecurrentGemma (Griffin, arXiv 2402.19427): two recurrent blocks, then attention within a window, and so on.

Nothing it carries grows with the text: the window's keys and values, a convolution and a state of each recurrent block.
"""

from __future__ import annotations

import torch

from ...checkpoints.names import Names, rename
from ..config import ConfigReader, StackKeys
from ..hybrid import NORMS, UNBOUNDED, BlockSpec, DescribedHybrid, HybridSpec
from ..layers.attention import AttentionSpec
from ..layers.mlp import MLPSpec
from ..layers.norm import NormSpec
from ..layers.rg_lru import RecurrentSpec
from ..rope import read_rope


def describe(section: ConfigReader) -> HybridSpec:
    """A RecurrentGemma by its config.json."""
    keys = StackKeys(section, positions=UNBOUNDED)
    act = section.text("hidden_activation", "gelu_pytorch_tanh")
    if not section.boolean("embeddings_scale_by_sqrt_dim", True):
        raise section.error("embeddings_scale_by_sqrt_dim", False, "true")
    if keys.intermediate % 2:
        raise section.error("intermediate_size", keys.intermediate, "an even number: gate and up together")
    blocks: dict[str, BlockSpec] = {
        "recurrent": RecurrentSpec(
            keys.hidden,
            lru_width(section, keys.hidden, keys.heads),
            keys.heads,
            section.integer("conv1d_width", 4, least=2, most=64),
            act,
        ),
        "attention": AttentionSpec(
            keys.hidden,
            keys.heads,
            keys.kv_heads,
            keys.head_dim,
            keys.head_dim**-0.5,
            read_rope(section, 10000.0, partial=True),
            window=section.integer("attention_window_size", 2048, least=2),
            bias=section.boolean("attention_bias", False),
            out_bias=True,
            rotated=section.rotated(keys.head_dim, 0.5),
        ),
    }
    pattern = block_types(section)
    mlp = MLPSpec(keys.hidden, keys.intermediate // 2, act, bias=True)
    return HybridSpec(
        vocab=keys.vocab,
        hidden=keys.hidden,
        positions=keys.max_positions,
        layers=tuple((blocks[pattern[i % len(pattern)]], mlp) for i in range(keys.layers)),
        norm=NormSpec(keys.eps, offset=1.0),
        embedding_scale=float(torch.tensor(keys.hidden**0.5, dtype=torch.bfloat16, device="cpu")),  # as it was trained
        final_softcap=section.number("logits_soft_cap", 30.0),
        tied=section.flag("tie_word_embeddings", True),
    )


def lru_width(section: ConfigReader, hidden: int, heads: int) -> int:
    """The channels of the unit, a multiple of `heads`."""
    width = section.integer("lru_width", hidden)
    if width % heads:
        raise section.error("lru_width", width, f"a multiple of {heads} heads")
    return width


def block_types(section: ConfigReader) -> list[str]:
    """The kinds of layers, which repeat."""
    value = section.values.get("block_types", ["recurrent", "recurrent", "attention"])
    good = isinstance(value, list) and 0 < len(value) <= 1024
    if not good or not all(kind in ("recurrent", "attention") for kind in value):
        raise section.error("block_types", value, "a list of 'recurrent' and 'attention'")
    return list(value)


class Model(DescribedHybrid):
    """A RecurrentGemma checkpoint's modules."""

    describe = staticmethod(describe)

    @property
    def names(self) -> Names:
        layer = "model.layers.{}."
        return Names(
            *(rename(f"{layer}temporal_block.*", f"{layer}{name}.*") for name in ("recurrent", "self_attn")),
            rename(f"{layer}mlp_block.*", f"{layer}mlp.*"),
            rename(f"{layer}temporal_pre_norm", f"{layer}{NORMS[0]}"),
            rename(f"{layer}channel_pre_norm", f"{layer}{NORMS[1]}"),
            rename("model.final_norm", "model.norm"),
        )
