"""SmolLM3: Llama without RoPE in every fourth layer."""

from __future__ import annotations

from ..config import ConfigReader, StackKeys
from ..decoder import DecoderSpec, DescribedDecoder, attentions, plain
from ..rope import read_rope


def describe(section: ConfigReader) -> DecoderSpec:
    """A SmolLM3 by its config.json."""
    keys = StackKeys(section, positions=32768, kv_heads=4)
    rotated = section.values.get("no_rope_layers")
    if rotated is None:
        every = section.integer("no_rope_layer_interval", 4, most=1024)
        rotated = [int((i + 1) % every != 0) for i in range(keys.layers)]
    if not isinstance(rotated, list) or len(rotated) < keys.layers or not all(r in (0, 1) for r in rotated):
        raise section.error("no_rope_layers", rotated, f"{keys.layers} times 0 or 1")
    on = section.flag("use_sliding_window", False) and section.values.get("sliding_window") is not None
    types = section.layer_types(keys.layers, 1)
    if section.values.get("layer_types") is None and on:
        types = ["full_attention" if r else "sliding_attention" for r in rotated]
    window = section.integer("sliding_window") if on else 0
    bias = section.flag("attention_bias", False)
    attention = attentions(
        keys,
        read_rope(section, 2e6, positions=32768),
        [window if kind == "sliding_attention" else 0 for kind in types[: keys.layers]],
        unrotated=[i for i in range(keys.layers) if not rotated[i]],
        bias=bias,
        out_bias=bias,
    )
    tied, mlp_bias = section.flag("tie_word_embeddings", True), section.flag("mlp_bias", False)
    return plain(keys, section, attention, mlp_bias=mlp_bias, tied=tied)


class Model(DescribedDecoder):
    """A SmolLM3 checkpoint's modules."""

    describe = staticmethod(describe)
