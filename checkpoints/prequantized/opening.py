"""`dequantized`: a checkpoint whose config says that it was quantized, as one of float weights.

The block that says so is read, and dropped from the config, before any tensor is: what is not known is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import UserError
from ...system.reading import one_line, shown
from ..checkpoint import TensorStore
from . import awq, bitsandbytes, compressed_tensors, fp8, gptq, mlx
from .block import ORIGINAL, Block
from .parts import Found
from .store import DequantizedStore

_METHODS: dict[str, Callable[[TensorStore, Block], Found]] = {
    "awq": awq.find,
    "bitsandbytes": bitsandbytes.find,
    "compressed-tensors": compressed_tensors.find,
    "fbgemm_fp8": fp8.find,
    "fp8": fp8.find,
    "gptq": gptq.find,
    "mlx": mlx.find,
    "modelopt": fp8.modelopt,
}

_KEYS = ("quantization_config", "compression_config", "quantization")
_SECTIONS = (None, "text_config", "llm_config", "language_config")
_MARKS = (".qweight", ".weight_packed", ".weight_scale_inv", ".SCB", ".absmax", ".quant_map")
"""Ends of names that quantized weights alone have."""


def dequantized(
    config: dict[str, Any], store: TensorStore, beside: Block | None = None
) -> tuple[dict[str, Any], TensorStore, tuple[str, ...]]:
    """The config without its block, the store of float weights, and lines for the user.

    beside: the block of a file beside config.json, which counts where config.json has none. Raises UserError for a method that is
    not known, and for parts that are missing or do not fit.
    """
    config, block = _taken(config)
    block = block or beside
    if block is None:
        _refuse_marks(store, "does not say how it was quantized (quantization_config)")
        return config, store, ()
    method = _method(block)
    found = _METHODS[method](store, block)
    if not found.weights:
        _refuse_marks(store, f"says {method}, which has no such part")
        store = DequantizedStore(store, {}, found.unused) if found.unused else store
        return (
            config,
            store,
            (f"config.json says {method}, but the weights are stored as plain values, which are taken",),
        )
    line = f"the checkpoint is already quantized ({found.text}): its values are taken as they are, and quantized again"
    return config, DequantizedStore(store, found.weights, found.unused), (line,)


def _taken(config: dict[str, Any]) -> tuple[dict[str, Any], Block | None]:
    """The config without its blocks, and the one that counts. Raises UserError for one that is no object."""
    blocks: list[Block] = []
    for section in _SECTIONS:
        inner = config if section is None else config.get(section)
        if not isinstance(inner, dict):
            continue
        for key in _KEYS:
            value, where = inner.get(key), f"config.json: {f'{section}.' if section else ''}{key}"
            if value is None:
                continue
            if not isinstance(value, Mapping):
                raise UserError(f"{where} is {shown(value, 60)}, expected an object")
            if value:
                blocks.append(Block(_as_mlx(value), where))
        if any(key in inner for key in _KEYS):
            kept = {key: value for key, value in inner.items() if key not in _KEYS}
            config = kept if section is None else config | {section: kept}
    named = [b for b in blocks if "quant_method" in b.values]
    return config, next(iter(named or blocks), None)


def _as_mlx(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """mlx-lm's block, which has widths and no name for its method."""
    mlx = {"bits", "group_size"} <= values.keys() and "quant_method" not in values
    return {**values, "quant_method": "mlx"} if mlx else values


def _method(block: Block) -> str:
    method = block.values.get("quant_method")
    if method is None and (block.values.get("load_in_4bit") or block.values.get("load_in_8bit")):
        method = "bitsandbytes"
    if method is None and ("config_groups" in block.values or "sparsity_config" in block.values):
        method = "compressed-tensors"
    if isinstance(method, str) and method.lower() in _METHODS:
        return method.lower()
    said = "names no quant_method" if method is None else f"says quant_method {shown(method, 60)}"
    raise UserError(
        f"{block.where} {said}, by which the weights mean something else than their values; "
        f"read here: {', '.join(_METHODS)}; {ORIGINAL}"
    )


def _refuse_marks(store: TensorStore, why: str) -> None:
    name = next((name for name in store.infos if name.endswith(_MARKS)), None)
    if name is not None:
        raise UserError(
            f"{one_line(name)} is a part of a quantized weight, and config.json {why}; take the config.json of these weights"
        )
