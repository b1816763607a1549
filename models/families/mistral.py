"""Mistral (arXiv 2310.06825) and Ministral: Llama within a window, in all layers or in those that the config names.

Ministral 3 makes queries larger beyond the positions of its first training; the context ends there, where the factor is 1.
"""

from __future__ import annotations

from dataclasses import replace

from ..config import ConfigReader, StackKeys
from ..decoder import DecoderSpec, DescribedDecoder, attentions, plain
from ..rope import Rope, read_rope

POSITIONS = {"mistral": 131072, "ministral": 32768, "ministral3": 262144}


def describe(section: ConfigReader) -> DecoderSpec:
    """A Mistral or Ministral by its config.json."""
    kind = section.text("model_type")
    keys = StackKeys(section, positions=POSITIONS[kind], eps=1e-5 if kind == "ministral3" else 1e-6)
    window = 0 if section.values.get("sliding_window") is None else section.integer("sliding_window")
    if kind == "mistral" and "sliding_window" not in section.values:
        window = 4096
    windows = [window] * keys.layers
    if kind == "ministral" and section.values.get("layer_types") is not None:
        types = section.layer_types(keys.layers, 1)
        windows = [window if t == "sliding_attention" else 0 for t in types]
    rope = read_rope(section, 10000.0, positions=POSITIONS[kind])
    spec = plain(keys, section, attentions(keys, rope, windows))
    return replace(spec, positions=_unscaled(section, rope, spec.positions)) if kind == "ministral3" else spec


def _unscaled(section: ConfigReader, rope: Rope, positions: int) -> int:
    """Up to where queries have no factor."""
    block = section.values.get("rope_parameters") or section.values.get("rope_scaling") or {}
    return min(positions, rope.original) if block.get("llama_4_scaling_beta") and rope.original else positions


class Model(DescribedDecoder):
    """A Mistral or Ministral checkpoint's modules."""

    describe = staticmethod(describe)
