"""Qwen2 (arXiv 2407.10671): Llama with biases on q, k and v, and windows in the upper layers where the config asks for them."""

from __future__ import annotations

from typing import Any

from ..config import ConfigReader
from . import llama


class StackConfig(llama.StackConfig):
    """The keys of one Qwen2 stack, as transformers reads them."""

    def __init__(self, section: ConfigReader) -> None:
        super().__init__(section, positions=32768)

    def read_layers(self, section: ConfigReader) -> None:
        self.bias, self.out_bias, self.mlp_bias = True, False, False
        self.windows = _windows(section, self.layers)


def _windows(section: ConfigReader, layers: int) -> list[int]:
    """The window of each layer, 0 where it attends to everything: `use_sliding_window` turns them on."""
    on = section.boolean("use_sliding_window", False) and section.values.get("sliding_window", 0) is not None
    if section.values.get("layer_types") is not None:
        types = section.layer_types(layers, 1)
        if not on and "sliding_attention" in types:
            raise section.error("use_sliding_window", section.values.get("use_sliding_window"), "true for these layers")
    else:
        first = section.integer("max_window_layers", 28, least=0) if on else layers
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    window = section.window(types)
    return [window if kind == "sliding_attention" else 0 for kind in types]


class Model(llama.StackModel):
    """A Qwen2 checkpoint's modules, named as the checkpoint names them."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config, StackConfig)
