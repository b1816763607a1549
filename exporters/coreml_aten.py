"""The table from the plain ATen that models have around the `edgewright::` ops to MIL operations.

What may enter: coremltools, torch, `coreml_lowerings`. Whatever is not here is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Var, types

from ..errors import UserError
from .coreml_lowerings import Lowering, scaled


def _binary(op: Callable[..., Any]) -> Callable[..., Any]:
    def lower(low: Lowering, _: Any, x: Any, y: Any, alpha: float = 1) -> Any:
        if not isinstance(x, Var | torch.Tensor) and not isinstance(y, Var | torch.Tensor):
            raise UserError("--format coreml: arithmetic on lengths has no lowering")
        like = x if isinstance(x, Var) else low.var(y, None)
        x, y = low.var(x, like), low.var(y, like)
        if alpha != 1:  # coremltools' own frontend drops it
            y = mb.mul(x=y, y=low.var(alpha, y))
        return op(x=x, y=y)

    return lower


def _add(low: Lowering, node: Any, x: Any, y: Any, alpha: float = 1) -> Any:
    """The sum of two activations is held shrunk: see `SHRINK`."""
    if not all(isinstance(v, Var) and v.dtype == types.fp16 for v in (x, y)):
        return _binary(mb.add)(low, node, low.plain(x), low.plain(y), alpha)
    if alpha != 1:  # coremltools' own frontend drops it
        y = mb.mul(x=low.plain(y), y=low.half(alpha))
    return low.mark_shrunk(mb.add(x=low.shrunk(x), y=low.shrunk(y)))


def _index_select(low: Lowering, _: Any, x: Any, axis: int, ids: Any) -> Any:
    picked = mb.gather(x=low.var(x), indices=low.var(ids), axis=axis)
    return low.mark_shrunk(picked) if low.is_shrunk(x) else picked


def _multiply(low: Lowering, _: Any, x: Any, y: Any) -> Any:
    if isinstance(y, float) and isinstance(x, Var) and x.dtype == types.fp16:
        return scaled(low, x, y)
    return _binary(mb.mul)(low, _, x, y)


def _rsub(low: Lowering, node: Any, x: Any, y: Any, alpha: float = 1) -> Any:
    return mb.sub(x=low.var(y, x), y=x if alpha == 1 else mb.mul(x=x, y=low.var(alpha, x)))


def _reciprocal(low: Lowering, _: Any, x: Any) -> Any:
    """A true division: MIL's `inverse` adds 1e-4 unless told otherwise."""
    return mb.real_div(x=low.var(1.0, x), y=x)


def _log_softmax(low: Lowering, _: Any, x: Any, axis: int, half: bool) -> Any:
    """Without the softmax, whose small values have no logarithm."""
    shifted = mb.sub(x=x, y=mb.reduce_max(x=x, axes=[axis], keep_dims=True))
    total = mb.log(x=mb.reduce_sum(x=mb.exp(x=shifted), axes=[axis], keep_dims=True))
    return mb.sub(x=shifted, y=total)


def _unary(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda low, _, x: op(x=low.var(x))


def _arange(low: Lowering, node: Any, *limits: Any, **_: Any) -> Any:
    start, end = (0, limits[0]) if len(limits) == 1 else limits[:2]
    step = limits[2] if len(limits) > 2 else 1
    if all(isinstance(v, int) for v in (start, end, step)):
        return low.constants.array(np.arange(start, end, step, dtype=np.int32))
    return mb.range_1d(start=low.var(start), end=low.var(end), step=low.var(step))


def _sym_size(low: Lowering, node: Any, x: Any, axis: int) -> Any:
    return low.size(node.args[0].meta["val"].shape[axis])


def _view(low: Lowering, node: Any, x: Any, shape: list[Any]) -> Any:
    sizes = [s if isinstance(s, int) else -1 for s in shape]
    if sizes.count(-1) > 1:
        parts = [low.var(s) for s in shape]
        return mb.reshape(x=low.var(x), shape=mb.concat(values=[mb.expand_dims(x=p, axes=[0]) for p in parts], axis=0))
    return mb.reshape(x=low.var(x), shape=sizes)


def _to_copy(low: Lowering, node: Any, x: Any, dtype: Any = None, **_: Any) -> Any:
    """Floats are all float16 here, so a change between float types is none; a bool becomes numbers."""
    source = node.args[0].meta["val"].dtype
    if dtype is None or dtype == source or (dtype.is_floating_point and source.is_floating_point):
        return x
    if source == torch.bool or not dtype.is_floating_point:
        kind = "fp16" if dtype.is_floating_point else "bool" if dtype == torch.bool else "int32"
        return mb.cast(x=low.var(x), dtype=kind)
    raise UserError("--format coreml: whole numbers as float16 would be rounded; no lowering")


def _to(low: Lowering, node: Any, x: Any, dtype: Any, *_: Any, **__: Any) -> Any:
    if not isinstance(dtype, torch.dtype):
        raise UserError("--format coreml: a change of device has no lowering")
    return _to_copy(low, node, x, dtype)


def _transpose(low: Lowering, node: Any, x: Any, a: int, b: int) -> Any:
    order = list(range(len(x.shape)))
    order[a], order[b] = order[b], order[a]
    return mb.transpose(x=x, perm=order)


def _linear(low: Lowering, _: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    return low.linear(x, low.var(weight), bias)


ATEN: dict[str, Callable[..., Any]] = {
    "aten::add": _add,
    "aten::sub": _binary(mb.sub),
    "aten::mul": _multiply,
    "aten::div": _binary(mb.real_div),
    "aten::le": _binary(mb.less_equal),
    "aten::lt": _binary(mb.less),
    "aten::ge": _binary(mb.greater_equal),
    "aten::gt": _binary(mb.greater),
    "aten::eq": _binary(mb.equal),
    "aten::ne": _binary(mb.not_equal),
    "aten::logical_and": _binary(mb.logical_and),
    "aten::logical_or": _binary(mb.logical_or),
    "aten::logical_not": _unary(mb.logical_not),
    "aten::abs": _unary(mb.abs),
    "aten::tanh": _unary(mb.tanh),
    "aten::sigmoid": _unary(mb.sigmoid),
    "aten::relu": _unary(mb.relu),
    "aten::exp": _unary(mb.exp),
    "aten::sqrt": _unary(mb.sqrt),
    "aten::rsqrt": lambda low, _, x: _reciprocal(low, _, mb.sqrt(x=x)),
    "aten::reciprocal": _reciprocal,
    "aten::rsub": _rsub,
    "aten::log_softmax": lambda low, _, x, axis, *rest: _log_softmax(low, _, x, axis, False),
    "aten::_log_softmax": _log_softmax,
    "aten::neg": lambda low, _, x: mb.mul(x=x, y=low.var(-1, x)),
    "aten::arange": _arange,
    "aten::sym_size": _sym_size,
    "aten::view": _view,
    "aten::reshape": _view,
    "aten::_unsafe_view": _view,
    "aten::unsqueeze": lambda low, _, x, axis: mb.expand_dims(x=low.var(x), axes=[axis]),
    "aten::squeeze": lambda low, _, x, axis: mb.squeeze(x=x, axes=axis if isinstance(axis, list) else [axis]),
    "aten::transpose": _transpose,
    "aten::permute": lambda low, _, x, order: mb.transpose(x=x, perm=order),
    "aten::cat": lambda low, _, values, axis=0: mb.concat(values=[low.var(v) for v in values], axis=axis),
    "aten::index_select": _index_select,
    "aten::embedding": lambda low, _, table, ids, *rest: mb.gather(x=low.var(table), indices=ids, axis=0),
    "aten::where": lambda low, _, cond, a, b: mb.select(
        cond=cond, a=low.var(a, b if isinstance(b, Var) else None), b=low.var(b, a if isinstance(a, Var) else None)
    ),
    "aten::matmul": lambda low, _, x, y: mb.matmul(x=x, y=low.var(y)),
    "aten::softmax": lambda low, _, x, axis, *rest: mb.softmax(x=x, axis=axis),
    "aten::_softmax": lambda low, _, x, axis, half: mb.softmax(x=x, axis=axis),
    "aten::linear": _linear,
    "aten::clone": lambda low, _, x, **rest: x,
    "aten::_to_copy": _to_copy,
    "aten::to": _to,
}
"""The plain ATen that models have around the `edgewright::` ops, by name; overloads share a lowering."""
