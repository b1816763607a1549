"""Granite 3 (dense): Llama with factors on embeddings, scores, what a block adds, and logits."""

from __future__ import annotations

from ..config import ConfigReader, StackKeys
from ..decoder import DecoderSpec, DescribedDecoder, attentions, plain
from ..rope import read_rope


def describe(section: ConfigReader) -> DecoderSpec:
    """A Granite by its config.json."""
    keys = StackKeys(section, positions=2048)
    bias = section.flag("attention_bias", False)
    attention = attentions(
        keys,
        read_rope(section, 10000.0),
        bias=bias,
        out_bias=bias,
        scale=section.number("attention_multiplier", 1.0, least=1e-9),
    )
    return plain(
        keys,
        section,
        attention,
        mlp_bias=section.flag("mlp_bias", False),
        embedding_scale=section.number("embedding_multiplier", 1.0),
        residual_scale=section.number("residual_multiplier", 1.0),
        logits_scale=1.0 / section.number("logits_scaling", 1.0, least=1e-9),
    )


class Model(DescribedDecoder):
    """A Granite checkpoint's modules."""

    describe = staticmethod(describe)
