"""bitsandbytes: NF4 and FP4 (arXiv 2305.14314), with or without quantized scales, and LLM.int8 (arXiv 2208.07339).

Of 4 bits, `weight` holds all codes in one run, the first of a pair in a byte's upper half; each block of it has a scale in
`weight.absmax`, and `weight.quant_state.bitsandbytes__nf4` is JSON that says shape and block size. Of 8 bits, a row of
`weight` is its int8 codes times `SCB` / 127.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch

from ..checkpoint import TensorStore
from .block import MOST_GROUP, Block
from .parts import Found, Parts, Weight, modules

_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_MOST_STATE = 1 << 16
_STEP = 1.0 / 127.0
_U8 = (torch.uint8,)
_STORAGE = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)


def find(store: TensorStore, block: Block) -> Found:
    """The weights of a bitsandbytes checkpoint, 4 or 8 bits. Raises UserError for parts that do not fit."""
    weights: dict[str, Weight] = {}
    texts = []
    for kind in _KINDS:
        names = modules(store, f"quant_state.bitsandbytes__{kind}")
        for stem in names:
            weights[stem[:-1]] = _weight4(Parts(store, stem[:-1]), kind)
        if names:
            block.word("bnb_4bit_quant_type", kind, (kind,))
            texts.append(f"4 bits, {kind}")
    eight = modules(store, "SCB")
    if eight:
        texts.append("8 bits")
    weights |= {stem + "weight": _weight8(Parts(store, stem)) for stem in eight}
    return Found(weights, f"bitsandbytes, {' and '.join(texts)}")


@dataclass(frozen=True)
class _State:
    """What the JSON of a weight says. nested: block size and offset of scales that are codes themselves."""

    shape: tuple[int, int]
    size: int
    nested: tuple[int, float] | None


def _state(parts: Parts, kind: str) -> _State:
    (count,) = parts.take(f"{_STATE}{kind}", _U8, (None,)).shape
    if count > _MOST_STATE:
        raise parts.error(f"its quant_state has {count} bytes, more than the {_MOST_STATE} it may have")
    try:
        values = json.loads(bytes(parts.read(f"{_STATE}{kind}").numpy()))
    except (ValueError, RecursionError):
        raise parts.error("its quant_state is no JSON") from None
    shape = values.get("shape") if isinstance(values, dict) else None
    if not isinstance(shape, list) or len(shape) != 2 or not all(_within(n, 1 << 31) for n in shape):
        raise parts.error("its quant_state names no shape of two sizes")
    if values.get("quant_type") != kind or not _block_size(values.get("blocksize")):
        raise parts.error(f"its quant_state is none of {kind} with an even block size")
    nested = None
    if parts.has(".nested_absmax"):
        offset = values.get("nested_offset")
        sound = isinstance(offset, int | float) and not isinstance(offset, bool) and isfinite(offset)
        if not sound or not _block_size(values.get("nested_blocksize")):
            raise parts.error("its quant_state has no offset and block size for its scales")
        nested = (values["nested_blocksize"], float(offset))
    return _State((shape[0], shape[1]), values["blocksize"], nested)


def _within(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def _block_size(value: Any) -> bool:
    return _within(value, MOST_GROUP) and value % 2 == 0


def _weight4(parts: Parts, kind: str) -> Weight:
    state = _state(parts, kind)
    (out, width), size = state.shape, state.size
    blocks = -(-out * width // size)
    info = parts.take("", _STORAGE)
    if info.dtype.itemsize * torch.Size(info.shape).numel() != -(-out * width // 2):
        raise parts.error(f"{list(info.shape)} are not the bytes of 4-bit codes of shape {[out, width]}")
    parts.take(".quant_map", (torch.float32,), (16,))
    parts.take(".absmax", _U8 if state.nested else (torch.float32,), (blocks,))
    if state.nested:
        parts.take(".nested_absmax", (torch.float32,), (-(-blocks // state.nested[0]),))
        parts.take(".nested_quant_map", (torch.float32,), (256,))

    def rows(start: int, stop: int) -> torch.Tensor:
        first, last = start * width // size, -(-stop * width // size)
        data = parts.read("").reshape(-1).view(torch.uint8)[first * size // 2 : last * size // 2]
        codes = torch.stack((data >> 4, data & 15), 1).flatten()
        values = parts.read(".quant_map")[codes.int()]
        if values.shape[0] < (last - first) * size:  # the last block may be short
            values = torch.nn.functional.pad(values, (0, (last - first) * size - values.shape[0]))
        values = (values.view(last - first, size) * _scales(parts, state, first, last)[:, None]).flatten()
        begin = start * width - first * size
        return values[begin : begin + (stop - start) * width].view(stop - start, width)

    return parts.weight((out, width), f"bitsandbytes {kind}", rows)


def _scales(parts: Parts, state: _State, first: int, last: int) -> torch.Tensor:
    """Scales of blocks first..last, float32 [last - first]."""
    stored = parts.read(".absmax")[first:last]
    if state.nested is None:
        return stored
    size, offset = state.nested
    outer = parts.read(".nested_absmax")[torch.arange(first, last) // size]
    return parts.read(".nested_quant_map")[stored.int()] * outer + offset


def _weight8(parts: Parts) -> Weight:
    out, width = parts.take("weight", (torch.int8,), (None, None)).shape
    parts.take("SCB", (torch.float32,), (out,))
    if parts.has("weight_format"):
        parts.take("weight_format", _U8, (), (1,))
        if int(parts.read("weight_format").reshape(-1)[0]) != 0:
            raise parts.error("weight_format is none of rows, the one order of codes that is read here")

    def rows(start: int, stop: int) -> torch.Tensor:
        return parts.read("weight")[start:stop].float().mul_(parts.read("SCB")[start:stop, None]).mul_(_STEP)

    return parts.weight((out, width), "bitsandbytes 8", rows)
