"""Codes of mlx-lm: `weight` (uint32) holds a bit stream for each row, `scales` and `biases` are [out, groups].

A value is code * scale + bias. Modules may have widths of their own in the block, under their names.
"""

from __future__ import annotations

import torch

from ..checkpoint import TensorStore
from .bits import unpack
from .block import Block, grouping
from .parts import FLOATS, Found, Parts, Weight, modules

_WIDTHS = (2, 3, 4, 5, 6, 8)


def find(store: TensorStore, block: Block) -> Found:
    """The weights of an MLX checkpoint. Raises UserError for another mode, and for parts that do not fit."""
    bits, group = _choice(block)
    weights = {}
    for stem in modules(store, "scales"):
        if store.infos.get(stem + "weight") is None or store.infos[stem + "weight"].dtype != torch.uint32:
            continue
        own = block.values.get(stem[:-1])
        inner = block.inner(stem[:-1]) if isinstance(own, dict) else None
        weights[stem + "weight"] = _weight(Parts(store, stem), *(_choice(inner) if inner else (bits, group)))
    return Found(weights, f"mlx, {bits} bits {grouping(group)}")


def _choice(block: Block) -> tuple[int, int]:
    block.word("mode", "affine", ("affine",))
    return block.integer("bits", _WIDTHS), block.group("group_size")


def _weight(parts: Parts, bits: int, size: int) -> Weight:
    out, words = parts.take("weight", (torch.uint32,), (None, None)).shape
    groups = parts.take("scales", FLOATS, (out, None)).shape[1]
    parts.take("biases", FLOATS, (out, groups))
    width = groups * size
    if not size or width * bits != 32 * words:
        raise parts.error(f"weight has {words} words a row, not those of {groups} groups of {size} at {bits} bits")

    def rows(start: int, stop: int) -> torch.Tensor:
        codes = unpack(parts.read("weight")[start:stop], bits, width)
        scales, biases = (parts.read(leaf)[start:stop].float() for leaf in ("scales", "biases"))
        values = codes.float()
        grouped = values.view(stop - start, groups, size)
        grouped *= scales[:, :, None]
        grouped += biases[:, :, None]
        return values

    return parts.weight((out, width), f"mlx {bits} {size}", rows)
