"""The table from the plain ATen that models have around the `edgewright::` ops to MIL operations.

An ATen op without a row is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...errors import UserError
from ...targets.coreml.library import Builder as mb
from ...targets.coreml.library import Var, types
from .builder import Lowering, scaled
from .shapes import SHAPES


def _binary(op: Callable[..., Any]) -> Callable[..., Any]:
    def lower(low: Lowering, _: Any, x: Any, y: Any, alpha: float = 1) -> Any:
        like = _like(low, x, y)
        x, y = low.var(x, like), low.var(y, like)
        if alpha != 1:  # coremltools' own frontend drops it
            y = mb.mul(x=y, y=low.var(alpha, y))
        return op(x=x, y=y)

    return lower


def _like(low: Lowering, x: Any, y: Any) -> Any:
    """The operand whose type both take: float32 before float16, floats before integers, a variable before a number."""
    order = {types.fp32: 3, types.fp16: 2, types.int32: 1}
    operands = [low.var(v) for v in (x, y) if isinstance(v, Var | torch.Tensor)] or [low.var(x)]
    return max(operands, key=lambda v: order.get(v.dtype, 0))


def _add(low: Lowering, node: Any, x: Any, y: Any, alpha: float = 1) -> Any:
    """The sum of two activations stays shrunk: see `builder.SHRINK`."""
    if not all(isinstance(v, Var) and v.dtype == types.fp16 and len(v.shape) > 1 for v in (x, y)):
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


def _negative(low: Lowering, x: Any) -> Any:
    return mb.mul(x=x, y=low.var(-1, x))


def _power(low: Lowering, _: Any, x: Any, exponent: Any) -> Any:
    if exponent == 2:
        return mb.mul(x=x, y=x)
    if exponent == 0.5:
        return mb.sqrt(x=x)
    raise UserError(f"--format coreml: a power of {exponent} has no lowering")


def _reciprocal(low: Lowering, _: Any, x: Any) -> Any:
    """A true division: MIL's `inverse` adds 1e-4 unless told otherwise."""
    return mb.real_div(x=low.var(1.0, x), y=x)


def _log_softmax(low: Lowering, _: Any, x: Any, axis: int, half: bool) -> Any:
    """Without the softmax, whose smallest values are 0 in float16 and have no logarithm."""
    shifted = mb.sub(x=x, y=mb.reduce_max(x=x, axes=[axis], keep_dims=True))
    total = mb.log(x=mb.reduce_sum(x=mb.exp(x=shifted), axes=[axis], keep_dims=True))
    return mb.sub(x=shifted, y=total)


def _unary(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda low, _, x: op(x=low.var(x))


def _softplus(low: Lowering, _: Any, x: Any, beta: float = 1, threshold: float = 20) -> Any:
    """max(x, 0) + log(1 + exp(-|x|)), in float32: in float16 one plus a small number is one."""
    if beta != 1:
        raise UserError(f"--format coreml: softplus with beta {beta} has no lowering")
    wide = low.cast(x, "fp32")
    tail = mb.exp(x=mb.mul(x=mb.abs(x=wide), y=low.var(-1.0, wide)))
    tail = mb.log(x=mb.add(x=tail, y=low.var(1.0, wide)))
    return _like_input(low, mb.add(x=mb.relu(x=wide), y=tail), x)


def _log1p(low: Lowering, _: Any, x: Any) -> Any:
    """In float32, as `_softplus`."""
    wide = low.cast(x, "fp32")
    return _like_input(low, mb.log(x=mb.add(x=wide, y=low.var(1.0, wide))), x)


def _like_input(low: Lowering, wide: Any, x: Any) -> Any:
    """A float32 result as float16 where the input x is."""
    return low.cast(wide, "fp16") if x.dtype == types.fp16 else wide


def _silu(low: Lowering, _: Any, x: Any) -> Any:
    return mb.mul(x=x, y=mb.sigmoid(x=x))


def _clamp(low: Lowering, _: Any, x: Any, least: Any = None, most: Any = None) -> Any:
    x = x if least is None else mb.maximum(x=x, y=low.var(least, x))
    return x if most is None else mb.minimum(x=x, y=low.var(most, x))


def _reduce(op: Callable[..., Any]) -> Callable[..., Any]:
    def lower(low: Lowering, _: Any, x: Any, axes: Any = None, keep: bool = False, **__: Any) -> Any:
        listed = list(range(len(x.shape))) if axes is None else axes if isinstance(axes, list) else [axes]
        return op(x=x, axes=listed, keep_dims=keep)

    return lower


def _to_copy(low: Lowering, node: Any, x: Any, dtype: Any = None, **_: Any) -> Any:
    """All floats are float16 in the program, but float64 is float32 there. A bool becomes numbers.

    A cast from float64 to float32 changes nothing here: `translate` rounds the value where it is read.
    """
    source = node.args[0].meta["val"].dtype
    wide = dtype == torch.float64
    if dtype is None or dtype == source or (dtype.is_floating_point and source.is_floating_point):
        if not wide:
            return x
        return low.cast(x, "fp32") if isinstance(x, Var) else x.to(torch.float64)
    if source == torch.bool or wide or not dtype.is_floating_point:
        kind = "fp16" if dtype.is_floating_point else "bool" if dtype == torch.bool else "int32"
        return mb.cast(x=low.var(x), dtype="fp32" if wide else kind)
    raise UserError("--format coreml: whole numbers as float16 would be rounded; no lowering")


def _to(low: Lowering, node: Any, x: Any, dtype: Any, *_: Any, **__: Any) -> Any:
    if not isinstance(dtype, torch.dtype):
        raise UserError("--format coreml: a change of device has no lowering")
    return _to_copy(low, node, x, dtype)


def _matmul(low: Lowering, _: Any, x: Any, y: Any) -> Any:
    like = _like(low, x, y)
    return mb.matmul(x=low.var(x, like), y=low.var(y, like))


def _where(low: Lowering, _: Any, condition: Any, a: Any, b: Any) -> Any:
    like = _like(low, a, b)
    return mb.select(cond=low.var(condition), a=low.var(a, like), b=low.var(b, like))


def _linear(low: Lowering, _: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    return low.linear(x, low.var(weight), bias)


ATEN: dict[str, Callable[..., Any]] = {
    **SHAPES,
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
    "aten::erf": _unary(mb.erf),
    "aten::sigmoid": _unary(mb.sigmoid),
    "aten::relu": _unary(mb.relu),
    "aten::exp": _unary(mb.exp),
    "aten::log": _unary(mb.log),
    "aten::log1p": _log1p,
    "aten::softplus": _softplus,
    "aten::log_sigmoid": lambda low, node, x: _negative(low, _softplus(low, node, _negative(low, x))),
    "aten::silu": _silu,
    "aten::square": lambda low, _, x: mb.mul(x=x, y=x),
    "aten::clamp": _clamp,
    "aten::clamp_min": _clamp,
    "aten::clamp_max": lambda low, node, x, most: _clamp(low, node, x, None, most),
    "aten::maximum": _binary(mb.maximum),
    "aten::minimum": _binary(mb.minimum),
    "aten::sum": _reduce(mb.reduce_sum),
    "aten::mean": _reduce(mb.reduce_mean),
    "aten::amax": _reduce(mb.reduce_max),
    "aten::floor_divide": _binary(mb.floor_div),
    "aten::remainder": _binary(mb.mod),
    "add": _binary(mb.add),
    "sub": _binary(mb.sub),
    "mul": _binary(mb.mul),
    "floordiv": _binary(mb.floor_div),
    "aten::sqrt": _unary(mb.sqrt),
    "aten::rsqrt": lambda low, _, x: _reciprocal(low, _, mb.sqrt(x=x)),
    "aten::reciprocal": _reciprocal,
    "aten::rsub": _rsub,
    "aten::pow": _power,
    "aten::log_softmax": lambda low, _, x, axis, *rest: _log_softmax(low, _, x, axis, False),
    "aten::_log_softmax": _log_softmax,
    "aten::neg": lambda low, _, x: _negative(low, x),
    "aten::index_select": _index_select,
    "aten::embedding": lambda low, _, table, ids, *rest: mb.gather(x=low.var(table), indices=ids, axis=0),
    "aten::where": _where,
    "aten::matmul": _matmul,
    "aten::bmm": _matmul,
    "aten::softmax": lambda low, _, x, axis, *rest: mb.softmax(x=x, axis=axis),
    "aten::_softmax": lambda low, _, x, axis, half: mb.softmax(x=x, axis=axis),
    "aten::linear": _linear,
    "aten::clone": lambda low, _, x, **rest: x,
    "aten::contiguous": lambda low, _, x, **rest: x,
    "aten::alias": lambda low, _, x: x,
    "aten::detach": lambda low, _, x: x,
    "aten::lift_fresh_copy": lambda low, _, x: x,
    "aten::_to_copy": _to_copy,
    "aten::to": _to,
}
"""The plain ATen that models have around the `edgewright::` ops, by name; overloads share a lowering."""
