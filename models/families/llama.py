"""Llama (arXiv 2302.13971) and its small kin such as SmolLM2."""

from __future__ import annotations

from ..config import ConfigReader, StackKeys
from ..decoder import DecoderSpec, DescribedDecoder, attentions, plain
from ..rope import read_rope


def describe(section: ConfigReader) -> DecoderSpec:
    """A Llama by its config.json."""
    keys = StackKeys(section, positions=2048)
    bias = section.flag("attention_bias", False)
    attention = attentions(keys, read_rope(section, 10000.0), bias=bias, out_bias=bias)
    return plain(keys, section, attention, mlp_bias=section.flag("mlp_bias", False))


class Model(DescribedDecoder):
    """A Llama checkpoint's modules."""

    describe = staticmethod(describe)
