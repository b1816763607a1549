"""Qwen2 (arXiv 2407.10671): Llama with biases on q, k and v, and windows in the upper layers where the config asks for them."""

from __future__ import annotations

from ..config import ConfigReader, StackKeys
from ..decoder import DecoderSpec, DescribedDecoder, attentions, plain
from ..rope import read_rope


def describe(section: ConfigReader) -> DecoderSpec:
    """A Qwen2 by its config.json."""
    keys = StackKeys(section, positions=32768)
    rope = read_rope(section, 10000.0, positions=32768)
    return plain(keys, section, attentions(keys, rope, windows(section, keys.layers), bias=True))


def windows(section: ConfigReader, layers: int) -> list[int]:
    """The window of each layer, 0 where it attends to everything: `use_sliding_window` turns them on."""
    on = section.flag("use_sliding_window", False) and section.values.get("sliding_window", 0) is not None
    if section.values.get("layer_types") is not None:
        types = section.layer_types(layers, 1)
        if not on and "sliding_attention" in types:
            raise section.error("use_sliding_window", section.values.get("use_sliding_window"), "true for these layers")
    else:
        first = section.integer("max_window_layers", 28, least=0) if on else layers
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    window = section.window(types)
    return [window if kind == "sliding_attention" else 0 for kind in types]


class Model(DescribedDecoder):
    """A Qwen2 checkpoint's modules."""

    describe = staticmethod(describe)
