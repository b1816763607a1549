"""Bamba: Mamba-2 mixers, attention in a few layers, each before a gated feed-forward."""

from __future__ import annotations

from typing import Any

from ...checkpoints.names import Names, rename
from ..config import ConfigReader, StackKeys
from ..hybrid import NORMS, DescribedHybrid, HybridSpec, mamba_names
from ..language_model import shorten_stack
from ..layers.attention import AttentionSpec
from ..layers.mamba2 import Mamba2Spec, read_groups, read_time_steps
from ..layers.mlp import MLPSpec
from ..layers.norm import NormSpec
from ..rope import read_rope

INDICES = "attn_layer_indices"


def describe(section: ConfigReader) -> HybridSpec:
    """A Bamba by its config.json."""
    absent = "num_key_value_heads" not in section.values
    keys = StackKeys(section, positions=262144, kv_heads=8 if absent else None, eps=1e-5)
    bias = section.flag("attention_bias", False)
    attention = AttentionSpec(
        keys.hidden,
        keys.heads,
        keys.kv_heads,
        keys.head_dim,
        keys.head_dim**-0.5,
        read_rope(section, 10000.0, partial=True, positions=262144),
        bias=bias,
        out_bias=bias,
        rotated=section.rotated(keys.head_dim, 0.5),
    )
    if section.values.get("attn_rotary_emb") not in (None, attention.rotary_dims):
        raise section.error("attn_rotary_emb", section.values["attn_rotary_emb"], f"{attention.rotary_dims} or nothing")
    mixer = read_mixer(section, keys.hidden, keys.eps)
    act, mlp_bias = section.text("hidden_act", "silu"), section.flag("mlp_bias", False)
    mlp = MLPSpec(keys.hidden, keys.intermediate, act, bias=mlp_bias)
    attending = attending_layers(section, keys.layers)
    return HybridSpec(
        vocab=keys.vocab,
        hidden=keys.hidden,
        positions=keys.max_positions,
        layers=tuple((attention if i in attending else mixer, mlp) for i in range(keys.layers)),
        norm=NormSpec(keys.eps),
        tied=section.flag("tie_word_embeddings", False),
    )


def attending_layers(section: ConfigReader, layers: int) -> set[int]:
    """The layers of attention, by their indices; none if the key is absent."""
    value = section.values.get(INDICES)
    if value is None:
        return set()
    good = isinstance(value, list) and len(value) <= layers
    if not good or not all(type(i) is int and 0 <= i < layers for i in value):
        raise section.error(INDICES, value, f"a list of layers below {layers}")
    return set(value)


def read_mixer(section: ConfigReader, hidden: int, eps: float) -> Mamba2Spec:
    """The mixer by the `mamba_…` keys, which Granite 4 has, too."""
    heads = section.integer("mamba_n_heads", 128, most=4096)
    inner = section.integer("mamba_expand", 2, most=64) * hidden
    head_dim = section.values.get("mamba_d_head", "auto")
    if inner % heads or head_dim not in ("auto", inner // heads):
        raise section.error("mamba_n_heads", heads, f"heads of mamba_d_head, together {inner} channels")
    bias = section.flag("mamba_proj_bias", False)
    return Mamba2Spec(
        hidden,
        heads,
        inner // heads,
        read_groups(section, "mamba_n_groups", heads, 1),
        section.integer("mamba_d_state", 256, most=65536),
        section.integer("mamba_d_conv", 4, least=2, most=64),
        section.text("hidden_act", "silu"),
        eps,
        conv_bias=section.flag("mamba_conv_bias", True),
        in_bias=bias,
        out_bias=bias,
        limits=read_time_steps(section),
    )


class Model(DescribedHybrid):
    """A Bamba checkpoint's modules."""

    describe = staticmethod(describe)

    @property
    def names(self) -> Names:
        layer = "model.layers.{}."
        return Names(
            *mamba_names(self.spec, f"{layer}mamba"),
            rename(f"{layer}feed_forward.*", f"{layer}mlp.*"),
            rename(f"{layer}pre_ff_layernorm", f"{layer}{NORMS[1]}"),
            rename("model.final_layernorm", "model.norm"),
        )

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        return shorten_stack(config, layers) | {INDICES: [i for i in config.get(INDICES) or [] if i < layers]}
