"""Mistral (arXiv 2310.06825) and Ministral: Llama within a window, in all layers or in those that the config names."""

from __future__ import annotations

from ..config import ConfigReader, StackKeys
from ..decoder import DecoderSpec, DescribedDecoder, attentions, plain
from ..rope import read_rope


def describe(section: ConfigReader) -> DecoderSpec:
    """A Mistral by its config.json."""
    keys = StackKeys(section, positions=131072)
    window = 0 if section.values.get("sliding_window", 4096) is None else section.integer("sliding_window", 4096)
    types = section.layer_types(keys.layers, keys.layers + 1)
    windows = [window if kind == "sliding_attention" else 0 for kind in types]
    return plain(keys, section, attentions(keys, read_rope(section, 10000.0, positions=131072), windows))


class Model(DescribedDecoder):
    """A Mistral or Ministral checkpoint's modules."""

    describe = staticmethod(describe)
