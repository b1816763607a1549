"""What each MIL operation computes, in numpy: the evaluator's table.

It follows Apple's description of the operations, not the exporter, so that it can judge what the exporter builds. Floats are
float32 arrays; the evaluator rounds those that the program declares as float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..session import Array

Inputs = Mapping[str, Any]
"""The named inputs of an operation."""


def _axes(g: Inputs, x: Array) -> tuple[int, ...] | None:
    axes = g.get("axes")
    return None if axes is None else tuple(int(a) for a in np.atleast_1d(axes))


def _reduce(fn: Callable[..., Any]) -> Callable[[Inputs], Any]:
    return lambda g: fn(g["x"], axis=_axes(g, g["x"]), keepdims=bool(g.get("keep_dims", False)))


def _binary(fn: Callable[[Any, Any], Any]) -> Callable[[Inputs], Any]:
    return lambda g: fn(g["x"], g["y"])


def _unary(fn: Callable[[Any], Any]) -> Callable[[Inputs], Any]:
    return lambda g: fn(g["x"])


def _linear(g: Inputs) -> Array:
    out: Array = g["x"] @ g["weight"].T
    return out + g["bias"] if "bias" in g else out


def _matmul(g: Inputs) -> Any:
    x = np.swapaxes(g["x"], -1, -2) if g.get("transpose_x", False) else g["x"]
    y = np.swapaxes(g["y"], -1, -2) if g.get("transpose_y", False) else g["y"]
    return np.matmul(x, y)


def _softmax(g: Inputs) -> Any:
    x = g["x"] - g["x"].max(axis=int(g["axis"]), keepdims=True)
    e = np.exp(x)
    return e / e.sum(axis=int(g["axis"]), keepdims=True)


def _gather(g: Inputs) -> Any:
    if int(g.get("batch_dims", 0)):
        raise NotImplementedError("gather with batch_dims")
    return np.take(g["x"], np.asarray(g["indices"], np.int64), axis=int(g.get("axis", 0)))


def _reshape(g: Inputs) -> Any:
    shape = [int(s) for s in g["shape"]]
    if 0 in shape:
        raise NotImplementedError("reshape with a size copied from the input (0)")
    return g["x"].reshape(shape)


def _window(g: Inputs, x: Array) -> tuple[slice | int, ...]:
    """The index tuple of slice_by_index and slice_update."""
    rank = x.ndim
    begin, end = (np.atleast_1d(g[k]).tolist() for k in ("begin", "end"))
    stride = np.atleast_1d(g["stride"]).tolist() if "stride" in g else [1] * rank

    def mask(name: str) -> list[bool]:
        return np.atleast_1d(g[name]).tolist() if name in g else [False] * rank

    first, last, single = mask("begin_mask"), mask("end_mask"), mask("squeeze_mask")
    return tuple(
        begin[i] if single[i] else slice(None if first[i] else begin[i], None if last[i] else end[i], stride[i])
        for i in range(rank)
    )


def _slice_update(g: Inputs) -> Any:
    return write_slice({**g, "x": np.array(g["x"])})


def write_slice(g: Inputs) -> Any:
    """slice_update that writes into `x` in place."""
    out = g["x"]
    target = out[_window(g, out)]
    if target.shape != g["update"].shape:
        raise ValueError(f"slice_update of {list(g['update'].shape)} into {list(target.shape)}")
    target[...] = g["update"]
    return out


def _split(g: Inputs) -> Any:
    axis = int(g["axis"])
    if "split_sizes" in g:
        return np.split(g["x"], np.cumsum(g["split_sizes"])[:-1], axis=axis)
    return np.split(g["x"], int(g["num_splits"]), axis=axis)


def _concat(g: Inputs) -> Any:
    if g.get("interleave", False):
        raise NotImplementedError("concat with interleave")
    return np.concatenate([np.atleast_1d(v) for v in g["values"]], axis=int(g["axis"]))


def _pad(g: Inputs) -> Any:
    if str(g.get("mode", "constant")) != "constant":
        raise NotImplementedError(f"pad with the mode {g['mode']}")
    pairs = np.asarray(g["pad"]).reshape(-1, 2).tolist()
    widths = [(0, 0)] * (g["x"].ndim - len(pairs)) + [(before, after) for before, after in pairs]
    return np.pad(g["x"], widths, constant_values=g.get("constant_val", 0.0))


_KINDS = {"fp16": np.float32, "fp32": np.float32, "int32": np.int32, "bool": np.bool_, "int16": np.int16}


def _cast(g: Inputs) -> Any:
    kind = str(g["dtype"])
    if kind not in _KINDS:
        raise NotImplementedError(f"cast to {kind}")
    x = np.asarray(g["x"])
    return np.trunc(x).astype(_KINDS[kind]) if kind.startswith("int") else x.astype(_KINDS[kind])


def _erf(x: Array) -> Any:
    return np.vectorize(math.erf, otypes=[np.float64])(x).astype(x.dtype)


def _gelu(g: Inputs) -> Any:
    x, mode = g["x"], str(g.get("mode", "EXACT"))
    if mode == "EXACT":
        return 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0)))
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return x / (1.0 + np.exp(-1.702 * x))


def _sdpa(g: Inputs) -> Any:
    q, k, v = g["query"], g["key"], g["value"]
    scores = np.matmul(q, np.swapaxes(k, -1, -2)) / math.sqrt(q.shape[-1])
    mask = g.get("attn_mask")
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask
    return np.matmul(_softmax({"x": scores, "axis": -1}), v)


def _mod(g: Inputs) -> Any:
    return g["x"] - np.floor(g["x"] / g["y"]) * g["y"]


OPS: dict[str, Callable[[Inputs], Any]] = {
    "abs": _unary(np.abs),
    "add": _binary(np.add),
    "cast": _cast,
    "clip": lambda g: np.clip(g["x"], g["alpha"], g["beta"]),
    "concat": _concat,
    "cos": _unary(np.cos),
    "cumsum": lambda g: np.cumsum(g["x"], axis=int(g.get("axis", 0))),
    "equal": _binary(np.equal),
    "erf": _unary(_erf),
    "exp": _unary(np.exp),
    "exp2": _unary(np.exp2),
    "expand_dims": lambda g: np.expand_dims(g["x"], tuple(int(a) for a in np.atleast_1d(g["axes"]))),
    "fill": lambda g: np.full([int(s) for s in g["shape"]], g["value"]),
    "floor": _unary(np.floor),
    "floor_div": _binary(lambda x, y: np.floor(x / y).astype(np.asarray(x).dtype)),
    "gather": _gather,
    "gelu": _gelu,
    "greater": _binary(np.greater),
    "greater_equal": _binary(np.greater_equal),
    "identity": _unary(np.asarray),
    "inverse": lambda g: 1.0 / (g["x"] + g.get("epsilon", 1e-4)),
    "less": _binary(np.less),
    "less_equal": _binary(np.less_equal),
    "linear": _linear,
    "log": lambda g: np.log(g["x"] + g.get("epsilon", 1e-45)),
    "logical_and": _binary(np.logical_and),
    "logical_not": _unary(np.logical_not),
    "logical_or": _binary(np.logical_or),
    "matmul": _matmul,
    "maximum": _binary(np.maximum),
    "minimum": _binary(np.minimum),
    "mod": _mod,
    "mul": _binary(np.multiply),
    "not_equal": _binary(np.not_equal),
    "pad": _pad,
    "pow": _binary(np.power),
    "range_1d": lambda g: np.arange(g["start"], g["end"], g["step"], dtype=np.asarray(g["start"]).dtype),
    "real_div": _binary(np.true_divide),
    "reduce_l2_norm": _reduce(lambda x, axis, keepdims: np.sqrt((x * x).sum(axis=axis, keepdims=keepdims))),
    "reduce_max": _reduce(np.max),
    "reduce_mean": _reduce(np.mean),
    "reduce_min": _reduce(np.min),
    "reduce_sum": _reduce(np.sum),
    "reduce_sum_square": _reduce(lambda x, axis, keepdims: (x * x).sum(axis=axis, keepdims=keepdims)),
    "relu": _unary(lambda x: np.maximum(x, 0)),
    "reshape": _reshape,
    "round": _unary(np.rint),
    "rsqrt": lambda g: 1.0 / np.sqrt(g["x"] + g.get("epsilon", 1e-12)),
    "scaled_dot_product_attention": _sdpa,
    "select": lambda g: np.where(g["cond"], g["a"], g["b"]),
    "shape": lambda g: np.array(g["x"].shape, np.int32),
    "sigmoid": _unary(lambda x: 1.0 / (1.0 + np.exp(-x))),
    "silu": _unary(lambda x: x / (1.0 + np.exp(-x))),
    "sin": _unary(np.sin),
    "slice_by_index": lambda g: g["x"][_window(g, g["x"])],
    "slice_update": _slice_update,
    "softmax": _softmax,
    "softplus": _unary(lambda x: np.logaddexp(x, 0.0)),
    "split": _split,
    "sqrt": _unary(np.sqrt),
    "square": _unary(np.square),
    "squeeze": lambda g: np.squeeze(g["x"], _axes(g, g["x"])),
    "stack": lambda g: np.stack(g["values"], axis=int(g["axis"])),
    "sub": _binary(np.subtract),
    "tanh": _unary(np.tanh),
    "tile": lambda g: np.tile(g["x"], [int(r) for r in g["reps"]]),
    "transpose": lambda g: np.transpose(g["x"], [int(p) for p in g["perm"]]),
}
"""Operation -> function of its named inputs. It returns a list where the operation has several outputs."""

MOVES = frozenset({"concat", "expand_dims", "gather", "identity", "maximum", "minimum", "relu", "reshape", "select"})
MOVES |= {"slice_by_index", "slice_update", "split", "squeeze", "stack", "tile", "transpose"}
"""Operations whose results are values of their inputs, or 0: float16 inputs give float16 results without rounding."""
