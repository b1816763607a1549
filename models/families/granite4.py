"""Granite 4, dense and hybrid (H): attention or Mamba-2 in each layer, before a gated feed-forward, with Granite's factors.

Layers of experts are refused by name.
"""

from __future__ import annotations

from ...checkpoints.names import Names, rename, split
from ..config import ConfigReader, StackKeys
from ..hybrid import FULL, LINEAR, OLDER, DescribedHybrid, HybridSpec, layer_kinds, mamba_names
from ..layers.attention import AttentionSpec
from ..layers.mlp import MLPSpec
from ..layers.norm import NormSpec
from ..rope import Rope, read_rope
from .bamba import read_mixer

KINDS = {LINEAR: LINEAR, FULL: FULL, **OLDER}


def describe(section: ConfigReader) -> HybridSpec:
    """A Granite 4 by its config.json."""
    experts = section.integer("num_local_experts", 8, least=0)
    if experts:
        raise section.error("num_local_experts", experts, "0: layers of experts are not supported")
    if section.values.get("normalization_function", "rmsnorm") != "rmsnorm":
        raise section.error("normalization_function", section.values["normalization_function"], "'rmsnorm'")
    keys = StackKeys(section, positions=2048, intermediate="shared_intermediate_size")
    kinds = layer_kinds(section, keys.layers, ("layer_types", "layers_block_type"), KINDS) or [LINEAR] * keys.layers
    positions, bias = section.values.get("position_embedding_type"), section.flag("attention_bias", False)
    if positions not in (None, "nope", "rope"):
        raise section.error("position_embedding_type", positions, "'rope', 'nope' or null")
    attention = AttentionSpec(
        keys.hidden,
        keys.heads,
        keys.kv_heads,
        keys.head_dim,
        section.number("attention_multiplier", 1.0, least=1e-9),
        read_rope(section, 10000.0) if positions == "rope" else Rope(),
        bias=bias,
        out_bias=bias,
        rotated=None if positions == "rope" else 0,
    )
    mlp = MLPSpec(keys.hidden, keys.intermediate, section.text("hidden_act", "silu"))
    mixer = read_mixer(section, keys.hidden, keys.eps) if LINEAR in kinds else None
    return HybridSpec(
        vocab=keys.vocab,
        hidden=keys.hidden,
        positions=keys.max_positions,
        layers=tuple((mixer if mixer is not None and kind == LINEAR else attention, mlp) for kind in kinds),
        norm=NormSpec(keys.eps),
        embedding_scale=section.number("embedding_multiplier", 1.0),
        residual_scale=section.number("residual_multiplier", 1.0),
        logits_scale=1.0 / section.number("logits_scaling", 1.0, least=1e-9),
        tied=section.flag("tie_word_embeddings", False),
    )


class Model(DescribedHybrid):
    """A Granite 4 checkpoint's modules. Its files hold gate and up as one weight."""

    describe = staticmethod(describe)

    @property
    def names(self) -> Names:
        layer, wide = "model.layers.{}.", self.section.integer("shared_intermediate_size")
        return Names(
            *mamba_names(self.spec, f"{layer}mamba"),
            split(f"{layer}shared_mlp.input_linear", {f"{layer}mlp.gate_proj": wide, f"{layer}mlp.up_proj": wide}),
            rename(f"{layer}shared_mlp.output_linear", f"{layer}mlp.down_proj"),
        )
