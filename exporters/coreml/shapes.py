"""The plain ATen that cuts, joins, fills and reshapes, as MIL operations.

Dynamic lengths are int32 variables, sizes known at export are constants. coremltools is told each size that is known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ...errors import UserError
from ...targets.coreml.library import Builder as mb
from ...targets.coreml.library import Var, types
from .builder import Lowering


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


def _transpose(low: Lowering, node: Any, x: Any, a: int, b: int) -> Any:
    order = list(range(len(x.shape)))
    order[a], order[b] = order[b], order[a]
    return mb.transpose(x=x, perm=order)


def _axis(node: Any, axis: int) -> int:
    rank: int = node.args[0].meta["val"].dim()
    return axis % rank


def _slice(low: Lowering, node: Any, x: Any, axis: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    axis = _axis(node, axis)
    args = [*node.args, None, None, None]
    size = node.args[0].meta["val"].shape[axis]
    first, last = _place(args[2] or 0, size), None if args[3] is None else _place(args[3], size)
    if first is None:  # a slice from the very end
        raise UserError("--format coreml: a slice without elements has no lowering")
    return _known(
        node, axis, _between(low, x, axis, start if first == "?" else first, end if last == "?" else last, step)
    )


def _place(bound: Any, size: Any) -> Any:
    """Where a slice begins or ends: counted from the front, from the end (negative), None at the very end, "?" if unknown."""
    value = bound.meta["val"] if isinstance(bound, torch.fx.Node) else bound
    if isinstance(value, int) and isinstance(size, int):
        value = min(value, size)
        return None if value == size else value
    if isinstance(value, int):
        return None if value > 2**31 - 2 else value
    past = (value - size).node.expr if isinstance(value - size, torch.SymInt) else value - size
    if not getattr(past, "is_Integer", isinstance(past, int)):
        return "?"
    return int(past) if past < 0 else None


def _known(node: Any, axis: int, x: Any) -> Any:
    """A slice of a dynamic dimension whose own length is known: coremltools must be told."""
    size = node.meta["val"].shape[axis]
    if not isinstance(size, int) or x.shape[axis] == size:
        return x
    sizes = [int(s) if isinstance(s, int) else -1 for s in node.meta["val"].shape]
    if sizes.count(-1) > 1:
        raise UserError("--format coreml: a slice of a tensor with two dynamic lengths has no lowering")
    return mb.reshape(x=x, shape=sizes)


def _between(low: Lowering, x: Any, axis: int, start: Any, end: Any, step: int = 1) -> Any:
    rank = len(x.shape)
    if start == 0 and end is None and step == 1:
        return x
    masks = [[i != axis or (end is None and last) for i in range(rank)] for last in (False, True)]

    def corner(at: Any) -> Any:
        if not isinstance(at, Var):
            return [at or 0 if i == axis else 0 for i in range(rank)]
        zero = low.constants.array(np.zeros(1, np.int32))
        return mb.concat(values=[mb.expand_dims(x=at, axes=[0]) if i == axis else zero for i in range(rank)], axis=0)

    return mb.slice_by_index(
        x=low.var(x),
        begin=corner(start),
        end=corner(end),
        stride=[step if i == axis else 1 for i in range(rank)],
        begin_mask=masks[0],
        end_mask=masks[1],
    )


def _narrow(low: Lowering, node: Any, x: Any, axis: int, start: Any, length: Any) -> Any:
    axis = _axis(node, axis)
    from_, count = (a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in node.args[2:4])
    size = node.args[0].meta["val"].shape[axis]
    first = _place(node.args[2], size)
    last = from_ + count - size
    last = last.node.expr if isinstance(last, torch.SymInt) else last
    if first == "?" or not getattr(last, "is_Integer", isinstance(last, int)):
        begin = low.var(low.size(from_))
        return _known(node, axis, _between(low, x, axis, begin, mb.add(x=begin, y=low.var(low.size(count)))))
    return _known(node, axis, _between(low, x, axis, first, int(last) or None))


def _select(low: Lowering, node: Any, x: Any, axis: int, index: int) -> Any:
    axis = _axis(node, axis)
    one = _between(low, x, axis, index, index + 1 or None)
    return mb.squeeze(x=one, axes=[axis])


def _split(low: Lowering, node: Any, x: Any, sizes: Any, axis: int = 0) -> list[Any]:
    parts = [int(v.shape[_axis(node, axis)]) for v in node.meta["val"]]
    if len(parts) == 1:
        return [x]
    return list(mb.split(x=x, split_sizes=parts, axis=_axis(node, axis)))


def _expand(low: Lowering, node: Any, x: Any, *_: Any, **__: Any) -> Any:
    """Leading dimensions are added, dimensions of size 1 repeated."""
    source, target = node.args[0].meta["val"].shape, node.meta["val"].shape
    x, extra = low.var(x), len(target) - len(source)
    x = mb.expand_dims(x=x, axes=list(range(extra))) if extra else x
    before = [1] * extra + list(source)
    reps = [1 if str(a) == str(b) else low.size(b) for a, b in zip(before, target, strict=True)]
    if all(r == 1 for r in reps if isinstance(r, int)) and all(isinstance(r, int) for r in reps):
        return x
    return mb.tile(x=x, reps=_sizes(low, reps))


def _sizes(low: Lowering, sizes: list[Any]) -> Any:
    """A shape as a list of integers, or as a variable if one of them is dynamic."""
    if all(isinstance(s, int) for s in sizes):
        return sizes
    return mb.concat(values=[mb.expand_dims(x=low.var(s), axes=[0]) for s in sizes], axis=0)


def _filled(value: float | None) -> Callable[..., Any]:
    """A new tensor of the node's shape and type, filled with `value`; if that is None, with the second argument."""

    def lower(low: Lowering, node: Any, _: Any, *rest: Any, **__: Any) -> Any:
        result = node.meta["val"]
        number = rest[0] if value is None else value
        kind = (
            np.float16 if result.dtype == torch.float32 else np.float32 if result.dtype == torch.float64 else np.int32
        )
        sizes = [low.size(s) for s in result.shape]
        if all(isinstance(s, int) for s in sizes):
            return low.constants.array(np.full(sizes, number, np.bool_ if result.dtype == torch.bool else kind))
        if result.dtype == torch.float32:  # masks are filled with the lowest float32, beyond float16
            number = max(min(number, 65504.0), -65504.0)
        filled = mb.fill(shape=_sizes(low, sizes), value=kind(number))
        return mb.cast(x=filled, dtype="bool") if result.dtype == torch.bool else filled

    return lower


def _pad(low: Lowering, _: Any, x: Any, widths: list[int], *how: Any) -> Any:
    """widths: before and after the last dimension, then the one before it, and so on. how: the mode, if any, and the number."""
    mode = how[0] if how and isinstance(how[0], str) else "constant"
    if mode != "constant" or min(widths) < 0:
        raise UserError(f"--format coreml: padding ({mode}, {min(widths)}) has no lowering; leave this target out")
    x, number = low.var(x), 0.0 if not how or how[-1] in (None, mode) else how[-1]
    pairs = [w for i in reversed(range(0, len(widths), 2)) for w in widths[i : i + 2]]
    kind = {types.fp16: np.float16, types.fp32: np.float32}.get(x.dtype)
    if kind is None:
        raise UserError("--format coreml: padding of whole numbers has no lowering; leave this target out")
    return mb.pad(x=x, pad=[0] * (2 * len(x.shape) - len(pairs)) + pairs, mode="constant", constant_val=kind(number))


def _cat(low: Lowering, node: Any, values: list[Any], axis: int = 0) -> Any:
    axis %= node.meta["val"].dim()
    like = next((v for v in values if isinstance(v, Var) and v.dtype == types.fp32), None)
    return mb.concat(values=[low.var(v, like) for v in values], axis=axis)


SHAPES: dict[str, Callable[..., Any]] = {
    "aten::arange": _arange,
    "aten::sym_size": _sym_size,
    "aten::view": _view,
    "aten::reshape": _view,
    "aten::_unsafe_view": _view,
    "aten::unsqueeze": lambda low, _, x, axis: mb.expand_dims(x=low.var(x), axes=[axis]),
    "aten::squeeze": lambda low, _, x, axis: mb.squeeze(x=x, axes=axis if isinstance(axis, list) else [axis]),
    "aten::transpose": _transpose,
    "aten::t": lambda low, node, x: _transpose(low, node, x, 0, 1),
    "aten::permute": lambda low, _, x, order: mb.transpose(x=x, perm=order),
    "aten::cat": _cat,
    "aten::pad": _pad,
    "aten::constant_pad_nd": _pad,
    "aten::slice": _slice,
    "aten::narrow": _narrow,
    "aten::select": _select,
    "aten::split": _split,
    "aten::split_with_sizes": _split,
    "aten::chunk": _split,
    "aten::expand": _expand,
    "aten::expand_as": _expand,
    "aten::zeros_like": _filled(0.0),
    "aten::ones_like": _filled(1.0),
    "aten::full_like": _filled(None),
    "aten::new_zeros": _filled(0.0),
    "aten::zeros": _filled(0.0),
    "aten::ones": _filled(1.0),
    "aten::full": _filled(None),
}
