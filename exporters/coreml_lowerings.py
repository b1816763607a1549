"""The table from `edgewright::` ops to MIL operations; the plain ATen around them is in `coreml_aten`.

What may enter: coremltools, torch, `coreml_weights`. All floats are float16 (the one type of the Neural Engine) but rotary
angles and what `coreml_precision` moves to float64, which are float32. Each form is chosen so that float16 does not overflow
where the reference would not, and so that no constant costs accuracy: see `rms_norm`, `scaled`, `rope`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Var, types

from ..errors import UserError
from .coreml_weights import Constants

MASKED = -30000.0
"""A masked score: finite, as in the reference, so that a row with nothing to attend to stays finite; its exp is 0."""

_TINY = 2.0**-14  # the smallest normal float16

SHRINK = 2.0**-6
"""What sums of activations are held at. Gemma's residual grows beyond float16; a power of two costs no digit, and the norms
that read it divide by its size anyway."""


class Lowering:
    """One function being built. Values are MIL variables, Python numbers, or torch tensors not yet emitted."""

    def __init__(self, constants: Constants) -> None:
        self.constants = constants
        self.symbols: dict[str, tuple[Any, int]] = {}
        self.states: dict[str, Any] = {}
        self.written: dict[int, Any] = {}
        """What ops that write states made of them, by identity."""
        self.shared: dict[Any, Any] = {}
        self._shrunk: dict[int, Any] = {}

    def mark_shrunk(self, var: Any) -> Any:
        """`var`, remembered as `SHRINK` times the value that it stands for."""
        self._shrunk[id(var)] = var
        return var

    def is_shrunk(self, value: Any) -> bool:
        return id(value) in self._shrunk

    def shrunk(self, var: Any) -> Any:
        """An activation times `SHRINK`."""
        return var if self.is_shrunk(var) else self.once(("shrunk", var), lambda: mb.mul(x=var, y=self.half(SHRINK)))

    def plain(self, value: Any) -> Any:
        """A value, or a list of them, at its own size."""
        if isinstance(value, list):
            return [self.plain(v) for v in value]
        if not self.is_shrunk(value):
            return value
        return self.once(("plain", value), lambda: mb.mul(x=value, y=self.half(1 / SHRINK)))

    def var(self, value: Any, like: Any = None) -> Any:
        """`value` as a variable; a number, or a constant beside a float32, in the dtype of `like`."""
        wide = like is not None and like.dtype == types.fp32
        if isinstance(value, Var):
            return self.cast(value, "fp32") if wide and value.dtype == types.fp16 else value
        if isinstance(value, torch.Tensor):
            return self.constants.tensor(value.to(torch.float64) if wide and value.is_floating_point() else value)
        if isinstance(value, bool):
            return self.constants.array(np.bool_(value))
        if like is not None and types.is_float(like.dtype):
            return self.half(value) if like.dtype == types.fp16 else self.constants.array(np.float32(value))
        if isinstance(value, int):
            return self.constants.array(np.int32(value))
        return self.half(value)

    def cast(self, var: Any, dtype: str) -> Any:
        return self.once(("cast", var, dtype), lambda: mb.cast(x=var, dtype=dtype))

    def half(self, value: float) -> Any:
        return self.constants.array(np.float16(value))

    def linear(self, x: Any, weight: Any, bias: Any) -> Any:
        """x W' + b. Without a bias one of zeros, shared by size: left out, coremltools stores one for each linear."""
        zeros = self.constants.array(np.zeros(weight.shape[0], np.float16)) if bias is None else self.var(bias)
        return mb.linear(x=x, weight=weight, bias=zeros)

    def size(self, value: Any) -> Any:
        """A dimension as an int, or as an int32 scalar variable where it is dynamic; sums and products of those too."""
        if isinstance(value, int | Var):
            return value
        expression = value.node.expr if isinstance(value, torch.SymInt) else value
        if expression.is_Integer:
            return int(expression)
        if expression.is_Add or expression.is_Mul:
            join = mb.add if expression.is_Add else mb.mul
            first, *rest = (self.var(self.size(part)) for part in expression.args)
            return self.once(("size", str(expression)), lambda: reduce(lambda a, b: join(x=a, y=b), rest, first))
        name = str(expression)
        if name not in self.symbols:
            raise UserError(f"--format coreml: the length {name} is no dimension of an input")
        var, axis = self.symbols[name]
        return self.once(("size", name), lambda: mb.gather(x=mb.shape(x=var), indices=axis, axis=0))

    def once(self, key: Any, build: Callable[[], Any]) -> Any:
        if key not in self.shared:
            self.shared[key] = build()
        return self.shared[key]


def op_name(op: Any) -> str:
    """`aten::add` of any overload."""
    schema = getattr(op, "_schema", None)
    return schema.name if schema is not None else str(getattr(op, "__name__", op))


# ---- quantized ------------------------------------------------------------------------------------------------------


def quantized_linear(low: Lowering, _: Any, x: Any, codes: Any, scales: Any, bias: Any, bits: int, group: int) -> Any:
    return low.linear(x, low.constants.weight(codes, scales, bits), bias)


def quantized_embedding(low: Lowering, _: Any, ids: Any, codes: Any, scales: Any, bits: int, group: int) -> Any:
    return mb.gather(x=low.constants.weight(codes, scales, bits), indices=ids, axis=0)


# ---- pointwise ------------------------------------------------------------------------------------------------------


def scaled(low: Lowering, x: Any, factor: float) -> Any:
    """x times a number. One that float16 rounds becomes a product of two that together are right to about 2^-21."""
    first, second = halves(factor)
    x = mb.mul(x=x, y=low.half(first))
    return x if second == 1.0 else mb.mul(x=x, y=low.half(second))


def halves(factor: float) -> tuple[float, float]:
    """Two float16 numbers whose product is closest to `factor`; the second is 1 where one number is exact enough."""
    if factor == 0.0 or abs(float(np.float16(factor)) / factor - 1.0) < 1e-6:
        return float(np.float16(factor)), 1.0
    firsts = 1.0 + np.arange(1024) / 1024.0
    seconds = (factor / firsts).astype(np.float16).astype(np.float64)
    best = int(np.abs(firsts * seconds - factor).argmin())
    return float(firsts[best]), float(seconds[best])


def rms_norm(low: Lowering, _: Any, x: Any, weight: torch.Tensor, eps: float, offset: float) -> Any:
    """x over its largest magnitude m, whose square cannot overflow; eps is divided by m squared accordingly.

    A shrunk x has a shrunk m: then eps shrinks too, by its square, and the result is the same.
    Gemma's `1 + weight` has more digits than float16: added to the product instead, nothing of a bf16 weight is lost.
    """
    largest = mb.reduce_max(x=mb.abs(x=x), axes=[-1], keep_dims=True)
    largest = mb.maximum(x=largest, y=low.half(_TINY))
    unit = mb.real_div(x=x, y=largest)
    root = scaled(low, mb.real_div(x=low.half(1.0), y=largest), math.sqrt(eps))
    root = low.shrunk(root) if low.is_shrunk(x) else root
    mean = mb.reduce_mean(x=mb.mul(x=unit, y=unit), axes=[-1], keep_dims=True)
    rms = mb.sqrt(x=mb.add(x=mean, y=mb.mul(x=root, y=root)))
    normed = mb.real_div(x=unit, y=rms)
    out = mb.mul(x=normed, y=low.constants.tensor(weight))
    if offset == 0.0:
        return out
    return mb.add(x=out, y=normed if offset == 1.0 else scaled(low, normed, offset))


def gelu_tanh(low: Lowering, _: Any, x: Any) -> Any:
    """Spelled out. Beyond 10 the tanh is 1 and x squared would overflow: clipping there changes nothing."""
    near = mb.clip(x=x, alpha=np.float16(-10.0), beta=np.float16(10.0))
    c = math.sqrt(2.0 / math.pi)
    slope = mb.add(x=mb.mul(x=mb.mul(x=near, y=near), y=low.half(c * 0.044715)), y=low.half(c))
    gate = mb.add(x=mb.tanh(x=mb.mul(x=near, y=slope)), y=low.half(1.0))
    return mb.mul(x=mb.mul(x=x, y=low.half(0.5)), y=gate)


# ---- rotary embedding and attention ---------------------------------------------------------------------------------


def rope(low: Lowering, _: Any, x: Any, positions: Any, inv_freq: torch.Tensor) -> Any:
    cos, sin = low.once(
        ("rope", id(positions), inv_freq.numpy().tobytes()), lambda: _rotation(low, positions, inv_freq)
    )
    half = inv_freq.shape[0]
    x1, x2 = mb.split(x=x, split_sizes=[half, half], axis=-1)
    first = mb.sub(x=mb.mul(x=x1, y=cos), y=mb.mul(x=x2, y=sin))
    second = mb.add(x=mb.mul(x=x2, y=cos), y=mb.mul(x=x1, y=sin))
    return mb.concat(values=[first, second], axis=-1)


def _rotation(low: Lowering, positions: Any, inv_freq: torch.Tensor) -> tuple[Any, Any]:
    """cos and sin [seq, 1, half] in float16, of float32 angles brought into [-pi, pi] (fast GPU sines want that)."""
    column = mb.expand_dims(x=mb.cast(x=low.var(positions), dtype="fp32"), axes=[1, 2])
    angles = mb.mul(x=column, y=low.constants.array(inv_freq.numpy().reshape(1, 1, -1)))
    turns = mb.round(x=mb.mul(x=angles, y=low.constants.array(np.float32(0.5 / math.pi))))
    # 2 pi in two parts, the first short enough that its product with `turns` is exact.
    angles = mb.sub(x=angles, y=mb.mul(x=turns, y=low.constants.array(np.float32(6.28125))))
    angles = mb.sub(x=angles, y=mb.mul(x=turns, y=low.constants.array(np.float32(2 * math.pi - 6.28125))))
    return mb.cast(x=mb.cos(x=angles), dtype="fp16"), mb.cast(x=mb.sin(x=angles), dtype="fp16")


def _attend(low: Lowering, q: Any, k: Any, v: Any, allowed: Any, scale: float, softcap: float) -> Any:
    """q [1, S, H, D]; k, v [1, KV, T, D]; allowed bool [S or 1, T]. Returns [1, S, H * D]."""
    rows = _rows(low, q, k.shape[1], scale)
    scores = _scores(low, rows, k, allowed, q.shape[2] // k.shape[1], softcap)
    return _unfold(mb.matmul(x=mb.softmax(x=scores, axis=-1), y=mb.squeeze(x=v, axes=[0])), q)


def _rows(low: Lowering, q: Any, kv_heads: int, scale: float) -> Any:
    """[KV, H / KV * S, D]: the queries of a key head are the rows of one product, so that no key is copied."""
    rows = mb.transpose(x=mb.squeeze(x=scaled(low, q, scale), axes=[0]), perm=[1, 0, 2])
    return mb.reshape(x=rows, shape=[kv_heads, -1, q.shape[3]])


def _scores(low: Lowering, rows: Any, k: Any, allowed: Any, groups: int, softcap: float) -> Any:
    """[KV, H / KV * S, T] of rows and keys [1, KV, T, D], masked."""
    scores = mb.matmul(x=rows, y=mb.squeeze(x=k, axes=[0]), transpose_y=True)
    if softcap:
        scores = mb.mul(x=mb.tanh(x=mb.real_div(x=scores, y=low.half(softcap))), y=low.half(softcap))
    if groups > 1 and allowed.shape[0] != 1:
        allowed = low.once(("groups", id(allowed), groups), lambda: mb.concat(values=[allowed] * groups, axis=0))
    allowed = low.once(("mask", id(allowed)), lambda: mb.expand_dims(x=allowed, axes=[0]))
    return mb.select(cond=allowed, a=scores, b=low.half(MASKED))


def _unfold(out: Any, q: Any) -> Any:
    """[KV, H / KV * S, D] -> [1, S, H * D]."""
    heads, dim = q.shape[2], q.shape[3]
    out = mb.transpose(x=mb.reshape(x=out, shape=[heads, -1, dim]), perm=[1, 0, 2])
    return mb.reshape(x=out, shape=[1, -1, heads * dim])


def bidirectional_attention(
    low: Lowering, _: Any, q: Any, k: Any, v: Any, mask: Any, scale: float, softcap: float
) -> Any:
    k, v = mb.transpose(x=k, perm=[0, 2, 1, 3]), mb.transpose(x=v, perm=[0, 2, 1, 3])
    return _attend(low, q, k, v, _flat_mask(low, mask), scale, softcap)


def cross_attention(low: Lowering, _: Any, q: Any, k: Any, v: Any, mask: Any, scale: float, softcap: float) -> Any:
    return _attend(low, q, k, v, _flat_mask(low, mask), scale, softcap)


def _flat_mask(low: Lowering, mask: Any) -> Any:
    return low.once(("flat", id(mask)), lambda: mb.squeeze(x=low.var(mask), axes=[0, 1]))


def cached_attention(
    low: Lowering,
    node: Any,
    q: Any,
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    past: Any,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Any, Any, Any]:
    """New keys and values into the states with slice_update, then attention over the whole static cache."""
    keys, values, allowed = _appended(low, node, k, v, k_cache, v_cache, past, window)
    return _attend(low, q, keys, values, allowed, scale, softcap), keys, values


def merged_attention(
    low: Lowering,
    node: Any,
    q: Any,
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    cross_k: Any,
    cross_v: Any,
    mask: Any,
    past: Any,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Any, Any, Any]:
    """As `cached_attention`; the scores of the cache and of the encoder are joined for the softmax, never the keys."""
    keys, values, allowed = _appended(low, node, k, v, k_cache, v_cache, past, window)
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    rows, groups = _rows(low, q, kv_heads, scale), q.shape[2] // kv_heads
    own = _scores(low, rows, keys, allowed, groups, softcap)
    other = _scores(low, rows, cross_k, _flat_mask(low, mask), groups, softcap)
    shares = mb.softmax(x=mb.concat(values=[own, other], axis=-1), axis=-1)
    masks = [True, True, False]
    first = mb.slice_by_index(x=shares, begin=[0, 0, 0], end=[0, 0, capacity], begin_mask=[True] * 3, end_mask=masks)
    rest = mb.slice_by_index(x=shares, begin=[0, 0, capacity], end=[0, 0, 0], begin_mask=masks, end_mask=[True] * 3)
    parts = [mb.matmul(x=s, y=mb.squeeze(x=t, axes=[0])) for s, t in ((first, values), (rest, cross_v))]
    return _unfold(mb.add(x=parts[0], y=parts[1]), q), keys, values


def shared_attention(low: Lowering, _: Any, q: Any, keys: Any, values: Any, positions: Any, scale: float) -> Any:
    """Over what `cached_attention` returned of its caches."""
    positions, capacity = low.var(positions), keys.shape[2]
    slots = low.constants.array(np.arange(capacity, dtype=np.int32).reshape(1, -1))
    allowed = low.once(
        ("seen", id(positions), capacity),
        lambda: mb.less_equal(x=slots, y=mb.expand_dims(x=positions, axes=[1])),
    )
    return _attend(low, q, keys, values, allowed, scale, 0.0)


def _appended(
    low: Lowering, node: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, past: Any, window: int
) -> tuple[Any, Any, Any]:
    """Both caches with the new keys and values in them, and which slots each new token sees."""
    length = low.size(node.args[0].meta["val"].shape[1])
    begin, end = low.once(("span", id(past)), lambda: _span(low, past, length))
    keys, values = _append(low, k_cache, k, begin, end), _append(low, v_cache, v, begin, end)
    capacity = keys.shape[2]
    allowed = low.once(("causal", id(past), window, capacity), lambda: _causal(low, past, length, capacity, window))
    return keys, values, allowed


def _span(low: Lowering, past: Any, length: Any) -> tuple[Any, Any]:
    zero = low.constants.array(np.zeros(1, np.int32))
    end = mb.add(x=past, y=low.var(length))
    return mb.concat(values=[zero, zero, past, zero], axis=0), mb.concat(values=[zero, zero, end, zero], axis=0)


def _append(low: Lowering, state: Any, new: Any, begin: Any, end: Any) -> Any:
    cache = mb.slice_update(
        x=mb.read_state(input=state),
        update=mb.transpose(x=new, perm=[0, 2, 1, 3]),
        begin=begin,
        end=end,
        begin_mask=[True, True, False, True],
        end_mask=[True, True, False, True],
    )
    updated = mb.coreml_update_state(state=state, value=cache)
    low.written[id(updated)] = updated
    return updated


def _causal(low: Lowering, past: Any, length: Any, capacity: int, window: int) -> Any:
    """bool [S, capacity]: the slots token i may see."""
    new = (
        low.constants.array(np.arange(length, dtype=np.int32))
        if isinstance(length, int)
        else mb.range_1d(start=np.int32(0), end=length, step=np.int32(1))
    )
    position = mb.expand_dims(x=mb.add(x=past, y=new), axes=[1])
    slots = low.constants.array(np.arange(capacity, dtype=np.int32).reshape(1, -1))
    allowed = mb.less_equal(x=slots, y=position)
    if window:
        oldest = mb.sub(x=position, y=np.int32(window))
        allowed = mb.logical_and(x=allowed, y=mb.greater(x=slots, y=oldest))
    return allowed


# ---- convolution ----------------------------------------------------------------------------------------------------


def causal_conv(low: Lowering, node: Any, x: Any, weight: Any, bias: Any, state: Any) -> tuple[Any, Any]:
    """A product for each tap over the inputs before x and x itself; of one token, one product and one sum."""
    taps = node.args[1].meta["val"].shape[1]
    weight = weight.detach().to(torch.float32).transpose(0, 1)  # [K, C]
    seen = mb.concat(values=[mb.transpose(x=state, perm=[0, 2, 1]), x], axis=1)
    if node.args[0].meta["val"].shape[1] == 1:
        products = mb.mul(x=seen, y=low.constants.tensor(weight.unsqueeze(0).contiguous()))
        out = mb.reduce_sum(x=products, axes=[1], keep_dims=True)
    else:
        parts = [
            mb.mul(x=_rows_between(seen, tap, tap - taps + 1), y=low.constants.tensor(weight[tap].contiguous()))
            for tap in range(taps)
        ]
        out = reduce(lambda a, b: mb.add(x=a, y=b), parts)
    if bias is not None:
        out = mb.add(x=out, y=low.var(bias))
    # The reshape tells how many rows there are, which a slice of a dynamic length does not know.
    last = mb.reshape(x=_rows_between(seen, 1 - taps, 0), shape=[1, taps - 1, weight.shape[1]])
    return out, mb.transpose(x=last, perm=[0, 2, 1])


def _rows_between(x: Any, begin: int, end: int) -> Any:
    """[1, n, C] of x [1, T, C]: those from `begin` up to `end`, which is 0 or counts from the last."""
    return mb.slice_by_index(
        x=x,
        begin=[0, begin, 0],
        end=[0, end, 0],
        begin_mask=[True, False, True],
        end_mask=[True, end == 0, True],
    )


LOWERINGS: dict[str, Callable[..., Any]] = {
    "edgewright::quantized_linear": quantized_linear,
    "edgewright::quantized_embedding": quantized_embedding,
    "edgewright::rms_norm": rms_norm,
    "edgewright::gelu_tanh": gelu_tanh,
    "edgewright::rope": rope,
    "edgewright::bidirectional_attention": bidirectional_attention,
    "edgewright::cross_attention": cross_attention,
    "edgewright::cached_attention": cached_attention,
    "edgewright::merged_attention": merged_attention,
    "edgewright::shared_attention": shared_attention,
    "edgewright::causal_conv": causal_conv,
}
"""An `edgewright::` op that is not here is decomposed into ATen first."""

WRITES_STATE = frozenset({"edgewright::cached_attention", "edgewright::merged_attention"})
"""The ops that take states themselves and write them; all others are given what a state held before the call."""

TAKES_SHRUNK = frozenset({"edgewright::rms_norm", "aten::add", "aten::index_select"})
"""The ops that take a sum as it is held; all others are given it at its own size."""
