"""HunYuan (dense): Llama with a norm on each head of queries and keys behind RoPE, whose base a constant stretches."""

from __future__ import annotations

from dataclasses import replace

from ...checkpoints.names import Names, rename
from ..config import ConfigReader, StackKeys
from ..decoder import DecoderSpec, DescribedDecoder, attentions, plain
from ..rope import read_rope


def describe(section: ConfigReader) -> DecoderSpec:
    """A HunYuan by its config.json."""
    keys = StackKeys(section, positions=2048, eps=1e-5)
    bias = section.flag("attention_bias", False)
    rope = read_rope(section, 10000.0)
    block = section.values.get("rope_scaling") or section.values.get("rope_parameters") or {}
    if block.get("rope_type", block.get("type")) == "dynamic" and block.get("alpha"):
        alpha = ConfigReader(block, f"{section.where}rope_scaling.").number("alpha", least=1e-6)
        rope = replace(rope, theta=rope.theta * alpha ** (keys.head_dim / (keys.head_dim - 2)))
    attention = attentions(keys, rope, bias=bias, out_bias=bias, norm_eps=keys.eps, norm_offset=0.0, norm_rotated=True)
    return plain(keys, section, attention)


class Model(DescribedDecoder):
    """A HunYuan checkpoint's modules."""

    describe = staticmethod(describe)

    @property
    def names(self) -> Names:
        attn = "model.layers.{}.self_attn."
        return Names(rename(f"{attn}query_layernorm", f"{attn}q_norm"), rename(f"{attn}key_layernorm", f"{attn}k_norm"))
