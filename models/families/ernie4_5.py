"""ERNIE 4.5 (dense): Llama whose RoPE turns neighbouring dimensions, which is Llama's once the rows of q and k are reordered."""

from __future__ import annotations

from ...checkpoints.names import Names, halves
from ..config import ConfigReader, StackKeys
from ..decoder import DecoderSpec, DescribedDecoder, attentions, plain
from ..rope import read_rope


def describe(section: ConfigReader) -> DecoderSpec:
    """An ERNIE 4.5 by its config.json."""
    keys = StackKeys(section, positions=131072, eps=1e-5, head_dim=128, kv_heads=2)
    bias = section.flag("use_bias", False)
    attention = attentions(keys, read_rope(section, 500000.0, positions=131072), bias=bias, out_bias=bias)
    return plain(keys, section, attention, mlp_bias=bias, tied=section.flag("tie_word_embeddings", True))


class Model(DescribedDecoder):
    """An ERNIE 4.5 checkpoint's modules."""

    describe = staticmethod(describe)

    @property
    def names(self) -> Names:
        a = self.spec.attention[0]
        attn = "model.layers.{}.self_attn."
        return Names(halves(f"{attn}q_proj", a.heads), halves(f"{attn}k_proj", a.kv_heads))
