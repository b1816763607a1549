"""Qwen3 (arXiv 2505.09388): Qwen2 with a norm on each head of queries and keys, and no biases."""

from __future__ import annotations

from ..config import ConfigReader, StackKeys
from ..decoder import DecoderSpec, DescribedDecoder, attentions, plain
from ..rope import read_rope
from .qwen2 import windows


def describe(section: ConfigReader) -> DecoderSpec:
    """A Qwen3 by its config.json."""
    keys = StackKeys(section, positions=32768, head_dim=128)
    bias = section.flag("attention_bias", False)
    attention = attentions(
        keys,
        read_rope(section, 10000.0, positions=32768),
        windows(section, keys.layers),
        bias=bias,
        out_bias=bias,
        norm_eps=keys.eps,
        norm_offset=0.0,
    )
    return plain(keys, section, attention)


class Model(DescribedDecoder):
    """A Qwen3 checkpoint's modules."""

    describe = staticmethod(describe)
