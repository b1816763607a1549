"""GPTQ (arXiv 2210.17323) as AutoGPTQ and GPTQModel store it.

`qweight` [in * bits / 32, out] holds codes as bit streams along the input, `qzeros` [groups, out * bits / 32] zero points along
the output, `scales` is [groups, out], and `g_idx` [in] says which group an input is in.
"""

from __future__ import annotations

from functools import cache

import torch

from ..checkpoint import TensorStore
from .bits import scaled, stream_words, unpack
from .block import Block, grouping
from .parts import FLOATS, INT32, Found, Parts, Weight, group_index, modules

_WIDTHS = (2, 3, 4, 8)
_LAYOUTS = ("gptq", "gptq_v2")


def find(store: TensorStore, block: Block) -> Found:
    """The weights of a GPTQ checkpoint. Raises UserError for another layout, and for parts that do not fit."""
    bits, group = block.integer("bits", _WIDTHS), block.group("group_size", -1)
    layout = block.word("checkpoint_format", "gptq", _LAYOUTS)
    layout = block.word("format", layout, _LAYOUTS)
    block.word("pack_dtype", "int32", ("int32",))
    if block.values.get("is_marlin_format"):
        raise block.error("is_marlin_format", "Marlin's own order of codes is not read here")
    mixed = bool(block.values.get("dynamic"))  # other widths for some modules: their shapes say which
    weights = {}
    for stem in modules(store, "qweight"):
        weights[stem + "weight"] = _weight(Parts(store, stem), None if mixed else bits, group, layout == "gptq")
    return Found(weights, f"gptq, {bits} bits {grouping(group)}")


def _weight(parts: Parts, bits: int | None, group: int, minus_one: bool) -> Weight:
    """minus_one: zero points are stored less 1, within their bits."""
    words, out = parts.take("qweight", INT32, (None, None)).shape
    indexed = parts.has("g_idx")
    if indexed:
        (width,) = parts.take("g_idx", INT32, (None,)).shape
    else:
        width = words * 32 // (bits or 4)
    if bits is None:
        bits = next((b for b in _WIDTHS if stream_words(width, b) == words), 0)
    if not bits or stream_words(width, bits) != words:
        raise parts.error(f"qweight has {words} rows, not those of {width} inputs of {bits or 'any width of'} bits")
    groups = parts.take("scales", FLOATS, (None, out)).shape[0]
    size = min(group or width, width)
    if -(-width // size) != groups and not (indexed and group):
        raise parts.error(
            f"scales has {groups} groups, where {width} inputs in groups of {size} have {-(-width // size)}"
        )
    parts.take("qzeros", INT32, (groups, stream_words(out, bits)))
    index = cache(group_index(parts, "g_idx", groups, size)) if indexed else lambda: None

    def rows(start: int, stop: int) -> torch.Tensor:
        codes = unpack(parts.read("qweight")[:, start:stop].t(), bits, width)
        scales = parts.read("scales")[:, start:stop].t().float()
        zeros = _zeros(parts.read("qzeros"), bits, start, stop)
        zeros = ((zeros + 1) & ((1 << bits) - 1) if minus_one else zeros).t().float()
        return scaled(codes, scales, zeros, size, index())

    return parts.weight((out, width), f"gptq {bits} {size} {minus_one}", rows)


def _zeros(packed: torch.Tensor, bits: int, start: int, stop: int) -> torch.Tensor:
    """Zero points of outputs start..stop, uint8 [groups, stop - start]. 32 codes fill `bits` whole words."""
    first = start // 32
    words = packed[:, first * bits : -(-stop // 32) * bits]
    return unpack(words, bits, stop - first * 32)[:, start - first * 32 :]
