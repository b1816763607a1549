"""OLMo 2 and 3 (arXiv 2501.00656), and EXAONE 4: norms behind the blocks, and on queries and keys.

OLMo 3 has windows in three of four layers, which RoPE scaling leaves alone. EXAONE 4 normalises each head by itself, and where
some layers slide the full ones have no RoPE.
"""

from __future__ import annotations

from ..config import ConfigReader, StackKeys
from ..decoder import DecoderSpec, DescribedDecoder, attentions, plain
from ..rope import read_rope

FULL, SLIDING = "full_attention", "sliding_attention"


def describe(section: ConfigReader) -> DecoderSpec:
    """An OLMo 2 or 3, or an EXAONE 4, by its config.json."""
    kind = section.text("model_type")
    if kind == "exaone4":
        return _exaone(section)
    keys = StackKeys(section, positions=2048, eps=1e-5)
    bias = section.flag("attention_bias", False)
    types = [FULL] * keys.layers
    ropes: dict[str, str | None] = {FULL: None}
    if kind == "olmo3":
        types = section.layer_types(keys.layers, 4)
        ropes = {FULL: FULL, SLIDING: SLIDING}
    read = {
        name: read_rope(_one_base(section), 500000.0 if kind == "olmo3" else 10000.0, key)
        for name, key in ropes.items()
    }
    window = section.window(types)
    attention = attentions(
        keys,
        [read[t] for t in types],
        [window if t == SLIDING else 0 for t in types],
        bias=bias,
        out_bias=bias,
        norm_eps=keys.eps,
        norm_offset=0.0,
        norm_whole=True,
    )
    return plain(keys, section, attention, placement="post")


def _one_base(section: ConfigReader) -> ConfigReader:
    """Both kinds of layers have the base of `rope_theta`."""
    if "rope_theta" not in section.values:
        return section
    return ConfigReader({**section.values, "rope_local_base_freq": section.values["rope_theta"]}, section.where)


def _exaone(section: ConfigReader) -> DecoderSpec:
    keys = StackKeys(section, positions=2048, eps=1e-5)
    slides = section.values.get("sliding_window", 4096) is not None
    pattern = section.values.get("sliding_window_pattern", 4)
    if isinstance(pattern, str):
        if not 0 < len(pattern) <= 1024 or set(pattern) - {"L", "G"}:
            raise section.error("sliding_window_pattern", pattern, "a number, or letters L and G")
        every = len(pattern)
    else:
        every = section.integer("sliding_window_pattern", 4, most=1024) if slides else 1
    types = section.layer_types(keys.layers, every) if slides else [FULL] * keys.layers
    window = section.integer("sliding_window", 4096) if slides else 0
    attention = attentions(
        keys,
        read_rope(section, 10000.0),
        [window if t == SLIDING else 0 for t in types],
        unrotated=[i for i, t in enumerate(types) if slides and t == FULL],
        norm_eps=keys.eps,
        norm_offset=0.0,
    )
    return plain(keys, section, attention, placement="post")


class Model(DescribedDecoder):
    """The modules of an OLMo 2 or 3 or EXAONE 4 checkpoint."""

    describe = staticmethod(describe)
