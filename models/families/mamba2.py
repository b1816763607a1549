"""Mamba-2 (arXiv 2405.21060): layers of one Mamba-2 mixer each, no attention, no feed-forward."""

from __future__ import annotations

from ...checkpoints.names import Names
from ..config import ConfigReader
from ..hybrid import UNBOUNDED, DescribedHybrid, HybridSpec, one_mixer_names
from ..layers.mamba2 import Mamba2Spec, read_groups, read_time_steps
from ..layers.norm import NormSpec


def describe(section: ConfigReader) -> HybridSpec:
    """A Mamba-2 by its config.json."""
    hidden, eps = section.integer("hidden_size", 4096), section.number("layer_norm_epsilon", 1e-5)
    heads, head_dim = section.integer("num_heads", 128, most=4096), section.integer("head_dim", 64, most=4096)
    inner = section.integer("expand", 2, most=64) * hidden
    if heads * head_dim != inner:
        raise section.error("num_heads", heads, f"{inner} channels in heads of head_dim, {head_dim}")
    bias = section.boolean("use_bias", False)
    mixer = Mamba2Spec(
        hidden,
        heads,
        head_dim,
        read_groups(section, "n_groups", heads, 8),
        section.integer("state_size", 128, most=65536),
        section.integer("conv_kernel", 4, least=2, most=64),
        section.text("hidden_act", "silu"),
        eps,
        conv_bias=section.boolean("use_conv_bias", True),
        in_bias=bias,
        out_bias=bias,
        limits=read_time_steps(section),
    )
    return HybridSpec(
        vocab=section.integer("vocab_size", 32768),
        hidden=hidden,
        positions=section.integer("max_position_embeddings", UNBOUNDED),
        layers=((mixer,),) * section.integer("num_hidden_layers", 64, most=1024),
        norm=NormSpec(eps),
        tied=section.flag("tie_word_embeddings", False),
    )


class Model(DescribedHybrid):
    """A Mamba-2 checkpoint's modules: transformers' names, and those of state-spaces/mamba2."""

    describe = staticmethod(describe)

    @property
    def names(self) -> Names:
        return one_mixer_names(self.spec)
