"""AWQ (arXiv 2306.00978) as AutoAWQ's "gemm" version stores it.

`qweight` [in, out / 8] and `qzeros` [groups, out / 8] hold eight codes of 4 bits a word, in the order `_NIBBLE`; `scales` is
[groups, out].
"""

from __future__ import annotations

import torch

from ..checkpoint import TensorStore
from .bits import scaled, unpack
from .block import Block, grouping
from .parts import FLOATS, INT32, Found, Parts, Weight, modules

_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)
"""Output i of a word's eight -> the nibble that holds it: nibbles hold outputs 0, 2, 4, 6, 1, 3, 5, 7."""


def find(store: TensorStore, block: Block) -> Found:
    """The weights of an AWQ checkpoint. Raises UserError for another version, and for parts that do not fit."""
    bits = block.integer("w_bit" if "w_bit" in block.values else "bits", (4,))
    group = block.group("q_group_size" if "q_group_size" in block.values else "group_size", 128)
    version = block.word("version", "gemm", ("gemm",))
    block.word("format", version, ("gemm",))
    if block.values.get("zero_point", True) is not True:
        raise block.error("zero_point", "only codes with zero points are read here")
    weights = {stem + "weight": _weight(Parts(store, stem), group) for stem in modules(store, "qweight")}
    return Found(weights, f"awq, {bits} bits {grouping(group)}")


def _weight(parts: Parts, group: int) -> Weight:
    width, words = parts.take("qweight", INT32, (None, None)).shape
    size = min(group or width, width)
    groups, out = -(-width // size), 8 * words
    parts.take("qzeros", INT32, (groups, words))
    parts.take("scales", FLOATS, (groups, out))

    def rows(start: int, stop: int) -> torch.Tensor:
        codes, zeros = (_codes(parts.read(leaf), start, stop) for leaf in ("qweight", "qzeros"))
        scales = parts.read("scales")[:, start:stop].t().float()
        return scaled(codes.t().contiguous(), scales, zeros.t().float(), size)

    return parts.weight((out, width), f"awq {size}", rows)


def _codes(packed: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Codes of outputs start..stop, uint8 [n, stop - start], of words [n, out / 8]."""
    first, last = start // 8, -(-stop // 8)
    nibbles = unpack(packed[:, first:last], 4, 8 * (last - first))
    return nibbles.view(-1, last - first, 8)[:, :, list(_NIBBLE)].flatten(1)[:, start - 8 * first : stop - 8 * first]
