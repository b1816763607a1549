"""FP8: transformers' own ("fp8": `weight` times `weight_scale_inv`, or `weight_scale`), FBGEMM's and ModelOpt's."""

from __future__ import annotations

from ..checkpoint import TensorStore
from .block import Block
from .parts import FLOAT8, Found, Parts, Weight, modules
from .tiled import Tiling, block_sizes, times_scales

ACTIVATIONS = ("input_scale", "activation_scale", "input_scale_ub", "output_scale")
"""Scales of a module's inputs and outputs."""

_CACHE = (".k_scale", ".v_scale", ".q_scale", ".prob_scale")
_UNSAID = (Tiling(0, 0), Tiling(1, 0), Tiling(128, 128))


def find(store: TensorStore, block: Block) -> Found:
    """The weights of an FP8 checkpoint. Raises UserError for parts that do not fit."""
    blocks = block_sizes(block, "weight_block_size")
    weights: dict[str, Weight] = {}
    for leaf in ("weight_scale_inv", "weight_scale"):
        for stem in modules(store, leaf):
            parts = Parts(store, stem)
            parts.drop(*ACTIVATIONS)
            weights[stem + "weight"] = times_scales(parts, leaf, FLOAT8, [blocks] if blocks else _UNSAID)
    method = block.values.get("quant_method", "fp8")
    how = f" in blocks of {blocks.rows} by {blocks.columns}" if blocks else ""
    return Found(weights, f"{method}, 8 bits{how}", unused(store))


def unused(store: TensorStore) -> frozenset[str]:
    """Scales of a quantized KV cache."""
    return frozenset(name for name in store.infos if name.endswith(_CACHE))


def modelopt(store: TensorStore, block: Block) -> Found:
    """The weights of a ModelOpt checkpoint whose algorithm is FP8. Raises UserError for its others."""
    block.word("quant_algo", "", ("fp8",))
    return find(store, Block({"quant_method": "modelopt"}, block.where))
